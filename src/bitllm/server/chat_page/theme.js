// Dark or light, before the first paint: a plain script in the head, so that nothing flashes.
{
  const names = ["auto", "light", "dark"];
  const root = document.documentElement;
  let kept = null;
  try {
    kept = localStorage.getItem("bitllm.theme");
  } catch {
    // No storage, no memory: the system's choice it is.
  }
  root.dataset.theme = names.includes(kept) ? kept : "auto";

  window.nextTheme = () => {
    const next = names[(names.indexOf(root.dataset.theme) + 1) % names.length];
    root.dataset.theme = next;
    try {
      localStorage.setItem("bitllm.theme", next);
    } catch {
      // Holds until the page is left.
    }
    return next;
  };
}
