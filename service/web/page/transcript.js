// The transcript on the page: one element per final turn, then one line per open turn.
//
// A final is appended once and touched again only when it is revised, so thousands cost nothing while one grows. Turns stand in blocks, which the browser
// skips when they are far from view (`content-visibility` in view.css). Of an open turn only the text node that differs is written: the stable words
// are one node, the tail another.

import { h, say, show } from "./dom.js";
import { clock } from "./words.js";

const BLOCK = 40;

export class Transcript {
  #log;
  #partials;
  #shown = []; // {turn, element, time, who, text} by index
  #lines = new Map(); // session → {element, time, who, stable, tail}
  #settling = [];

  constructor(log, partials) {
    this.#log = log;
    this.#partials = partials;
  }

  get length() {
    return this.#shown.length;
  }

  /** Bring the page to `state`; returns how many turns were added. */
  render(state) {
    const { turns, partials, touched } = state;
    for (const index of touched) if (index < this.#shown.length) this.#fill(this.#shown[index], turns[index]);
    touched.clear();
    this.#cut(turns.length);
    const before = this.#shown.length;
    const wasOpen = state.caughtUp && this.#lines.size > 0;
    for (let index = before; index < turns.length; index += 1) this.#append(turns[index], wasOpen);
    this.#drawPartials(partials);
    return turns.length - before;
  }

  /** The element of a turn, and the text node of its words. */
  at(index) {
    return this.#shown[index];
  }

  /** The index of the turn that holds `node`, or -1. */
  indexOf(node) {
    const element = (node.nodeType === Node.TEXT_NODE ? node.parentElement : node)?.closest?.(".turn");
    return element?.parentElement?.parentElement === this.#log ? Number(element.dataset.index) : -1;
  }

  clear() {
    this.#cut(0);
    this.#drawPartials(new Map());
  }

  #append(turn, wasOpen) {
    const text = document.createTextNode("");
    const parts = { turn: null, text, time: h("time"), who: h("span", { class: "who" }) };
    parts.element = h("div", { class: "turn", tabindex: "-1", "data-index": turn.index }, h("div", { class: "when" }, parts.time, parts.who), h("p", { dir: "auto" }, text));
    this.#fill(parts, turn);
    if (wasOpen) this.#settle(parts.element);
    let block = this.#log.lastElementChild;
    if (!block || block.childElementCount >= BLOCK) this.#log.append((block = h("div", { class: "block" })));
    block.append(parts.element);
    this.#shown.push(parts);
  }

  #fill(parts, turn) {
    if (parts.turn === turn) return;
    parts.turn = turn;
    if (parts.text.data !== turn.transcript) parts.text.data = turn.transcript;
    say(parts.time, clock(turn.start_ms));
    const who = speakerOf(turn);
    say(parts.who, who);
    show(parts.who, who !== "");
  }

  #settle(element) {
    for (const old of this.#settling) old.classList.remove("settling");
    this.#settling = [element];
    element.classList.add("settling");
  }

  #cut(length) {
    while (this.#shown.length > length) {
      const { element } = this.#shown.pop();
      const block = element.parentElement;
      element.remove();
      if (!block.childElementCount) block.remove();
    }
  }

  #drawPartials(partials) {
    for (const [session, line] of this.#lines) {
      if (partials.has(session)) continue;
      line.element.remove();
      this.#lines.delete(session);
    }
    for (const [session, turn] of partials) {
      let line = this.#lines.get(session);
      if (!line) {
        this.#lines.set(session, (line = openLine()));
        this.#partials.append(line.element);
      }
      const cut = afterWords(turn.transcript, turn.stable_words);
      say(line.time, clock(turn.start_ms));
      const who = speakerOf(turn);
      say(line.who, who);
      show(line.who, who !== "");
      write(line.stable, turn.transcript.slice(0, cut));
      write(line.tail.firstChild, turn.transcript.slice(cut));
    }
  }
}

function openLine() {
  const line = { time: h("time"), who: h("span", { class: "who" }), stable: document.createTextNode(""), tail: h("span", { class: "tail" }) };
  line.tail.append(document.createTextNode(""));
  line.element = h("div", { class: "turn open" }, h("div", { class: "when" }, line.time, line.who), h("p", { dir: "auto" }, line.stable, line.tail));
  return line;
}

function write(node, text) {
  if (node.data !== text) node.data = text;
}

/** `Ch 1`, `A`, or both. */
export function speakerOf({ speaker, channel }) {
  const parts = [];
  if (channel !== null && channel !== undefined) parts.push(`Ch ${channel + 1}`);
  if (speaker) parts.push(speaker);
  return parts.join(" ");
}

/** The offset behind the first `n` words. */
export function afterWords(text, n) {
  if (n <= 0) return 0;
  const words = /\S+\s*/g;
  for (let i = 0; i < n; i += 1) if (!words.exec(text)) return text.length;
  return words.lastIndex;
}
