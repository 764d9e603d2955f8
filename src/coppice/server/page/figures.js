// Draws the live figures. Pure drawing: what it is given, it shows.

const SVG_WIDTH = 120;
const SVG_HEIGHT = 40;
const MAX_CELLS = 110;
const MAX_DOTS = 48;
const MAX_REQUESTS = 12;
const MAX_TENANTS = 8;
const at = (id) => document.getElementById(id);
const count = (number) => Math.round(number).toLocaleString("en");

/** Rates over the last minute, newest at the right edge. */
export function drawSpark(rates, now, spanMs) {
  const top = Math.max(1, ...rates.map((point) => point.rate)) * 1.12;
  const points = rates.map(({ at: when, rate }) => {
    const x = SVG_WIDTH * (1 - (now - when) / spanMs);
    const y = SVG_HEIGHT - 1 - (SVG_HEIGHT - 2) * (rate / top);
    return `${x.toFixed(2)} ${y.toFixed(2)}`;
  });
  if (!points.length) return;
  const line = `M${points.join("L")}`;
  const from = points[0].split(" ")[0];
  at("spark-line").setAttribute("d", line);
  at("spark-area").setAttribute("d", `${line}L${SVG_WIDTH} ${SVG_HEIGHT}L${from} ${SVG_HEIGHT}Z`);
  const peak = Math.max(...rates.map((point) => point.rate));
  at("spark").setAttribute("aria-label", `Tokens per second, last minute; peak ${count(peak)}`);
}

/** As many `<i>` in `root` as wanted, classes set by `name(index)`. */
function cells(root, wanted, name) {
  while (root.children.length < wanted) root.append(document.createElement("i"));
  while (root.children.length > wanted) root.lastElementChild.remove();
  for (let index = 0; index < wanted; index++) {
    const node = root.children[index];
    if (node.className !== name(index)) node.className = name(index);
  }
}

export function drawQueue({ running, waiting, waiting_tokens: tokens, preemptions, waiting_for: why }) {
  at("running").textContent = count(running);
  at("waiting").textContent = count(waiting);
  at("strip-queue").textContent = !running && !waiting ? "idle"
    : `${count(running)} running` + (waiting ? `, ${count(waiting)} waiting` : "");
  const shown = Math.min(running + waiting, MAX_DOTS);
  cells(at("queue-dots"), shown, (index) => (index < running ? "dot decode" : "dot queued"));
  const parts = [];
  if (running + waiting > shown) parts.push(`${count(running + waiting - shown)} more`);
  if (waiting && why) parts.push(`waiting: ${why}`);
  if (waiting && tokens) parts.push(`${count(tokens)} prompt tokens wait`);
  if (preemptions) parts.push(`${count(preemptions)} preemption${preemptions === 1 ? "" : "s"} so far`);
  at("queue-more").hidden = !parts.length;
  at("queue-more").textContent = parts.join(" · ");
}

/** What each tenant had of the steps' time, all its keys together, and its wishes for time. */
export function drawTenants({ usage = [] }) {
  const tenants = new Map();
  for (const used of usage) {
    const sum = tenants.get(used.tenant) ?? { seconds: 0, tokens: 0, met: 0, missed: 0 };
    sum.seconds += used.step_s;
    sum.tokens += used.prompt_tokens + used.generated_tokens;
    sum.met += used.deadlines_met;
    sum.missed += used.deadlines_missed;
    tenants.set(used.tenant, sum);
  }
  const all = [...tenants.values()].reduce((sum, { seconds }) => sum + seconds, 0) || 1;
  const most = [...tenants].sort((a, b) => b[1].seconds - a[1].seconds).slice(0, MAX_TENANTS);
  const wished = most.some(([, { met, missed }]) => met || missed);
  at("tenants").hidden = tenants.size < 2 && !wished;
  at("tenant-list").replaceChildren(...most.map(([name, sum]) => {
    const item = newRow(name, ["decode"]);
    const [words, track] = item.children;
    words.children[0].textContent = name;
    const wishes = sum.met || sum.missed
      ? ` · deadlines ${count(sum.met)} met, ${count(sum.missed)} missed` : "";
    words.children[1].textContent = `${Math.round((100 * sum.seconds) / all)}%${wishes}`;
    track.children[0].style.width = `${((100 * sum.seconds) / all).toFixed(2)}%`;
    item.title = `${name}\n${count(sum.tokens)} tokens, ${seconds(sum.seconds)} of the steps' time`;
    return item;
  }));
}

/** How many pages a cell stands for: as few as leave a quarter of the cells for free pages. */
function pagesPerCell(held, pages) {
  let each = 1;
  while (MAX_CELLS * each < Math.min(pages, held * (4 / 3))) each *= 2;
  return each;
}

