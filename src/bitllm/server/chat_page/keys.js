// The keyboard: sending from the message box, and shortcuts everywhere else.

/**
 * Listen to the keyboard.
 *
 * @param {HTMLTextAreaElement} prompt the message box.
 * @param {object} act what the keys do, by name.
 */
export function listenToKeys(prompt, act) {
  prompt.addEventListener("keydown", (event) => {
    if (event.isComposing || event.altKey || event.ctrlKey || event.metaKey) return;
    // On a phone, Enter is the only way to a new line.
    const touch = matchMedia("(pointer: coarse)").matches;
    if (event.key === "Enter" && !event.shiftKey && !touch) {
      event.preventDefault();
      if (!act.isRunning()) act.submit();
    } else if (event.key === "ArrowUp" && !prompt.value) {
      event.preventDefault();
      act.editLast();
    }
  });
  addEventListener("keydown", (event) => {
    const done = !document.querySelector("dialog[open]") && shortcut(event, prompt, act);
    if (done) event.preventDefault();
  });
}

function shortcut(event, prompt, act) {
  if (event.isComposing || event.ctrlKey || event.metaKey) return false;
  if (event.key === "Escape") {
    act.closeDrawer();
    act.stop();
    return true;
  }
  if (event.altKey) return altShortcut(event.code, act);
  const typing =
    event.target.matches("input, textarea, select") && (event.target !== prompt || prompt.value);
  if (event.key === "?" && !typing) return (act.shortcuts(), true);
  if (event.key === "/" && !event.target.matches("input, textarea, select"))
    return (prompt.focus(), true);
  return false;
}

/** By the place of the key: with Alt, many layouts give another character. */
function altShortcut(code, act) {
  const actions = {
    KeyN: act.openNew,
    KeyR: act.regenerateLast,
    KeyS: act.openSettings,
    ArrowUp: () => act.step(-1),
    ArrowDown: () => act.step(1),
  };
  actions[code]?.();
  return code in actions;
}
