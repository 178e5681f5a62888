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
// A choice in a filter counts at once.
document.addEventListener("change", (event) => {
  if (event.target instanceof HTMLSelectElement && event.target.form) event.target.form.requestSubmit();
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
