"use strict";
// A live refresh waits while somebody works inside the part that it would replace, or while the page is hidden.
document.addEventListener("htmx:beforeRequest", (event) => {
  const part = event.target;
  if (!(part instanceof Element) || !part.hasAttribute("data-calm")) return;
  const busy = part.contains(document.activeElement) || part.querySelector("details[open]") !== null;
  if (busy || document.hidden) event.preventDefault();
});
// One press is one decision.
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method !== "post") return;
  setTimeout(() => form.querySelectorAll("button").forEach((button) => { button.disabled = true; }), 0);
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
  stream = { address, source };
}
document.addEventListener("DOMContentLoaded", listen);
document.addEventListener("htmx:afterSettle", listen);
