// The card after a job that failed, was canceled or has gaps: what happened, what is kept, what can be done.

import { h, icon } from "./dom.js";
import { aftermath } from "./status.js";
import { clock, sentence } from "./words.js";

export class Card {
  #box;
  #actions;
  #key = "";

  constructor(box, actions) {
    this.#box = box;
    this.#actions = actions;
  }

  render(state) {
    const told = state.terminal ? aftermath(state) : null;
    if (told) told.begun = state.turns.length > 0;
    const key = JSON.stringify(told);
    if (key === this.#key) return;
    this.#key = key;
    this.#box.hidden = told === null;
    if (told === null) return;
    this.#box.dataset.tone = told.tone;
    this.#box.replaceChildren(
      h("h2", {}, told.heading),
      told.text ? h("p", {}, sentence(told.text)) : "",
      told.gaps ? this.#gaps(told.gaps) : "",
      told.kept ? h("p", { class: told.text ? "soft" : "" }, told.kept) : "",
      told.code ? h("p", { class: "mono soft" }, told.code) : "",
      this.#buttons(told),
    );
  }

  #gaps(gaps) {
    const shown = gaps.slice(0, 6);
    const buttons = shown.map(({ from_ms: from, to_ms: to }) =>
      h("button", { type: "button", class: "button small", "aria-label": `Play from ${clock(from)}`, onclick: () => this.#actions.playFrom(from) }, `${clock(from)} – ${clock(to)}`),
    );
    return h("p", { class: "buttons" }, ...buttons, gaps.length > shown.length ? `and ${gaps.length - shown.length} more` : null);
  }

  #buttons({ retry, begun }) {
    const button = (text, name, primary, act) => h("button", { type: "button", class: `button${primary ? " primary" : ""}`, onclick: act }, icon(name), text);
    const again = [
      button(begun ? "Retry from here" : "Retry", "again", true, () => this.#actions.retry("here")),
      begun && button("Retry from the start", "again", false, () => this.#actions.retry("start")),
    ];
    return h("p", { class: "buttons" }, ...(retry ? again : [h("a", { class: "button primary", href: "/" }, "Upload it again")]));
  }
}
