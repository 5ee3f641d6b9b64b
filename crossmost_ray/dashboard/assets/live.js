"use strict";

// What the live page does in the browser by itself: links that only change the address, a search
// that follows typing, light and dark, and a focus that stays where it was when a list is drawn
// anew. Everything else is asked of the server.
(() => {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  const go = (search, replace) => {
    window.history[replace ? "replaceState" : "pushState"]({}, "", search || window.location.pathname);
    // The event by which Dash learns of a new address.
    window.dispatchEvent(new CustomEvent("_dashprivate_pushstate"));
  };

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-go]");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    go(link.getAttribute("href"), false);
    if (link.dataset.go === "top") window.scrollTo(0, 0);
  });

  // A box that is a link is ticked by the space bar, as boxes are.
  document.addEventListener("keydown", (event) => {
    const box = event.key === " " && event.target.closest("a[role=checkbox]");
    if (!box) return;
    event.preventDefault();
    box.click();
  });

  let typing;
  document.addEventListener("input", (event) => {
    const box = event.target.closest("input[type=search]");
    if (!box) return;
    clearTimeout(typing);
    typing = setTimeout(() => {
      const address = new URLSearchParams(window.location.search);
      address.delete("page");
      if (box.value) address.set("find", box.value);
      else address.delete("find");
      go(`?${address}`, true);
    }, 300);
  });

  let focused = null;
  const keyOf = (element) => element.closest?.("[data-key]")?.dataset.key ?? null;
  document.addEventListener("focusin", (event) => { focused = keyOf(event.target); });
  document.addEventListener("pointerdown", (event) => { focused = keyOf(event.target); });
  new MutationObserver(() => {
    if (!focused || document.activeElement !== document.body) return;
    document.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }).observe(root, { childList: true, subtree: true });

  system.addEventListener("change", () => {
    if (!root.dataset.theme) window.dash_clientside.set_props("dark", { data: isDark() });
  });

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.live = {
    theme: (clicks) => {
      if (clicks) {
        root.dataset.theme = isDark() ? "light" : "dark";
        window.localStorage.setItem("theme", root.dataset.theme);
      }
      document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
      return isDark();
    },
  };
})();
