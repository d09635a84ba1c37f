// Markdown as nodes: headings, paragraphs, lists, quotes, tables, rules and fenced code.
//
// A text is cut into top-level blocks first. While an answer is written, blocks that did not change
// keep their elements: selections stay, and the work a frame is that of the last block.

import { copyButton, element } from "./dom.js";
import { inlineNodes } from "./inline.js";

const DEEPEST = 12;
const LONGEST = 400_000;
const MOST_COLUMNS = 100;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*)|)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|)$/;
const QUOTE = /^ {0,3}> ?/;
const sources = new WeakMap();

/**
 * Show a Markdown text in an element, keeping the children that are still right.
 *
 * @param {Element} target what only this function writes to.
 * @param {string} text Markdown, from anywhere.
 * @param {boolean} partial the text still grows.
 */
export function showMarkdown(target, text, partial = false) {
  const blocks = cut(text);
  const shown = sources.get(target) ?? [];
  let same = 0;
  while (same < shown.length && same < blocks.length && shown[same] === blocks[same].key) same += 1;
  // The last block was perhaps shown with its delimiters open, and has to be shown again.
  if (same === blocks.length && same > 0) same -= 1;
  while (target.childNodes.length > same) target.lastChild.remove();
  blocks.slice(same).forEach((block, index) => {
    target.append(node(block, partial && same + index === blocks.length - 1, 0));
  });
  sources.set(
    target,
    blocks.map((block) => block.key),
  );
}

function cut(text) {
  if (text.length > LONGEST) return [{ kind: "plain", text, key: text }];
  return parse(text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"));
}

/** Return the blocks of these lines, each with its own text as `key`. */
function parse(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at);
    block.key = `${block.kind}\n${lines.slice(at, next).join("\n")}`;
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading)
    return [
      { kind: "heading", level: heading[1].length, text: withoutClosing(heading[2] ?? "") },
      at + 1,
    ];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) return quote(lines, at);
  if (ITEM.test(line)) return list(lines, at);
  return table(lines, at) ?? paragraph(lines, at);
}

/** `# Title ##` is `# Title`; by hand, since a pattern for it can take quadratic time. */
function withoutClosing(text) {
  const trimmed = text.trim();
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end -= 1;
  return end === 0 || trimmed[end - 1] === " " ? trimmed.slice(0, end).trimEnd() : trimmed;
}

function beginsBlock(line) {
  return (
    FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line)
  );
}

/** A fence that is not closed goes on to the end: the answer may still be on its way. */
function fenced(lines, at, [, fence, info]) {
  const indent = lines[at].search(/\S/);
  const code = [];
  let next = at + 1;
  for (; next < lines.length; next += 1) {
    const mark = lines[next].trim();
    if (mark.startsWith(fence) && mark === fence[0].repeat(mark.length)) break;
    code.push(indent ? lines[next].replace(new RegExp(`^ {1,${indent}}`), "") : lines[next]);
  }
  return [
    { kind: "code", language: info.trim().split(/\s/)[0], text: code.join("\n") },
    Math.min(next + 1, lines.length),
  ];
}

function quote(lines, at) {
  const inner = [];
  let next = at;
  for (; next < lines.length && lines[next].trim(); next += 1) {
    if (!QUOTE.test(lines[next]) && beginsBlock(lines[next])) break;
    inner.push(lines[next].replace(QUOTE, ""));
  }
  return [{ kind: "quote", lines: inner }, next];
}

/** Items of one list have the same kind of marker; what is indented below one belongs to it. */
function list(lines, at) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const found = ITEM.exec(lines[next]);
    if (!found || /\d/.test(found[2]) !== ordered || RULE.test(lines[next])) break;
    const inner = [found[4] ?? ""];
    next = itemEnd(lines, next + 1, found, inner);
    items.push(inner);
    const after = skipBlank(lines, next);
    if (ITEM.test(lines[after] ?? "")) next = after;
  }
  return [{ kind: "list", ordered, start: parseInt(first[2], 10), items }, next];
}

