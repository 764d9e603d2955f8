// Wires the page together.

import { Chat } from "./chat.js";
import { Problem, apiKey, call } from "./client.js";
import { Live } from "./live.js";
import { startSettings, startTheme } from "./settings.js";

const SEEDS = [
  "Tell me a story about a tree that grows back.",
  "To be, or not to be",
  "def fibonacci(n):",
];
const STATES = {
  ok: "ready", loading: "the model is loading", restarting: "the engine is starting again",
  draining: "the server is shutting down", failed: "the engine has failed", stalled: "the engine does not answer",
  stopped: "the engine has stopped", unreachable: "the server cannot be reached", locked: "the server wants an API key",
};
const at = (id) => document.getElementById(id);
const prompt = at("prompt");
let modelName = "";
let askedForKey = false;

startTheme();
const drawer = startSettings({ onKey: () => void begin() });
const chat = new Chat({ model: () => modelName, onBusy: showBusy, onProblem: (problem) => heed(problem) });
const live = new Live({ onInfo: showInfo, onProblem: heed });

function showBusy(busy) {
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  live.soon();
  fit();
}

function showState(state) {
  const dot = at("state");
  dot.dataset.state = state;
  dot.title = STATES[state] ?? state;
  const note = at("live-note");
  note.hidden = state === "ok";
  note.textContent = `${capital(STATES[state] ?? state)}.`;
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** Problems that concern the whole page; the chat shows its own. */
function heed(problem) {
  if (problem.status === 401) {
    if (problem.key !== apiKey()) return; // asked before the key was given
    showState("locked");
    if (!askedForKey) drawer.askForKey(problem.message);
    askedForKey = true;
  } else if (problem.code === "unreachable" || problem.name === "TimeoutError") {
    showState("unreachable");
    if (!modelName) at("model-facts").textContent = "the server cannot be reached";
  } else if (!(problem instanceof Problem)) {
    console.error(problem);
  }
}

function showInfo(info) {
  showState(info.state);
  const model = info.model;
  at("server-facts").textContent = `Coppice ${info.version}` + (model ? ` · ${model.fingerprint}` : "");
  if (!model) return;
  at("model-name").textContent = modelName || model.name;
  at("bundled-note").hidden = model.name !== "bundled";
  document.title = `${modelName || model.name} · Coppice`;
  const facts = [parameters(model.num_params), model.weight_format, model.kernels.split(";")[0]];
  facts.push(`${model.context_length.toLocaleString("en")} tokens of context`);
  at("model-facts").textContent = facts.join(" · ");
  at("model-facts").title = `${model.architecture} · ${model.kernels} · ${model.num_threads} threads`;
}

function parameters(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(number < 1e10 ? 1 : 0)} B parameters`;
  return `${(number / 1e6).toFixed(number < 1e7 ? 1 : 0)} M parameters`;
}

/** Learn the model's public name; the figures follow on their own. */
async function begin() {
  askedForKey = false;
  try {
    modelName = (await (await call("v1/models")).json()).data[0]?.id ?? "";
    delete at("key-field").dataset.wanted;
    at("key-why").textContent = "";
  } catch (error) {
    heed(error);
  }
  await live.look();
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, window.innerHeight * 0.4)}px`;
  at("send").disabled = !prompt.value.trim();
}

function send() {
  const text = prompt.value;
  if (chat.busy || !text.trim()) return;
  prompt.value = "";
  fit();
  void chat.send(text);
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.busy && !at("settings").open) chat.stop();
});
at("stop").addEventListener("click", () => {
  chat.stop();
  prompt.focus();
});
at("new-chat").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});
at("show-live").addEventListener("click", () => {
  const shown = document.body.classList.toggle("live-shown");
  at("show-live").setAttribute("aria-expanded", String(shown));
});
for (const text of SEEDS) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => {
    prompt.value = text;
    fit();
    send();
  });
  at("seeds").append(button);
}
fit();
if (matchMedia("(hover: hover)").matches) prompt.focus();
void begin();
