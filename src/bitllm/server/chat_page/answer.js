// One answer on its way: asking, waiting for a busy server, measuring, stopping.

import { completeChat, ServerError } from "./stream.js";

const MOST_TRIES = 6;
const LONGEST_WAIT = 60;

export class Answer {
  /**
   * @param {object} node the message that is written.
   * @param {object} request what is sent.
   * @param {function(): string} key returns the bearer key.
   * @param {function(): void} changed called when there is something to show.
   */
  constructor(node, request, key, changed) {
    Object.assign(this, { node, request, key, changed });
    this.controller = new AbortController();
    this.waiting = null;
    this.tokens = 0;
  }

  /** The server notices that the connection is closed, and frees what the answer held. */
  stop() {
    this.controller.abort();
  }

  /** Write the answer into the node; return the error that ended it, or null. */
  async run() {
    try {
      for (let tries = 1; ; tries += 1) {
        try {
          await this.receive();
          return null;
        } catch (error) {
          if (error.status !== 429 || tries === MOST_TRIES) throw error;
          await this.wait(Math.min(error.retryAfter ?? 2 ** tries, LONGEST_WAIT));
        }
      }
    } catch (error) {
      if (this.controller.signal.aborted) {
        this.node.end = "stopped";
        return null;
      }
      if (this.node.content) this.node.end = "broken";
      return error instanceof ServerError
        ? error
        : new ServerError(0, `The page failed: ${error.message}`);
    } finally {
      this.measure();
    }
  }

  async receive() {
    this.sent = performance.now();
    for await (const piece of completeChat(this.request, this.key(), this.controller.signal)) {
      if (piece.text) this.write(piece.text);
      if (piece.usage) this.usage = piece.usage;
      if (piece.timings) this.timings = piece.timings;
      if (piece.finish && piece.finish !== "stop") this.node.end = piece.finish;
    }
  }

  write(text) {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += 1;
    this.node.content += text;
    this.changed();
  }

  async wait(seconds) {
    const until = performance.now() + 1000 * seconds;
    while (performance.now() < until) {
      this.controller.signal.throwIfAborted();
      this.waiting = Math.ceil((until - performance.now()) / 1000);
      this.changed();
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
    this.waiting = null;
  }

  /** Tokens a second after the first; events stand for tokens until the server tells. */
  speed() {
    const seconds = (this.last - this.first) / 1000;
    return seconds > 0.05 ? (this.tokens - 1) / seconds : undefined;
  }

  measure() {
    if (this.first === undefined) return;
    this.tokens = this.usage?.completion_tokens ?? this.tokens;
    this.node.tokens = this.tokens;
    this.node.perSecond = this.timings?.predicted_per_second ?? this.speed();
    this.node.firstToken = (this.first - this.sent) / 1000;
    this.node.promptTokens = this.usage?.prompt_tokens;
  }
}

/** Return {text, action} for an error: what it means for who reads it, and what helps. */
export function explain(error) {
  const text = error.message;
  if (error.status === 401 || error.status === 403)
    return {
      text: "This server wants a key. Ask whoever runs it, and enter the key here.",
      action: "key",
    };
  if (/context/.test(error.code ?? ""))
    return {
      text:
        `The conversation is longer than what the model can hold at once: ${text} ` +
        "Begin a conversation, shorten the system prompt, or edit an earlier message.",
      action: "new",
    };
  if (error.status === 429)
    return { text: "The server is still busy after several tries.", action: "retry" };
  if (error.status === 0) return { text: `${text} Is it still running?`, action: "retry" };
  return { text: `${text} (${error.status})`, action: "retry" };
}
