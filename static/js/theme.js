// The colour theme, chosen before the first paint. A classic script in <head>, so that no page flashes in the wrong theme.
// Knows nothing of the rest; `js/shell.js` calls `loradTheme.set`.
(() => {
  const KEY = "lorad.theme";
  const stored = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage may be blocked; the system's choice then rules
    }
  };
  const apply = (choice) => {
    if (choice === "light" || choice === "dark") document.documentElement.dataset.theme = choice;
    else delete document.documentElement.dataset.theme;
    window.dispatchEvent(new Event("lorad:theme"));
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  window.loradTheme = {
    /** "light" or "dark": what is shown now. */
    current: () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light"),
    /** Stores and shows a choice. */
    set(choice) {
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // shown for this page only
      }
      apply(choice);
    },
  };
  dark.addEventListener("change", () => window.dispatchEvent(new Event("lorad:theme")));
  apply(stored());
})();
