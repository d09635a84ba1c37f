// The server, as this page sees it: health, models, and an answer as a stream of events.
//
// Addresses are relative to the page, so it also works behind a proxy that adds a prefix.

const LONGEST_LINE = 4_000_000;

/** A request that did not succeed: `status` is 0 where no answer came at all. */
export class ServerError extends Error {
  constructor(status, message, { code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function send(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let said = {};
  try {
    said = (await response.json())?.error ?? {};
  } catch {
    // A proxy's page, or nothing: the status has to do.
  }
  const message = typeof said === "string" ? said : said.message;
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  return new ServerError(
    response.status,
    String(message ?? `The server answered ${response.status}.`),
    {
      code: String(said.code ?? said.type ?? ""),
      retryAfter: Number.isFinite(seconds) ? Math.max(0, seconds) : null,
    },
  );
}

/** Resolve when the server says that it is well. */
export async function checkHealth() {
  await send("health", null, { signal: AbortSignal.timeout(10_000) });
}

/** Return the names of the models, the default first. */
export async function listModels(key) {
  const response = await send("v1/models", key);
  const names = (await response.json())?.data?.map((card) => card?.id);
  if (!names?.every((name) => typeof name === "string"))
    throw new ServerError(0, "What answers at this address is no model server.");
  return names;
}

/**
 * Ask for an answer and yield what comes: {text}, {usage}, {timings}, {finish}.
 *
 * @param {object} request model, messages and sampling, as the API names them.
 * @param {string} key bearer key, or "".
 * @param {AbortSignal} signal ends the request; the server then frees its slot.
 * @throws {ServerError} also for an error in the middle, and for a stream that breaks off.
 */
export async function* completeChat(request, key, signal) {
  const response = await send("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: String(choice.delta.content) };
    if (chunk.usage) yield { usage: chunk.usage };
    if (chunk.timings) yield { timings: chunk.timings };
    if (choice?.finish_reason) {
      finished = true;
      yield { finish: String(choice.finish_reason) };
    }
  }
  if (!finished) throw new ServerError(0, "The connection broke off in the middle of the answer.");
}

function parsed(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ServerError(0, "The server sent something that is no event of an answer.");
  }
  if (!chunk?.error) return chunk ?? {};
  const { message, code, type } = chunk.error;
  const status = Number.isInteger(code) ? code : 500;
  throw new ServerError(status, String(message ?? "The server failed."), {
    code: String(code ?? type ?? ""),
  });
}

/** Yield the data of each server-sent event; comments, which keep it open, are skipped. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      if (rest.length > LONGEST_LINE)
        throw new ServerError(0, "The server sent a line without an end.");
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError(0, "The connection broke off in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
