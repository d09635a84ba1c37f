// Building elements. Text becomes text nodes only: nothing in this page parses a string as HTML.

/**
 * Return an element.
 *
 * @param {string} tag name of the element.
 * @param {Object<string, *>} [attributes] a function is a listener of the event of that name;
 *     undefined, null and false leave the attribute out.
 * @param {...(Node|string|Array)} children nodes, text, or arrays of these; long lists as arrays:
 *     too many arguments overflow the stack.
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== undefined && value !== null && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) made.append(child);
  return made;
}

/** Return a button with a visible label; `hint` is read to those who cannot see its place. */
export function button(label, click, hint) {
  return element("button", { type: "button", class: "quiet", "aria-label": hint, click }, label);
}

/** Return the element with this id; the ids stand in index.html. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Put a text on the clipboard, also where the page is served without TLS and browsers offer no
 * clipboard object. Return whether that worked.
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const holder = element("textarea", { class: "unseen", readonly: true });
    const focused = document.activeElement;
    holder.value = text;
    document.body.append(holder);
    holder.select();
    const copied = document.execCommand("copy");
    holder.remove();
    focused?.focus();
    return copied;
  }
}

/** Return a button that copies what `read` returns, and says for a moment that it did. */
export function copyButton(read, hint) {
  const made = button(
    "Copy",
    async () => {
      made.textContent = (await copyText(read())) ? "Copied" : "Not copied";
      setTimeout(() => (made.textContent = "Copy"), 1500);
    },
    hint,
  );
  return made;
}
