"use strict";
// The only script: it fetches this very page again and puts its live parts in place of the old.
(() => {
  const wait = Number(document.documentElement.dataset.refresh) * 1000;
  const hint = document.getElementById("live");
  if (!wait || !hint) return;
  hint.hidden = false;
  const busy = () => document.hidden || !getSelection().isCollapsed ||
    document.activeElement.closest("[data-live], form");
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
