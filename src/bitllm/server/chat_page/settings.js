// The form of system prompt and sampling. An empty field is not sent: the model's default holds.

import { byId, element } from "./dom.js";

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    note: "0 always takes the likeliest token",
    least: 0,
  },
  {
    name: "top_p",
    label: "Top-p",
    note: "tokens that share this much probability",
    least: 0,
    most: 1,
  },
  { name: "top_k", label: "Top-k", note: "so many of the likeliest tokens", least: 0, whole: true },
  {
    name: "min_p",
    label: "Min-p",
    note: "of the likeliest token's probability",
    least: 0,
    most: 1,
  },
  { name: "repetition_penalty", label: "Repetition", note: "penalty; 1 is none", least: 0.01 },
  { name: "max_tokens", label: "Longest answer", note: "tokens", least: 1, whole: true },
  {
    name: "seed",
    label: "Seed",
    note: "same seed, same text",
    least: 0,
    most: 2 ** 53 - 1,
    whole: true,
  },
];

/**
 * Make the fields of sampling.
 *
 * @param {function(): void} changed called when any field holds another valid value.
 */
export function buildSettings(changed) {
  for (const field of FIELDS) {
    const id = `set-${field.name}`;
    const input = element("input", {
      id,
      name: field.name,
      type: "text",
      inputmode: field.whole ? "numeric" : "decimal",
      placeholder: "default",
      autocomplete: "off",
      "aria-describedby": `${id}-note`,
      input: () => mark(field, input) && changed(),
    });
    byId("sampling-fields").append(
      element(
        "div",
        { class: "field" },
        element("label", { for: id }, field.label),
        input,
        element("p", { id: `${id}-note`, class: "note" }, field.note),
      ),
    );
  }
  byId("system-prompt").addEventListener("input", changed);
}

function valueOf(field, text) {
  const value = Number(text.trim().replace(",", "."));
  const whole = !field.whole || Number.isSafeInteger(value);
  const inside = value >= field.least && value <= (field.most ?? 1e9);
  return whole && inside ? value : NaN;
}

/** Show whether a field can be read; return that. */
function mark(field, input) {
  const wrong = input.value.trim() !== "" && Number.isNaN(valueOf(field, input.value));
  const range =
    field.most === undefined ? `from ${field.least}` : `from ${field.least} to ${field.most}`;
  input.setAttribute("aria-invalid", wrong);
  byId(`${input.id}-note`).textContent = wrong
    ? `a ${field.whole ? "whole " : ""}number ${range}`
    : field.note;
  return !wrong;
}

export function showSettings({ system, sampling }) {
  byId("system-prompt").value = system;
  for (const field of FIELDS) {
    const input = byId(`set-${field.name}`);
    input.value = sampling[field.name] ?? "";
    mark(field, input);
  }
}

/** Return {system, sampling} as the form has it; what cannot be read is left out. */
export function readSettings() {
  const given = FIELDS.map((field) => [field, byId(`set-${field.name}`).value])
    .filter(([, text]) => text.trim())
    .map(([field, text]) => [field.name, valueOf(field, text)]);
  const sampling = Object.fromEntries(given.filter(([, value]) => !Number.isNaN(value)));
  return { system: byId("system-prompt").value.trim(), sampling };
}

/** Return how many settings differ from the model's own. */
export function countSettings({ system, sampling }) {
  return Object.keys(sampling).length + (system ? 1 : 0);
}
