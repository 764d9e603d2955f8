// The server's figures, asked for a few times a second while somebody looks.

import { call } from "./client.js";
import { drawPages, drawQueue, drawRequests, drawSpark, drawTenants } from "./figures.js";
import { drawTree } from "./tree.js";

const BUSY_MS = 400;
const IDLE_MS = 1500;
const RATE_WINDOW_MS = 1200;
const SPARK_MS = 60_000;
const UNUSED = { running: 0, waiting: 0, waiting_tokens: 0, preemptions: 0, pages_used: 0, pages_cached: 0 };
const at = (id) => document.getElementById(id);
const count = (number) => Math.round(number).toLocaleString("en");

export class Live {
  constructor({ onInfo, onProblem }) {
    Object.assign(this, { onInfo, onProblem });
    this.samples = []; // {at, generated, modelS, otherS}
    this.rates = []; // {at, rate}
    this.timer = 0;
    this.failed = false;
    this.expectWorkUntil = 0;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.soon();
    });
  }

  /** Look again now, and often for a while: something was just asked. */
  soon() {
    this.expectWorkUntil = performance.now() + 2500;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), 60);
  }

  async look() {
    clearTimeout(this.timer);
    if (this.looking) return;
    this.looking = true;
    let busy = false;
    try {
      const info = await (await call("v1/coppice/info", { signal: AbortSignal.timeout(10_000) })).json();
      this.show(info);
      busy = Boolean(info.engine?.running || info.engine?.waiting || info.outcomes?.in_flight);
      this.failed = false;
    } catch (error) {
      this.failed = true;
      this.onProblem(error);
    } finally {
      this.looking = false;
    }
    if (document.hidden) return; // the visibility listener resumes
    const soon = busy || performance.now() < this.expectWorkUntil || this.rates.at(-1)?.rate > 0;
    this.timer = setTimeout(() => this.look(), soon && !this.failed ? BUSY_MS : IDLE_MS);
  }

  show(info) {
    this.onInfo(info);
    if (info.engine) this.measure(info.engine);
    // An engine that has taken no step yet has told nothing: nothing runs, all pages are free.
    const engine = info.engine ?? (info.model && { ...UNUSED, num_pages: info.model.num_pages });
    if (engine) {
      drawQueue(engine);
      drawPages(engine, info.model?.page_size);
      drawTenants(engine);
      drawTree(engine);
    }
    if (info.timeline) drawRequests(info.timeline);
  }

  /** Rates from running totals: over the last second or so, for steadiness. */
  measure(engine) {
    const now = performance.now();
    const sample = {
      at: now, generated: engine.generated_tokens, modelS: engine.model_s, otherS: engine.other_s,
    };
    if (this.samples.length && sample.generated < this.samples.at(-1).generated) this.samples = []; // restarted
    this.samples.push(sample);
    while (this.samples.length > 2 && this.samples[1].at < now - RATE_WINDOW_MS) this.samples.shift();
    const first = this.samples[0];
    const seconds = (sample.at - first.at) / 1000;
    const rate = seconds ? (sample.generated - first.generated) / seconds : 0;
    this.rates.push({ at: now, rate });
    while (this.rates[0].at < now - SPARK_MS) this.rates.shift();
    at("rate").textContent = at("strip-rate").textContent = rate < 10 && rate > 0 ? rate.toFixed(1) : count(rate);
    const prefill = engine.prefill_rate_tok_s;
    at("prefill-rate").textContent = prefill ? `${count(prefill)} tokens/s` : "–";
    const model = sample.modelS - first.modelS;
    const all = model + sample.otherS - first.otherS;
    if (all > 0) at("model-share").textContent = `${((100 * model) / all).toFixed(1)}% of step time`;
    drawSpark(this.rates, now, SPARK_MS);
  }
}
