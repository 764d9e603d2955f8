// Talks to the server this page came from, and to no other.

const KEY = "coppice.key";
let memoryKey = "";

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? memoryKey;
  } catch {
    return memoryKey;
  }
}

export function setApiKey(key) {
  memoryKey = key.trim();
  try {
    sessionStorage.setItem(KEY, memoryKey);
  } catch {
    // Storage is blocked: it lives as long as this page.
  }
}

/** What went wrong, in words: `message` says what happened, `advice` what to do. */
export class Problem extends Error {
  constructor(message, { advice = "", code = "", status = 0 } = {}) {
    super(message);
    Object.assign(this, { advice, code, status, key: "" });
  }
}

/**
 * Fetch from this server.
 * @throws {Problem} for anything but success.
 * @throws {DOMException} `AbortError` when the signal says so.
 */
export async function call(path, { method = "GET", body, headers = {}, signal, keepalive } = {}) {
  const sent = { ...headers };
  const key = apiKey();
  if (key) sent.Authorization = `Bearer ${key}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(new URL(path, document.baseURI), {
      method, headers: sent, signal, keepalive, cache: "no-store", credentials: "omit",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached.", {
      code: "unreachable", advice: "Check that “coppice serve” still runs, then try again.",
    });
  }
  if (!reply.ok) throw Object.assign(await problemOf(reply), { key });
  return reply;
}

async function problemOf(reply) {
  let told = {};
  try {
    told = (await reply.json()).error ?? {};
  } catch {
    // Not our server's words; the status must do.
  }
  const retryAfterS = Number(reply.headers.get("Retry-After")) || 0;
  return makeProblem(told, reply.status, retryAfterS);
}

function makeProblem(told, status, retryAfterS = 0) {
  const code = String(told.code ?? "");
  const message = told.message ? String(told.message) : `The server answered ${status}.`;
  return new Problem(message, { code, status, advice: adviceFor(code, status, retryAfterS) });
}

function adviceFor(code, status, retryAfterS) {
  if (status === 401) return "Enter the key in the settings; it stays in this tab.";
  if (code === "context_overflow") return "Start a new chat, or allow a shorter answer in the settings.";
  if (status === 429 || status === 503) {
    const wait = retryAfterS ? `${retryAfterS} s` : "a moment";
    return `Nothing is lost; try again in ${wait}.`;
  }
  if (status >= 500 || code === "engine_dead" || code === "engine_error") {
    return "Try again; the server's log has the details.";
  }
  return "";
}

export function newRequestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return "page-" + Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

/** Tell the server to end a request. It may have ended already, so no answer matters. */
export async function cancel(requestId) {
  try {
    await call(`v1/requests/${requestId}/cancel`, { method: "POST", keepalive: true });
  } catch {
    // Gone already, or unreachable: closing the stream does the same.
  }
}

/**
 * Ask for an answer and hand over its pieces.
 * @param {object} body of a chat completion.
 * @param {{requestId: string, signal: AbortSignal, onText: (text: string) => void}} options
 * @returns {Promise<{usage: object|null, finishReason: string|null, stopReason: any}>}
 * @throws {Problem} refused, failed on the way, or cut off.
 */
export async function streamChat(body, { requestId, signal, onText }) {
  const reply = await call("v1/chat/completions", {
    method: "POST", signal, headers: { "X-Request-Id": requestId },
    body: { ...body, stream: true, stream_options: { include_usage: true } },
  });
  const end = { usage: null, finishReason: null, stopReason: null };
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return end;
    const piece = JSON.parse(data);
    if (piece.error) throw makeProblem(piece.error, 0);
    if (piece.usage) end.usage = piece.usage;
    for (const choice of piece.choices ?? []) {
      if (choice.delta?.content) onText(choice.delta.content);
      if (choice.finish_reason) {
        end.finishReason = choice.finish_reason;
        end.stopReason = choice.stop_reason;
      }
    }
  }
  throw new Problem("The connection ended before the answer did.", {
    code: "cut_off", advice: "What came is kept; try again for a whole answer.",
  });
}

/** The `data` of each server-sent event; comments and names are passed over. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const text = line.endsWith("\r") ? line.slice(0, -1) : line;
        if (text.startsWith("data:")) data.push(text.slice(text[5] === " " ? 6 : 5));
        else if (text === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The connection to the server broke.", {
      code: "cut_off", advice: "What came is kept; check the server, then try again.",
    });
  } finally {
    reader.cancel().catch(() => {});
  }
}
