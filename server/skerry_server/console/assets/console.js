// Keeps the page's content fresh: asks for it, and puts it in place only when it has changed.
"use strict";

const EVERY_MS = 2000;
const live = document.getElementById("live");
const stale = document.getElementById("stale");
const heard = document.getElementById("heard");
let tag = "";

// Only sections that changed are replaced: what somebody reads, selects or has scrolled elsewhere stays as it is.
function place(html) {
  const fresh = document.createElement("template");
  fresh.innerHTML = html; // Rendered and escaped by the server; the policy admits no script in it.
  const parts = [...fresh.content.children];
  const held = [...live.children];
  if (parts.length !== held.length) {
    live.replaceChildren(...parts);
    return;
  }
  held.forEach((old, i) => {
    if (old.isEqualNode(parts[i])) return;
    const left = old.scrollLeft;
    old.replaceWith(parts[i]);
    parts[i].scrollLeft = left;
  });
}

function say(isOld) {
  const text = isOld ? `No answer from the server since ${heard.textContent} UTC: what you see is old.` : "";
  if (stale.textContent !== text) stale.textContent = text;
  live.classList.toggle("old", isOld);
}

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
      place(html);
    }
    const answered = answer.ok || answer.status === 304;
    const date = new Date(answer.headers.get("Date"));
    if (answered && !Number.isNaN(date.valueOf())) heard.textContent = date.toISOString().slice(11, 19);
    say(!answered);
  } catch {
    say(true);
  }
  setTimeout(look, EVERY_MS);
}

setTimeout(look, EVERY_MS);
