// The list of conversations: choose, rename, delete.

import { button, byId, element } from "./dom.js";

/**
 * Show the list.
 *
 * @param {object[]} conversations latest first.
 * @param {object} current the one on show.
 * @param {function(object): boolean} isRunning whether an answer is on its way.
 * @param {object} actions open(conversation), rename(conversation, title), remove(conversation).
 */
export function showList(conversations, current, isRunning, actions) {
  byId("conversations").replaceChildren(
    ...conversations.map((conversation) => {
      const here = conversation === current;
      const open = element(
        "button",
        {
          type: "button",
          class: "open",
          "aria-current": here ? "page" : null,
          click: () => actions.open(conversation),
        },
        conversation.title || "New conversation",
      );
      const item = element("li", { class: isRunning(conversation) ? "running" : null }, open);
      if (here && conversation.nodes.length) item.append(tools(item, conversation, actions));
      return item;
    }),
  );
}

function tools(item, conversation, actions) {
  return element(
    "div",
    { class: "foot" },
    button("Rename", () => rename(item, conversation, actions), "Rename this conversation"),
    button("Delete", () => confirmDelete(conversation, actions), "Delete this conversation"),
  );
}

function rename(item, conversation, actions) {
  const field = element("input", { type: "text", "aria-label": "Title", maxlength: 200 });
  field.value = conversation.title;
  let left = false;
  const leave = (title) => {
    if (left) return;
    left = true;
    actions.rename(conversation, title.trim() || conversation.title);
  };
  field.addEventListener("blur", () => leave(field.value));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") leave(field.value);
    if (event.key === "Escape") leave(conversation.title);
    event.stopPropagation();
  });
  item.replaceChildren(field);
  field.select();
}

function confirmDelete(conversation, actions) {
  const dialog = byId("delete-dialog");
  byId("delete-name").textContent = conversation.title;
  dialog.returnValue = "";
  dialog.addEventListener(
    "close",
    () => dialog.returnValue === "delete" && actions.remove(conversation),
    { once: true },
  );
  dialog.showModal();
}

/** Open or close the drawer that the list is on a narrow screen. */
export function toggleDrawer(open) {
  document.body.classList.toggle("drawer", open);
  byId("menu").setAttribute("aria-expanded", open);
  byId("shade").hidden = !open;
  if (open) byId("new").focus();
}
