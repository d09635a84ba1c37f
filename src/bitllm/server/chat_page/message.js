// One message on the page: its text, what can be done with it, and how fast it came.

import { button, copyButton, element } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { versions } from "./conversations.js";

const ENDS = {
  stopped: "Stopped.",
  length: "Ended at the limit of tokens: “Longest answer” in the settings, or the model's context.",
  broken: "The connection broke off here.",
};

/**
 * Return the element of a message.
 *
 * @param {object} conversation what it belongs to.
 * @param {object} node the message.
 * @param {object} actions edit(node), regenerate(node), show(node).
 */
export function messageElement(conversation, node, actions) {
  const body = element("div", { class: "body", dir: "auto" });
  const foot = element("div", { class: "foot" });
  const who = node.role === "user" ? "You" : "Model";
  const made = element(
    "article",
    { class: `message ${node.role}`, "aria-label": who, "data-id": node.id },
    element("h2", { class: "who" }, who),
    body,
    foot,
  );
  updateMessage(made, conversation, node, actions, false);
  return made;
}

/** Show what a message holds now; `running` while it is being written. */
export function updateMessage(made, conversation, node, actions, running) {
  const [body, foot] = [made.querySelector(".body"), made.querySelector(".foot")];
  made.classList.toggle("running", running);
  if (node.role === "user") body.textContent = node.content;
  else showMarkdown(body, node.content, running);
  if (running) return;
  const end =
    ENDS[node.end] ?? (node.content ? null : "The model ended its answer without a word.");
  foot.replaceChildren(
    ...(end ? [element("p", { class: "end" }, end)] : []),
    ...switcher(conversation, node, actions),
    copyButton(() => node.content, "Copy this message"),
    node.role === "user"
      ? button("Edit", () => actions.edit(node), "Edit this message")
      : button("Regenerate", () => actions.regenerate(node), "Write this answer again"),
    element("span", { class: "stats" }, statsText(node)),
  );
}

function switcher(conversation, node, actions) {
  const all = versions(conversation, node);
  if (all.length < 2) return [];
  const at = all.indexOf(node);
  const step = (by, label, hint) => {
    const made = button(label, () => actions.show(all[at + by]), hint);
    made.disabled = !all[at + by];
    return made;
  };
  return [
    element(
      "span",
      { class: "versions" },
      step(-1, "‹", "Earlier version"),
      element("span", {}, `${at + 1} of ${all.length}`),
      step(1, "›", "Later version"),
    ),
  ];
}

/** Return the figures of an answer, as far as they are known. */
export function statsText({ tokens, perSecond, firstToken, promptTokens }) {
  const parts = [];
  if (tokens !== undefined) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (perSecond !== undefined) parts.push(`${perSecond.toFixed(perSecond < 100 ? 1 : 0)} tok/s`);
  if (firstToken !== undefined) parts.push(`first in ${firstToken.toFixed(2)} s`);
  if (promptTokens !== undefined) parts.push(`prompt of ${promptTokens}`);
  return parts.join(" · ");
}

/** Return the element in which a sent message is edited; `done(text)` gets null to leave it. */
export function editorElement(text, done) {
  const field = element("textarea", {
    "aria-label": "Edit the message",
    rows: Math.min(12, text.split("\n").length + 1),
  });
  field.value = text;
  const send = () => field.value.trim() && done(field.value.trim());
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") done(null);
    else if (event.key === "Enter" && !event.shiftKey) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return element(
    "div",
    { class: "editor" },
    field,
    element(
      "div",
      { class: "foot" },
      button("Send", send),
      button("Cancel", () => done(null)),
    ),
  );
}
