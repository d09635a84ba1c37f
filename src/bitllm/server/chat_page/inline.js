// Markdown within a line: code, emphasis, links. Returns nodes; never HTML.
//
// One pass from left to right. Where a delimiter finds no partner, that is remembered, so a text
// full of lonely asterisks takes linear time; nesting deeper than DEEPEST stays as it is written.

import { element } from "./dom.js";

const DEEPEST = 8;
const LONGEST_LINK = 2048;
const EMPHASIS = [
  ["***", "em", "strong"],
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const BARE_URL = /https?:\/\/[^\s<>"`]{1,2048}/y;
const ANGLE_URL = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2048})>/y;
const WORD = /[\p{L}\p{N}]/u;

/**
 * Return the nodes of a text.
 *
 * @param {string} text Markdown without block structure.
 * @param {boolean} partial the text still grows: an open delimiter is taken to be closed at the
 *     end, so that words do not change their look twice.
 */
export function inlineNodes(text, partial = false, depth = 0) {
  if (depth > DEEPEST) return [document.createTextNode(text)];
  return new Scanner(text, partial, depth).run();
}

/** Return the address if a link may lead there, else null: http, https and mailto only. */
export function safeAddress(address) {
  const trimmed = address.trim();
  if (!/^(https?:\/\/|mailto:)/i.test(trimmed) || !URL.canParse(trimmed)) return null;
  return new URL(trimmed).href;
}

function link(address, children) {
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, children);
}

class Scanner {
  constructor(text, partial, depth) {
    Object.assign(this, { text, partial, depth, at: 0, plain: "", nodes: [] });
    this.lonely = new Set();
  }

  run() {
    while (this.at < this.text.length) {
      SPECIAL.lastIndex = this.at;
      const found = SPECIAL.exec(this.text);
      const end = found ? found.index : this.text.length;
      this.plain += this.text.slice(this.at, end);
      this.at = end;
      if (found && !this.special(found[0])) this.plain += this.text[this.at++];
    }
    this.flush();
    return this.nodes;
  }

  special(sign) {
    if (sign === "\\") return this.escape();
    if (sign === "`") return this.code();
    if (sign === "\n") return this.lineBreak();
    if (sign === "[" || sign === "!") return this.bracketed(sign === "!" ? 1 : 0);
    if (sign === "<" || sign.length > 1) return this.bareLink(sign);
    return this.emphasis();
  }

  flush() {
    if (this.plain) this.nodes.push(document.createTextNode(this.plain));
    this.plain = "";
  }

  push(node, next) {
    this.flush();
    this.nodes.push(node);
    this.at = next;
    return true;
  }

  inner(text, partial = false) {
    return inlineNodes(text, partial, this.depth + 1);
  }

  escape() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "\n") return this.push(element("br"), this.at + 2);
    if (!ESCAPABLE.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  lineBreak() {
    const hard = this.plain.endsWith("  ");
    this.plain = this.plain.trimEnd();
    this.flush();
    return hard ? this.push(element("br"), this.at + 1) : false;
  }

  code() {
    const fence = /`+/y;
    fence.lastIndex = this.at;
    const ticks = fence.exec(this.text)[0];
    const start = this.at + ticks.length;
    let end = this.closingTicks(ticks, start);
    if (end < 0) {
      if (!this.partial || start === this.text.length) {
        this.plain += ticks;
        this.at = start;
        return true;
      }
      end = this.text.length;
    }
    let body = this.text.slice(start, end).replaceAll("\n", " ");
    if (/^ .*[^ ].* $/.test(body)) body = body.slice(1, -1);
    return this.push(element("code", {}, body), end + ticks.length);
  }

  /** Where a run of exactly these ticks begins, or -1. */
  closingTicks(ticks, start) {
    if (this.lonely.has(ticks)) return -1;
    const runs = /`+/g;
    runs.lastIndex = start;
    for (let run; (run = runs.exec(this.text));)
      if (run[0].length === ticks.length) return run.index;
    this.lonely.add(ticks);
    return -1;
  }

  emphasis() {
    for (const [sign, ...tags] of EMPHASIS) {
      if (!this.text.startsWith(sign, this.at) || !this.opens(sign)) continue;
      const start = this.at + sign.length;
      const found = this.closing(sign, start);
      if (found < 0 && !(this.partial && sign.length === 2)) continue;
      const end = found < 0 ? this.text.length : found;
      const children = this.inner(this.text.slice(start, end), found < 0);
      const outer = tags.reduceRight((inside, tag) => [element(tag, {}, inside)], children)[0];
      return this.push(outer, end + sign.length);
    }
    const run = /([*_~])\1*/y;
    run.lastIndex = this.at;
    const signs = run.exec(this.text)[0];
    this.plain += signs;
    this.at += signs.length;
    return true;
  }

  opens(sign) {
    const after = this.text[this.at + sign.length] ?? " ";
    const before = this.text[this.at - 1] ?? " ";
    return !/\s/.test(after) && after !== sign[0] && !(sign[0] === "_" && WORD.test(before));
  }

  /** Where the partner of an opening sign begins, or -1. */
  closing(sign, start) {
    if (this.lonely.has(sign)) return -1;
    for (let end = start; (end = this.text.indexOf(sign, end)) >= 0; end += 1) {
      // In a run of three, the first one closes what is inside.
      if (sign.length === 2 && this.text[end + 2] === sign[0] && this.text[end + 3] !== sign[0])
        end += 1;
      const after = this.text[end + sign.length] ?? " ";
      const part = sign.length === 1 && (after === sign || this.text[end - 1] === sign);
      const inWord = sign[0] === "_" && WORD.test(after);
      if (end > start && !/[\s\\]/.test(this.text[end - 1]) && !part && !inWord) return end;
    }
    this.lonely.add(sign);
    return -1;
  }

  /** `[text](address "title")`; an image becomes a link, since loading it would tell its host. */
  bracketed(skip) {
    if (this.text[this.at + skip] !== "[") return false;
    const start = this.at + skip + 1;
    const window = this.text.slice(start, start + 2 * LONGEST_LINK);
    const end = closingBracket(window);
    const target =
      /^\]\(\s*(?:<([^<>\n]*)>|((?:[^\s()]|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(
        end < 0 ? "" : window.slice(end, end + LONGEST_LINK),
      );
    if (!target) return false;
    const label = window.slice(0, end) || (skip ? "image" : (target[1] ?? target[2]));
    const address = safeAddress(target[1] ?? target[2]);
    const children = this.inner(label);
    const node = address ? link(address, children) : element("span", {}, children);
    return this.push(node, start + end + target[0].length);
  }

  bareLink(sign) {
    const pattern = sign === "<" ? ANGLE_URL : BARE_URL;
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (!found) return false;
    let shown = found[1] ?? found[0];
    if (sign !== "<") {
      shown = shown.replace(/[.,;:!?'*_~]{1,9}$/, "");
      if (shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, -1);
    }
    const address = safeAddress(shown);
    if (!address) return false;
    return this.push(
      link(address, [shown]),
      this.at + (sign === "<" ? found[0].length : shown.length),
    );
  }
}

/** Where the bracket that closes the label stands, or -1; brackets may nest. */
function closingBracket(text) {
  let depth = 0;
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") depth += 1;
    else if (text[at] === "]" && depth-- === 0) return at;
  }
  return -1;
}
