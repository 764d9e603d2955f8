// The settings drawer and the theme. Settings live in this browser; the key in this tab.

import { apiKey, setApiKey } from "./client.js";

const STORE = "coppice.settings";
const DEFAULTS = { system: "", temperature: 0.8, maxTokens: null, seed: null };
const at = (id) => document.getElementById(id);

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function store(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Storage is blocked: the setting lasts as long as this page.
  }
}

function load() {
  try {
    return { ...DEFAULTS, ...JSON.parse(stored(STORE) ?? "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

const values = load();

/** The sampling fields of a request, and the system prompt. */
export function settings() {
  return values;
}

const whole = (field, lowest) => {
  const number = field.valueAsNumber;
  return Number.isSafeInteger(number) && number >= lowest ? number : null;
};

export function startSettings({ onKey }) {
  const dialog = at("settings");
  const show = () => {
    at("system").value = values.system;
    at("temperature").value = values.temperature;
    at("temperature-shown").value = Number(values.temperature).toFixed(2);
    at("max-tokens").value = values.maxTokens ?? "";
    at("seed").value = values.seed ?? "";
    at("api-key").value = apiKey();
  };
  const keep = () => {
    values.system = at("system").value;
    values.temperature = at("temperature").valueAsNumber;
    values.maxTokens = whole(at("max-tokens"), 1);
    values.seed = whole(at("seed"), Number.MIN_SAFE_INTEGER);
    at("temperature-shown").value = values.temperature.toFixed(2);
    store(STORE, JSON.stringify(values));
  };
  const open = () => {
    if (dialog.open) return;
    show();
    dialog.showModal();
  };
  at("settings-form").addEventListener("input", (event) => {
    if (event.target.id !== "api-key") keep();
  });
  at("show-settings").addEventListener("click", open);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  dialog.addEventListener("close", () => {
    if (at("api-key").value.trim() === apiKey()) return;
    setApiKey(at("api-key").value);
    onKey();
  });
  return {
    askForKey(why) {
      open();
      at("key-field").dataset.wanted = "yes";
      at("key-why").textContent = why;
      at("api-key").focus();
    },
  };
}

const THEMES = ["system", "light", "dark"];

export function startTheme() {
  const root = document.documentElement;
  const show = () => {
    const name = root.dataset.theme ?? "system";
    at("theme-name").textContent = `Theme: ${name}`;
    at("theme").title = `Theme: ${name}`;
  };
  at("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    store("coppice.theme", next);
    show();
  });
  show();
}