function itemEnd(lines, at, [, before, marker], inner) {
  const width = before.length + marker.length + 1;
  let next = at;
  while (next < lines.length) {
    const line = lines[next];
    if (!line.trim()) {
      const after = skipBlank(lines, next);
      if (after === lines.length || indentOf(lines[after]) < 2 + before.length) break;
      for (; next < after; next += 1) inner.push(lines[next]);
    } else if (indentOf(line) >= 2 + before.length) {
      inner.push(line.slice(Math.min(indentOf(line), width)));
      next += 1;
    } else if (!beginsBlock(line) && inner.at(-1).trim()) {
      inner.push(line.trim());
      next += 1;
    } else break;
  }
  return next;
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function skipBlank(lines, at) {
  while (at < lines.length && !lines[at].trim()) at += 1;
  return at;
}

function table(lines, at) {
  if (!lines[at].includes("|") || !(lines[at + 1] ?? "").includes("-")) return null;
  const head = cells(lines[at]);
  const marks = cells(lines[at + 1]);
  if (
    head.length > MOST_COLUMNS ||
    head.length !== marks.length ||
    !marks.every((mark) => /^:?-+:?$/.test(mark))
  )
    return null;
  const align = marks.map((mark) =>
    mark.endsWith(":") ? (mark.startsWith(":") ? "centre" : "end") : null,
  );
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next += 1) rows.push(cells(lines[next]));
  return [{ kind: "table", head, align, rows }, next];
}

function cells(line) {
  const found = [""];
  for (let at = 0; at < line.length; at += 1) {
    if (line[at] === "\\" && line[at + 1] === "|") found[found.length - 1] += line[++at];
    else if (line[at] === "|") found.push("");
    else found[found.length - 1] += line[at];
  }
  if (!found[0].trim()) found.shift();
  if (found.length > 1 && !found.at(-1).trim()) found.pop();
  return found.map((cell) => cell.trim());
}

function paragraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !beginsBlock(lines[next])) next += 1;
  const text = lines
    .slice(at, next)
    .map((line) => line.trimStart())
    .join("\n");
  return [{ kind: "paragraph", text }, next];
}

// --- from blocks to nodes ------------------------------------------------------------------------

function node(block, partial, depth) {
  switch (block.kind) {
    case "plain":
      return element("pre", { class: "plain" }, block.text);
    case "heading":
      return element(
        `h${Math.min(block.level + 2, 6)}`,
        { class: `level-${block.level}` },
        inlineNodes(block.text, partial),
      );
    case "rule":
      return element("hr");
    case "code":
      return codeNode(block);
    case "quote":
      return element("blockquote", {}, nested(block.lines, partial, depth));
    case "list":
      return listNode(block, partial, depth);
    case "table":
      return tableNode(block, partial);
    default:
      return element("p", {}, inlineNodes(block.text, partial));
  }
}

function nested(lines, partial, depth) {
  if (depth >= DEEPEST) return [document.createTextNode(lines.join("\n"))];
  const blocks = parse(lines);
  return blocks.map((block, index) =>
    node(block, partial && index === blocks.length - 1, depth + 1),
  );
}

function codeNode({ language, text }) {
  const bar = element(
    "div",
    { class: "code-bar" },
    element("span", {}, language || "text"),
    copyButton(() => text, "Copy this code"),
  );
  return element(
    "div",
    { class: "code" },
    bar,
    element("pre", { tabindex: "0" }, element("code", {}, text)),
  );
}

function listNode({ ordered, start, items }, partial, depth) {
  const made = element(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {});
  items.forEach((lines, index) => {
    const ticked = lines.with(0, lines[0].replace(/^\[ \] /, "☐ ").replace(/^\[[xX]\] /, "☑ "));
    const children = nested(ticked, partial && index === items.length - 1, depth);
    // A tight item is a line, not a paragraph.
    if (children[0]?.nodeName === "P") children[0].className = "tight";
    made.append(element("li", {}, children));
  });
  return made;
}

function tableNode({ head, align, rows }, partial) {
  const row = (tag, values, open) =>
    element(
      "tr",
      {},
      values
        .slice(0, head.length)
        .map((value, column) => element(tag, { class: align[column] }, inlineNodes(value, open))),
    );
  const body = rows.map((values, index) => row("td", values, partial && index === rows.length - 1));
  const made = element(
    "table",
    {},
    element("thead", {}, row("th", head, false)),
    element("tbody", {}, body),
  );
  return element("div", { class: "table", tabindex: "0" }, made);
}
