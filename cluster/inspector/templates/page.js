"use strict";
// The only script: keys for the table, and the refresh of a page that follows a run.
(() => {
  const press = (selector) => document.querySelector(selector)?.click();
  const step = (by) => {
    const links = [...document.querySelectorAll("td:first-child a, #group a")];
    const at = links.indexOf(document.activeElement);
    links[Math.min(Math.max(at + by, 0), links.length - 1)]?.focus();
  };
  const keys = {
    j: () => step(1),
    k: () => step(-1),
    n: () => press("a[rel=next]"),
    p: () => press("a[rel=prev]"),
    "/": () => document.querySelector("input[name=search]")?.focus(),
  };
  document.getElementById("keys").hidden = false;
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("input, select")) {
      if (event.key === "Escape") event.target.blur();
    } else if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });
})();
(() => {
  const wait = Number(document.documentElement.dataset.refresh) * 1000;
  const hint = document.getElementById("live");
  if (!wait || !hint) return;
  hint.hidden = false;
  const busy = () => document.hidden || !getSelection().isCollapsed ||
    document.activeElement.closest("[data-live], form");
  // Fetches this very page again and puts its live parts in place of the old.
  const refresh = async () => {
    if (busy()) return;
    const answer = await fetch(location.href, { credentials: "same-origin" });
    const text = await answer.text();
    if (!answer.ok || busy()) return;
    const page = new DOMParser().parseFromString(text, "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const fresh = page.getElementById(part.id);
      if (fresh) part.replaceChildren(...fresh.childNodes);
    }
  };
  setInterval(() => refresh().catch(() => {}), wait);
})();
