// The page: what is on show, what is being written, and which action leads from one to the other.

import { Answer, explain } from "./answer.js";
import * as tree from "./conversations.js";
import { button, byId, element } from "./dom.js";
import { editorElement, messageElement, statsText, updateMessage } from "./message.js";
import { listenToKeys } from "./keys.js";
import { Follower } from "./scroll.js";
import { buildSettings, countSettings, readSettings, showSettings } from "./settings.js";
import { showList, toggleDrawer } from "./sidebar.js";
import * as storage from "./storage.js";
import { checkHealth, listModels } from "./stream.js";

const SAVE_EVERY = 1000;
const LARGEST_IMPORT = 50_000_000;

let [conversations, unreadable] = storage.loadConversations();
let current = tree.makeConversation(storage.loadDefaults());
let key = storage.loadKey();
let frame = 0;
const running = new Map(); // conversation id -> Answer
const failures = new Map(); // conversation id -> {error, node}
const follower = new Follower(byId("scroller"), byId("latest"));
const prompt = byId("prompt");

// --- showing -------------------------------------------------------------------------------------

const messageActions = {
  edit,
  regenerate,
  show: (node) => change(() => tree.showVersion(current, node)),
};
const listActions = {
  open,
  remove,
  rename: (conversation, title) => {
    conversation.title = title;
    keep(conversation);
    showAround();
  },
};

function show() {
  const nodes = tree.thread(current);
  byId("messages").replaceChildren(...(nodes.length ? nodes.map(shownMessage) : [greeting()]));
  const failure = failures.get(current.id);
  if (failure) byId("messages").append(failureElement(failure));
  showAround();
  follower.grown();
}

function shownMessage(node) {
  const made = messageElement(current, node, messageActions);
  if (running.get(current.id)?.node === node)
    updateMessage(made, current, node, messageActions, true);
  return made;
}