/** A cell is one page while few are held, more when many are; what is cut off is said. */
export function drawPages(engine, pageSize) {
  const { pages_used: used, pages_cached: cached, num_pages: pages } = engine;
  const free = Math.max(0, pages - used - cached);
  at("pages-used").textContent = count(used);
  at("pages-cached").textContent = count(cached);
  at("pages-free").textContent = count(free);
  at("strip-pages").textContent = `${Math.ceil((100 * used) / Math.max(1, pages))}% of pages`;
  const each = pagesPerCell(used + cached, pages);
  const wanted = Math.min(Math.ceil(pages / each), MAX_CELLS);
  const usedCells = Math.min(Math.ceil(used / each), wanted);
  const cachedCells = Math.min(Math.ceil(cached / each), wanted - usedCells);
  cells(at("pages"), wanted, (index) => {
    if (index < usedCells) return "cell used";
    return index < usedCells + cachedCells ? "cell cached" : "cell";
  });
  notePages(engine, each, pages - wanted * each);
  const size = pageSize ? `, ${pageSize} tokens each` : "";
  at("pages").setAttribute(
    "aria-label", `${count(used)} of ${count(pages)} KV pages used, ${count(cached)} cached${size}`,
  );
  at("pages").title = `${count(pages)} pages${size}`;
}

function notePages({ prefix_queried_tokens: asked, prefix_hit_tokens: found }, each, beyond) {
  const parts = [];
  const square = each === 1 ? "One page" : `${each} pages`;
  if (beyond > 0) parts.push(`${square} per square, ${count(beyond)} more free.`);
  if (asked) parts.push(`${Math.round((100 * found) / asked)}% of prompt tokens were cached.`);
  at("pages-note").hidden = !parts.length;
  at("pages-note").textContent = parts.join("\n");
}

const PHASES = ["queued", "prefill", "decode"];

/** The lengths in seconds of a request's phases, as far as it has come. */
export function phases({ arrived_s: arrived, queue_s: queue, ttft_s: ttft, e2e_s: e2e }, now) {
  const total = e2e ?? Math.max(0, now - arrived);
  const first = Math.min(ttft ?? total, total);
  const queued = Math.min(queue ?? (ttft === null ? total : 0), first);
  return { total, queued, prefill: first - queued, decode: total - first };
}

const ENDED_BADLY = new Set(["cancelled", "expired", "refused", "failed"]);
const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`);

/** Newest first; all bars share one scale, so lengths compare. */
export function drawRequests({ now_s: now, requests }) {
  const shown = [...requests].sort((a, b) => b.arrived_s - a.arrived_s).slice(0, MAX_REQUESTS);
  const longest = Math.max(0.001, ...shown.map((request) => phases(request, now).total));
  const list = at("requests");
  at("requests-none").hidden = at("requests-legend").hidden = true;
  at(shown.length ? "requests-legend" : "requests-none").hidden = false;
  const known = new Map(Array.from(list.children, (item) => [item.dataset.id, item]));
  shown.forEach((request, index) => {
    const item = known.get(request.id) ?? newRow(request.id);
    known.delete(request.id);
    drawRow(item, request, phases(request, now), longest);
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  for (const gone of known.values()) gone.remove();
}

function newRow(id, phases = PHASES) {
  const item = document.createElement("li");
  item.dataset.id = id;
  const words = document.createElement("span");
  words.className = "words";
  words.append(document.createElement("span"), document.createElement("span"));
  const track = document.createElement("span");
  track.className = "track";
  for (const phase of phases) {
    const bar = document.createElement("i");
    bar.className = phase;
    track.append(bar);
  }
  item.append(words, track);
  return item;
}

function drawRow(item, request, spans, longest) {
  const [words, track] = item.children;
  const { prompt_tokens: prompt, cached_tokens: cached, completion_tokens: made, outcome } = request;
  const state = outcome ?? (request.ttft_s === null ? "waiting" : "running");
  item.dataset.outcome = ENDED_BADLY.has(state) ? "bad" : state;
  words.children[0].textContent = prompt ? `${count(prompt)} → ${count(made)} tokens` : state;
  const tail = ENDED_BADLY.has(state) && prompt ? `${state} · ` : "";
  words.children[1].textContent = tail + seconds(spans.total);
  PHASES.forEach((phase, index) => {
    track.children[index].style.width = `${((100 * spans[phase]) / longest).toFixed(2)}%`;
  });
  item.title = [
    request.id, state,
    `prompt ${count(prompt)} tokens (${count(cached)} from the cache)`, `answer ${count(made)} tokens`,
    ...PHASES.map((phase) => `${phase} ${seconds(spans[phase])}`),
  ].join("\n");
}
