// Conversations as trees of messages: editing and regenerating add a branch, nothing is lost.
//
// A conversation holds `nodes` {id, parent, role, content, ...}, in the order of their making, and
// `leaf`, the id of the last message shown; the thread is the way from the leaf to the root.

export const ROLES = ["user", "assistant"];
const FORMAT = "bitllm-chat";
const STATS = ["promptTokens", "tokens", "perSecond", "firstToken"];

export function makeConversation({ system = "", sampling = {}, model = "" } = {}) {
  const now = Date.now();
  return {
    id: crypto.randomUUID?.() ?? randomId(),
    title: "",
    created: now,
    updated: now,
    system,
    sampling: { ...sampling },
    model,
    nodes: [],
    leaf: null,
  };
}

/** Pages without TLS have no randomUUID. */
function randomId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("-");
}

/** Add a message below `parent` and show it; return its node. */
export function addMessage(conversation, parent, role, content) {
  const last = conversation.nodes.at(-1)?.id ?? 0;
  const node = { id: last + 1, parent, role, content };
  conversation.nodes.push(node);
  conversation.leaf = node.id;
  if (!conversation.title && role === "user") conversation.title = titleOf(content);
  return node;
}

export function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

/** Take a message without content out again, such as an answer that never came. */
export function removeLeaf(conversation, node) {
  conversation.nodes = conversation.nodes.filter((other) => other !== node);
  if (conversation.leaf === node.id) conversation.leaf = node.parent;
}

/** Return the nodes that are shown, from the first message on. */
export function thread(conversation) {
  const byId = new Map(conversation.nodes.map((node) => [node.id, node]));
  const shown = [];
  for (let node = byId.get(conversation.leaf); node; node = byId.get(node.parent)) shown.push(node);
  return shown.reverse();
}

/** Return the versions of a message, itself among them. */
export function versions(conversation, node) {
  return conversation.nodes.filter(
    (other) => other.parent === node.parent && other.role === node.role,
  );
}

/** Show another version, with what was written last below it. */
export function showVersion(conversation, node) {
  const below = new Set([node.id]);
  conversation.leaf = node.id;
  for (const other of conversation.nodes) {
    if (!below.has(other.parent)) continue;
    below.add(other.id);
    conversation.leaf = other.id;
  }
}

/** Return the messages to send for an answer below `node`. */
export function messagesUpTo(conversation, node) {
  const path = thread({ nodes: conversation.nodes, leaf: node.id }).filter((each) => each.content);
  const messages = path.map(({ role, content }) => ({ role, content }));
  return conversation.system
    ? [{ role: "system", content: conversation.system }, ...messages]
    : messages;
}

// --- files --------------------------------------------------------------------------------------

/** Return conversations as the text of a file. */
export function exportText(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/**
 * Return the conversations of a file, of known fields only.
 *
 * @throws {Error} the text is no such file; the message says why.
 */
export function importText(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("this is no JSON file");
  }
  if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.conversations))
    throw new Error("this is no file of conversations exported here");
  return file.conversations.map(checked);
}

/** Return a clean copy of a conversation from outside. */
export function checked(given) {
  const nodes = Array.isArray(given?.nodes) ? given.nodes.map(checkedNode) : null;
  if (typeof given?.id !== "string" || !given.id || given.id.length > 100 || !nodes)
    throw new Error("a conversation in it is damaged");
  const ids = new Set();
  let last = 0;
  for (const node of nodes) {
    // Parents come first, and ids rise: so there is no circle.
    const known = node.parent === null || ids.has(node.parent);
    if (!known || ids.has(node.id) || node.id <= last)
      throw new Error("the messages of a conversation in it are out of order");
    ids.add(node.id);
    last = node.id;
  }
  const text = (value) => (typeof value === "string" ? value : "");
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  const sampling = Object.entries(given.sampling ?? {}).filter(([, value]) =>
    Number.isFinite(value),
  );
  return {
    id: given.id,
    title: text(given.title),
    created: time(given.created),
    updated: time(given.updated),
    system: text(given.system),
    sampling: Object.fromEntries(sampling),
    model: text(given.model),
    nodes,
    leaf: ids.has(given.leaf) ? given.leaf : (nodes.at(-1)?.id ?? null),
  };
}

function checkedNode(given) {
  const { id, parent, role, content } = given ?? {};
  if (
    !Number.isInteger(id) ||
    !(parent === null || Number.isInteger(parent)) ||
    !ROLES.includes(role) ||
    typeof content !== "string"
  )
    throw new Error("a message in it is damaged");
  const node = { id, parent, role, content };
  for (const name of STATS) if (Number.isFinite(given[name])) node[name] = given[name];
  for (const name of ["end", "model"])
    if (typeof given[name] === "string") node[name] = given[name];
  return node;
}