/** Everything but the messages: title, list, composer, figures. */
function showAround() {
  const answer = running.get(current.id);
  byId("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} · bitllm` : "bitllm";
  showList(conversations, current, (conversation) => running.has(conversation.id), listActions);
  byId("send").textContent = answer ? "Stop" : "Send";
  byId("send").classList.toggle("stop", Boolean(answer));
  const count = countSettings(current);
  byId("settings-count").textContent = count ? ` · ${count}` : "";
  const select = byId("model");
  if (current.model && [...select.options].some((option) => option.value === current.model))
    select.value = current.model;
  showLive();
}

function showLive() {
  const answer = running.get(current.id);
  const live = byId("live");
  if (!answer) live.textContent = "";
  else if (answer.waiting !== null)
    live.textContent = `The server is busy; trying again in ${answer.waiting} s`;
  else if (!answer.tokens) live.textContent = "Reading …";
  else live.textContent = statsText({ tokens: answer.tokens, perSecond: answer.speed() });
}

function showProgress() {
  frame = 0;
  const answer = running.get(current.id);
  const made = answer && byId("messages").querySelector(`[data-id="${answer.node.id}"]`);
  if (made) updateMessage(made, current, answer.node, messageActions, true);
  showLive();
  follower.grown();
}

function greeting() {
  return element(
    "div",
    { class: "greeting" },
    element(
      "p",
      { class: "trits large", "aria-hidden": "true" },
      element("i", {}, "−"),
      element("i", {}, "0"),
      element("i", {}, "+"),
    ),
    element("h2", {}, "What is on your mind?"),
    element(
      "p",
      {},
      "Three weights are enough: −1, 0 and +1. Answers come from your own server; " +
        "conversations stay in this browser.",
    ),
  );
}

function failureElement({ error, node }) {
  const { text, action } = explain(error);
  const retry = button("Try again", () => answerTo(node));
  const helps = {
    retry,
    key: button("Enter key", openKey),
    new: button("New conversation", openNew),
  }[action];
  return element(
    "div",
    { class: "failure", role: "alert" },
    element("p", {}, text),
    helps,
    ...(action === "key" ? [retry] : []),
  );
}

function notice(text, ...actions) {
  const box = byId("notice");
  box.hidden = !text;
  box.replaceChildren(element("p", {}, text ?? ""), ...actions);
  if (text) box.append(button("Dismiss", () => notice(null)));
}

function announce(text) {
  byId("announcer").textContent = text.length > 1000 ? `${text.slice(0, 1000)} …` : text;
}

// --- conversations -------------------------------------------------------------------------------

function keep(conversation) {
  if (!conversation.nodes.length) return;
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  const problem = storage.saveConversation(conversation);
  if (problem) notice(problem, button("Export", exportAll));
}

function change(edit) {
  edit();
  keep(current);
  show();
}

function open(conversation) {
  current = conversation;
  toggleDrawer(false);
  show();
  follower.toEnd();
  prompt.focus();
}

function openNew() {
  open(tree.makeConversation(storage.loadDefaults()));
}

function remove(conversation) {
  running.get(conversation.id)?.stop();
  failures.delete(conversation.id);
  storage.forgetConversation(conversation.id);
  conversations = conversations.filter((other) => other !== conversation);
  open(conversations[0] ?? tree.makeConversation(storage.loadDefaults()));
}

function step(by) {
  const at = conversations.indexOf(current) + by;
  if (conversations[at]) open(conversations[at]);
}

function exportAll() {
  const address = URL.createObjectURL(
    new Blob([tree.exportText(conversations)], { type: "application/json" }),
  );
  const link = element("a", {
    href: address,
    download: `bitllm-conversations-${new Date().toISOString().slice(0, 10)}.json`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

async function importFile(file) {
  try {
    if (file.size > LARGEST_IMPORT) throw new Error("it is larger than 50 MB");
    const given = tree.importText(await file.text());
    const known = new Set(conversations.map((conversation) => conversation.id));
    const added = given.filter(
      (conversation) => conversation.nodes.length && !known.has(conversation.id),
    );
    conversations = [...added, ...conversations].sort((a, b) => b.updated - a.updated);
    notice(`${added.length} of ${given.length} conversations added; the others are here already.`);
    added.forEach(keep);
    show();
  } catch (error) {
    notice(`${file.name} was not imported: ${error.message}.`);
  }
}

// --- asking and answering ------------------------------------------------------------------------

function submit() {
  const answer = running.get(current.id);
  const text = prompt.value.trim();
  if (answer) return answer.stop();
  if (!text) return;
  prompt.value = "";
  fitPrompt();
  answerTo(tree.addMessage(current, current.leaf, "user", text));
}

/** Let the model answer a message of the user; in the conversation on show. */
async function answerTo(asked) {
  if (running.has(current.id)) return;
  const conversation = current;
  const request = {
    model: conversation.model || byId("model").value,
    messages: tree.messagesUpTo(conversation, asked),
    ...conversation.sampling,
  };
  const node = tree.addMessage(conversation, asked.id, "assistant", "");
  const answer = new Answer(
    node,
    request,
    () => key,
    () => progressed(conversation),
  );
  failures.delete(conversation.id);
  running.set(conversation.id, answer);
  conversation.updated = Date.now();
  conversations = [conversation, ...conversations.filter((other) => other !== conversation)];
  keep(conversation);
  show();
  follower.toEnd();
  announce("The answer is on its way.");
  const error = await answer.run();
  finish(conversation, asked, node, error);
}

function finish(conversation, asked, node, error) {
  running.delete(conversation.id);
  if (error) failures.set(conversation.id, { error, node: asked });
  if (!node.content && (error || node.end === "stopped")) tree.removeLeaf(conversation, node);
  if (conversations.includes(conversation)) keep(conversation);
  if (conversation !== current) return showAround();
  show();
  announce(error ? "" : node.content || "Stopped.");
}

let savedAt = 0;
function progressed(conversation) {
  if (performance.now() - savedAt > SAVE_EVERY) {
    savedAt = performance.now();
    keep(conversation);
  }
  if (conversation === current && !frame) frame = requestAnimationFrame(showProgress);
}

function regenerate(node) {
  const asked = current.nodes.find((other) => other.id === node.parent);
  if (asked) answerTo(asked);
}

function regenerateLast() {
  const last = tree.thread(current).at(-1);
  if (last?.role === "assistant") regenerate(last);
  else if (last) answerTo(last);
}

function edit(node) {
  if (running.has(current.id)) return;
  const made = byId("messages").querySelector(`[data-id="${node.id}"]`);
  const editor = editorElement(node.content, (text) => {
    if (text === null) return (show(), prompt.focus());
    answerTo(tree.addMessage(current, node.parent, "user", text));
    prompt.focus();
  });
  made.querySelector(".body").replaceChildren(editor);
  made.querySelector(":scope > .foot").replaceChildren();
  editor.querySelector("textarea").focus();
}

function editLast() {
  const last = tree.thread(current).findLast((node) => node.role === "user");
  if (last) edit(last);
}

// --- settings and server -------------------------------------------------------------------------

function openSettings() {
  showSettings(current);
  byId("key").value = key;
  byId("settings-dialog").showModal();
}

function openKey() {
  openSettings();
  byId("key").focus();
}

function settingsChanged() {
  Object.assign(current, readSettings());
  storage.saveDefaults(current);
  keep(current);
  showAround();
}

function keyChanged() {
  key = byId("key").value.trim();
  storage.saveKey(key);
  connect();
}

/** Fill the list of models; while the server loads one, ask again. */
async function connect() {
  try {
    await checkHealth();
    const names = await listModels(key);
    const select = byId("model");
    select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    select.disabled = names.length < 2;
    notice(
      unreadable
        ? `${unreadable} kept conversations cannot be read; they are left as they are.`
        : null,
    );
    showAround();
  } catch (error) {
    if (error.status === 503) {
      notice("The model is being loaded …");
      setTimeout(connect, 2000);
    } else if (error.status === 401 || error.status === 403) {
      notice(explain(error).text, button("Enter key", openKey));
    } else {
      notice(`${error.message} Is it running?`, button("Try again", connect));
    }
  }
}

// --- wiring --------------------------------------------------------------------------------------

/** As high as its text, up to a third of the window. */
function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, innerHeight / 3)}px`;
}

function showTheme() {
  const name = document.documentElement.dataset.theme;
  byId("theme").textContent = `${name[0].toUpperCase()}${name.slice(1)} theme`;
}

function wire() {
  const clicks = {
    new: openNew,
    settings: openSettings,
    export: exportAll,
    theme: () => (window.nextTheme(), showTheme()),
    menu: () => toggleDrawer(!document.body.classList.contains("drawer")),
    shade: () => toggleDrawer(false),
    shortcuts: () => byId("shortcuts-dialog").showModal(),
    import: () => byId("import-file").click(),
  };
  for (const [id, act] of Object.entries(clicks)) byId(id).addEventListener("click", act);
  byId("composer").addEventListener("submit", (event) => (event.preventDefault(), submit()));
  prompt.addEventListener("input", fitPrompt);
  byId("key").addEventListener("change", keyChanged);
  byId("model").addEventListener("change", () => {
    current.model = byId("model").value;
    settingsChanged();
  });
  byId("import-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) importFile(file);
  });
  showTheme();
  addEventListener("storage", otherTabWrote);
  addEventListener(
    "pagehide",
    () => running.size && conversations.filter((c) => running.has(c.id)).forEach(keep),
  );
}

/** Another tab changed something: take it over, but for what is being written here. */
function otherTabWrote(event) {
  if (!storage.concernsConversations(event) || running.size || document.querySelector(".editor"))
    return;
  [conversations, unreadable] = storage.loadConversations();
  current = conversations.find((conversation) => conversation.id === current.id) ?? current;
  show();
}

buildSettings(settingsChanged);
wire();
listenToKeys(prompt, {
  submit,
  editLast,
  regenerateLast,
  openNew,
  openSettings,
  step,
  isRunning: () => running.has(current.id),
  stop: () => running.get(current.id)?.stop(),
  closeDrawer: () => toggleDrawer(false),
  shortcuts: () => byId("shortcuts-dialog").showModal(),
});
if (conversations.length) current = conversations[0];
show();
follower.toEnd();
connect();
