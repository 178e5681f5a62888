"use strict";
// A live refresh waits while somebody works inside the part that it would replace, or while the page is hidden.
document.addEventListener("htmx:beforeRequest", (event) => {
  const part = event.target;
  if (!(part instanceof Element) || !part.hasAttribute("data-calm")) return;
  const focused = document.activeElement;
  const clicked = focused?.matches("[role=region]:not(:focus-visible)"); // a table that only scrolls: nobody works in it
  const busy = (part.contains(focused) && !clicked) || part.querySelector("details[open]") !== null;
  if (busy || document.hidden) event.preventDefault();
});
// One press is one decision.
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method !== "post") return;
  setTimeout(() => form.querySelectorAll("button").forEach((button) => { button.disabled = true; }), 0);
});
window.addEventListener("pageshow", (event) => { // the browser brought the page back as it was
  if (event.persisted) document.querySelectorAll("form[method=post] button").forEach((one) => { one.disabled = false; });
});
// A choice in a filter counts at once; one that would change something waits for its button.
document.addEventListener("change", (event) => {
  const choice = event.target;
  if (choice instanceof HTMLSelectElement && choice.form?.method === "get") choice.form.requestSubmit();
});
// A UID that is copied says so for a moment; where the clipboard is closed to pages, it is selected instead.
document.addEventListener("click", async (event) => {
  const button = event.target instanceof Element ? event.target.closest("[data-copy]") : null;
  if (button === null) return;
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  } catch {
    document.getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = label; }, 2000);
});
// A part that moves listens to the server while it is on the page, and is drawn anew when something was told.
let stream = null;
function listen() {
  const part = document.querySelector("[data-events]");
  const address = part === null ? null : part.dataset.events;
  if (stream !== null && stream.address === address) return;
  if (stream !== null) stream.source.close();
  stream = null;
  if (address === null) return;
  const source = new EventSource(address);
  const moved = () => { const live = document.querySelector("[data-events]"); if (live) htmx.trigger(live, "moved"); };
  ["epoch", "progress"].forEach((name) => source.addEventListener(name, moved));
  source.addEventListener("end", () => { source.close(); moved(); });
  source.addEventListener("open", back);
  source.addEventListener("error", () => setTimeout(() => { // a stream that ended is opened anew at once
    if (stream?.source === source && source.readyState !== EventSource.OPEN) away("No connection to Osteogate");
  }, 5000));
  stream = { address, source };
}
document.addEventListener("DOMContentLoaded", listen);
document.addEventListener("htmx:afterSettle", listen);
// Whoever looks at a page that draws itself anew must know when it no longer does.
let awaySince = null;
function away(what) {
  awaySince = awaySince ?? new Date();
  const time = `${String(awaySince.getHours()).padStart(2, "0")}:${String(awaySince.getMinutes()).padStart(2, "0")}`;
  const text = `${what} since ${time}. What you see may be out of date.`;
  const bar = document.getElementById("away");
  if (bar !== null && bar.textContent !== text) bar.textContent = text;
}
["htmx:sendError", "htmx:timeout"].forEach((name) => document.addEventListener(name, () => away("No connection to Osteogate")));
document.addEventListener("htmx:responseError", () => away("Osteogate does not answer as it should"));
function back() {
  awaySince = null;
  const bar = document.getElementById("away");
  if (bar !== null) bar.textContent = "";
}
document.addEventListener("htmx:afterRequest", (event) => { if (event.detail.successful) back(); });
// What somebody typed is not lost where it could not be sent (the session had ended, a colleague was faster): this tab
// keeps it until the form is there again, for the same person, or until they log out.
const DRAFT = "osteogate-draft";
const WRITTEN = ["text", "textarea", "select-one"];
const written = (form) => [...form.elements].filter((one) => one.name && WRITTEN.includes(one.type));
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (event.defaultPrevented || form.getAttribute("method")?.toLowerCase() !== "post") return;
  if (form.getAttribute("action") === "/logout") sessionStorage.removeItem(DRAFT);
  const fields = written(form).map((one) => [one.name, one.value]);
  const secret = form.querySelector("input[type=password]") !== null;
  if (secret || !written(form).some((one) => one.type !== "select-one" && one.value.trim())) return;
  const draft = { who: document.body.dataset.me, action: form.getAttribute("action"), fields };
  sessionStorage.setItem(DRAFT, JSON.stringify(draft));
});
function restore() {
  const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
  if (draft === null) return;
  if (document.querySelector("[data-not-done]") !== null) {
    document.querySelectorAll("[data-kept]").forEach((one) => { one.hidden = false; });
    sessionStorage.setItem(DRAFT, JSON.stringify({ ...draft, notDone: true }));
    return;
  }
  const me = document.body.dataset.me;
  if (me === undefined && draft.notDone) return; // the login page
  if (!draft.notDone || me !== draft.who) { sessionStorage.removeItem(DRAFT); return; }
  const names = draft.fields.map(([name]) => name).join();
  const form = [...document.forms].find((one) => one.getAttribute("action") === draft.action
    && one.getAttribute("method")?.toLowerCase() === "post" && written(one).map((field) => field.name).join() === names);
  if (form === undefined) return;
  const values = new Map(draft.fields);
  written(form).forEach((one) => { one.value = values.get(one.name); });
  form.closest("details")?.setAttribute("open", "");
  const told = document.createElement("p");
  told.className = "hint kept";
  told.setAttribute("role", "status");
  told.textContent = "This is what you typed before. It was not sent.";
  form.append(told);
  written(form).find((one) => one.type !== "select-one").focus();
  sessionStorage.removeItem(DRAFT);
}
document.addEventListener("DOMContentLoaded", restore);
