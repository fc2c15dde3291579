// The keys of the page. Never while typing, never with a modifier, and what a focused control does with a key is its own.

import { $ } from "./dom.js";

/** `actions` maps a key to what it does; `view()` is the open job or null. */
export function wireKeys(view) {
  const actions = {
    " ": () => view()?.toggle(),
    j: () => view()?.step(1),
    k: () => view()?.step(-1),
    l: () => view()?.live(),
    d: () => view()?.toggleDetails(),
    ArrowLeft: () => view()?.skip(-5000),
    ArrowRight: () => view()?.skip(5000),
    "/": () => search(),
    "?": () => help(),
    Escape: () => escape(view()),
  };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const act = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || typing(event.target) || (event.key === " " && event.target.closest("button, a, summary, [role='switch']"))) return;
    if (event.key.startsWith("Arrow") && event.target.closest("input, #jobs, pre")) return;
    if (event.key !== "Escape") event.preventDefault();
    act();
  });
  for (const id of ["help", "keys-open"]) $(id).addEventListener("click", help);
}

function typing(target) {
  return target.closest("textarea, input:not([type='radio']):not([type='checkbox'])") !== null;
}

/** On a narrow screen the search is on the first screen. */
function search() {
  if ($("rail").offsetParent === null && getComputedStyle($("rail")).display === "none") document.querySelector(".back").click();
  $("search").focus();
}

function help() {
  $("keys").showModal();
}

function escape(view) {
  if (view && !$("details").hidden) view.toggleDetails();
}
