// Keeps the page's content fresh: asks for it, and puts it in place only when it has changed.
"use strict";

const EVERY_MS = 2000;
const live = document.getElementById("live");
const stale = document.getElementById("stale");
let tag = "";

async function look() {
  try {
    const headers = tag ? { "If-None-Match": tag } : {};
    const answer = await fetch("/console/live", { headers, cache: "no-store", signal: AbortSignal.timeout(10000) });
    if (answer.status === 401) {
      location.assign("/console/sign-in");
      return;
    }
    if (answer.status === 200) {
      const html = await answer.text();
      tag = answer.headers.get("ETag") || "";
      live.innerHTML = html; // Rendered and escaped by the server; the policy admits no script in it.
    }
    stale.hidden = answer.ok || answer.status === 304;
  } catch {
    stale.hidden = false;
  }
  setTimeout(look, EVERY_MS);
}

setTimeout(look, EVERY_MS);
