// What the browser keeps: one entry a conversation, so that saving one does not rewrite all.

import { checked } from "./conversations.js";

const PREFIX = "bitllm.conversation.";
const DEFAULTS = "bitllm.defaults";
const KEY = "bitllm.key";

/** Return [conversations, latest first; how many entries cannot be read and are left alone]. */
export function loadConversations() {
  const found = [];
  let unreadable = 0;
  for (const name of names()) {
    try {
      found.push(checked(JSON.parse(localStorage.getItem(name))));
    } catch {
      unreadable += 1;
    }
  }
  return [found.sort((a, b) => b.updated - a.updated), unreadable];
}

function names() {
  try {
    return Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  } catch {
    return [];
  }
}

/** Keep a conversation; return null, or why that was not possible. */
export function saveConversation(conversation) {
  return put(PREFIX + conversation.id, conversation);
}

export function forgetConversation(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // Nothing was kept, then.
  }
}

/** Whether a `storage` event of another tab is about a conversation. */
export function concernsConversations(event) {
  return event.key === null || event.key.startsWith(PREFIX);
}

/** What a conversation begins with: as the last one was set. */
export function loadDefaults() {
  try {
    const { system, sampling, model } = checked({
      id: "-",
      nodes: [],
      ...JSON.parse(localStorage.getItem(DEFAULTS)),
    });
    return { system, sampling, model };
  } catch {
    return {};
  }
}

export function saveDefaults({ system, sampling, model }) {
  return put(DEFAULTS, { system, sampling, model });
}

function put(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return null;
  } catch (error) {
    return error.name === "QuotaExceededError"
      ? "The browser's storage is full: what is new here is not kept. " +
          "Export conversations, then delete some."
      : "This browser keeps nothing for this page: conversations last until the tab is closed.";
  }
}

/** The bearer key stays in this tab and ends with it. */
export function loadKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function saveKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Asked for again after a reload.
  }
}
