// The conversation: what was said, what is being said, and how to stop it.

import { Problem, cancel, newRequestId, streamChat } from "./client.js";
import { settings } from "./settings.js";
import { drawText } from "./text.js";

const CANCEL_PATIENCE_MS = 400;
const at = (id) => document.getElementById(id);

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

/** One answer on its way. */
class Answer {
  constructor(list) {
    this.id = newRequestId();
    this.abort = new AbortController();
    this.text = "";
    this.stopped = false;
    this.asked = performance.now();
    this.firstAt = 0;
    this.item = make("li", "turn answer busy");
    this.body = make("div", "said");
    this.foot = make("div", "foot");
    this.item.append(this.body, this.foot);
    list.append(this.item);
  }

  take(text) {
    if (this.stopped) return;
    this.firstAt ||= performance.now();
    this.text += text;
  }

  /** End it: the server is told at once, the connection follows if that took no effect. */
  stop() {
    if (this.stopped) return;
    this.stopped = true;
    cancel(this.id);
    setTimeout(() => this.abort.abort(), CANCEL_PATIENCE_MS);
  }
}

export class Chat {
  constructor({ model, onBusy, onProblem }) {
    Object.assign(this, { model, onBusy, onProblem });
    this.turns = []; // {role, content}
    this.answer = null;
    this.list = at("messages");
    this.scroller = at("scroller");
    this.stick = true;
    this.scroller.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this.scroller;
      this.stick = scrollHeight - scrollTop - clientHeight < 48;
    });
    const keepEnd = new ResizeObserver(() => this.follow());
    keepEnd.observe(this.scroller);
    keepEnd.observe(this.list);
  }

  get busy() {
    return this.answer !== null;
  }

  /** Say something and let the model answer. */
  async send(text) {
    if (this.busy || !text.trim()) return;
    this.turns.push({ role: "user", content: text });
    const item = make("li", "turn mine");
    item.append(make("div", "said", text));
    this.list.append(item);
    await this.reply();
  }

  /** Drop the last answer, if there is one, and ask again. */
  async again() {
    if (this.busy) return;
    if (this.turns.at(-1)?.role === "assistant") this.turns.pop();
    while (this.list.lastElementChild?.classList.contains("answer")) this.list.lastElementChild.remove();
    if (this.turns.length) await this.reply();
  }

  stop() {
    this.answer?.stop();
  }

  /** Stay at the end, unless the reader has scrolled away from it. */
  follow() {
    if (this.stick) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  clear() {
    this.stop();
    this.answer = null;
    this.turns = [];
    this.list.replaceChildren();
    at("welcome").hidden = false;
    this.onBusy(false);
  }

  async reply() {
    at("welcome").hidden = true;
    for (const old of this.list.querySelectorAll(".again")) old.remove();
    const answer = (this.answer = new Answer(this.list));
    this.stick = true;
    this.onBusy(true);
    at("announce").textContent = "Answering.";
    const drawing = this.drawWhile(answer);
    let end = null;
    let problem = null;
    try {
      end = await streamChat(this.request(), {
        requestId: answer.id, signal: answer.abort.signal, onText: (text) => answer.take(text),
      });
    } catch (error) {
      if (error.name !== "AbortError" && !answer.stopped) problem = error;
    }
    answer.done = true;
    await drawing;
    if (this.answer !== answer) return; // a new chat began meanwhile
    this.answer = null;
    if (answer.text) this.turns.push({ role: "assistant", content: answer.text });
    this.finish(answer, end, problem);
    this.onBusy(false);
  }

  request() {
    const { system, temperature, maxTokens, seed } = settings();
    const messages = system.trim() ? [{ role: "system", content: system }] : [];
    const body = { messages: [...messages, ...this.turns], temperature };
    if (this.model()) body.model = this.model();
    if (maxTokens !== null) body.max_tokens = maxTokens;
    if (seed !== null) body.seed = seed;
    return body;
  }

  /** Draw what has come once a frame, however fast it comes. */
  async drawWhile(answer) {
    let drawn = -1;
    while (true) {
      const last = answer.done;
      if (answer.text.length !== drawn) {
        drawn = answer.text.length;
        drawText(answer.body, answer.text);
        this.follow();
      }
      if (last) return;
      await new Promise((next) => (document.hidden ? setTimeout(next, 100) : requestAnimationFrame(next)));
    }
  }

  finish(answer, end, problem) {
    answer.item.classList.remove("busy");
    const facts = factsOf(answer, end);
    if (facts) answer.foot.append(make("span", "meta", facts));
    if (answer.text) answer.foot.append(copyButton(answer.text));
    answer.foot.append(this.againButton(problem ? "Try again" : "Again"));
    if (problem) {
      answer.item.insertBefore(problemNote(problem), answer.foot);
      this.onProblem(problem);
    } else if (!answer.text) {
      answer.body.append(make("span", "quiet", answer.stopped ? "Stopped before the first word." : "The model said nothing."));
    }
    at("announce").textContent = problem ? `${problem.message} ${problem.advice ?? ""}`
      : answer.stopped ? "Stopped." : "The answer is complete.";
    this.follow();
  }

  againButton(label) {
    const button = make("button", "link again", label);
    button.type = "button";
    button.addEventListener("click", () => this.again());
    return button;
  }
}

function factsOf(answer, end) {
  const parts = [];
  const tokens = end?.usage?.completion_tokens;
  if (tokens) parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  const seconds = (performance.now() - answer.firstAt) / 1000;
  if (tokens > 1 && answer.firstAt && seconds > 0 && !answer.stopped) {
    parts.push(`${((tokens - 1) / seconds).toFixed(tokens / seconds < 20 ? 1 : 0)} tokens/s`);
  }
  if (answer.firstAt) parts.push(`first after ${((answer.firstAt - answer.asked) / 1000).toFixed(2)} s`);
  if (answer.stopped) parts.push("stopped");
  else if (end?.stopReason === "deadline") parts.push("ended by the deadline");
  else if (end?.stopReason === "cancelled") parts.push("cancelled");
  else if (end?.finishReason === "length") parts.push("reached its longest");
  return parts.join(" · ");
}

function problemNote(problem) {
  const note = make("div", "problem");
  const known = problem instanceof Problem;
  note.append(make("strong", "", known ? problem.message : "Something in this page went wrong."));
  const advice = known ? problem.advice : `Reload the page. (${problem.message})`;
  if (advice) note.append(make("span", "", advice));
  return note;
}

function copyButton(text) {
  const button = make("button", "link", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select the text to copy it";
    }
    setTimeout(() => (button.textContent = "Copy"), 1600);
  });
  return button;
}
