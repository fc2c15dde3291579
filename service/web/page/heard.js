// Which words are heard now, and which word is under the pointer.
//
// A turn is one text node, so 3,000 turns are not 60,000 elements: words are found by their offsets, and marked with the CSS Custom Highlight API, which needs
// no elements. A browser without it marks the turn only.

const OVERLAPS = 8; // turns of several channels may overlap

const spans = new WeakMap(); // turn → [{from, to, start_ms, end_ms}]

/** Where each word of a turn stands in its transcript. */
export function wordSpans(turn) {
  let found = spans.get(turn);
  if (!found) spans.set(turn, (found = measure(turn)));
  return found;
}

function measure({ transcript, words }) {
  const lower = transcript.toLowerCase();
  const same = lower.length === transcript.length;
  const found = [];
  let position = 0;
  for (const word of words ?? []) {
    let text = word.text;
    let from = transcript.indexOf(text, position);
    if (from < 0 && same) from = lower.indexOf((text = text.toLowerCase()), position);
    if (from < 0 && same) from = lower.indexOf((text = text.replace(/[^\p{L}\p{N}]+$/u, "")), position);
    if (from < 0 || !text) continue;
    position = from + text.length;
    found.push({ from, to: position, start_ms: word.start_ms, end_ms: word.end_ms });
  }
  return found;
}

export class Heard {
  #transcript;
  #mark = typeof Highlight === "undefined" ? null : new Highlight();
  #order = []; // turns by start
  #ordered = null;
  #count = 0;
  #now = new Set(); // elements marked
  #key = "";

  constructor(transcript) {
    this.#transcript = transcript;
    if (this.#mark) CSS.highlights.set("heard", this.#mark);
  }

  /** Mark what is said at `ms`; null marks nothing. Returns the index of the turn, or -1. */
  mark(turns, ms) {
    const active = ms === null ? [] : this.#at(turns, ms);
    const words = active.map((turn) => wordSpans(turn).findLast((word) => word.start_ms <= ms));
    const key = active.map((turn, i) => `${turn.index}:${words[i]?.from}`).join();
    if (key !== this.#key) {
      this.#key = key;
      this.#show(active, words);
    }
    return active[0]?.index ?? -1;
  }

  #show(active, words) {
    const elements = new Set(active.map((turn) => this.#transcript.at(turn.index)?.element).filter(Boolean));
    for (const element of this.#now) if (!elements.has(element)) element.classList.remove("now");
    for (const element of elements) element.classList.add("now");
    this.#now = elements;
    if (!this.#mark) return;
    this.#mark.clear();
    active.forEach((turn, i) => {
      const text = this.#transcript.at(turn.index)?.text;
      const word = words[i];
      if (!text || !word || word.to > text.length) return;
      const range = new Range();
      range.setStart(text, word.from);
      range.setEnd(text, word.to);
      this.#mark.add(range);
    });
  }

  #at(turns, ms) {
    if (this.#ordered !== turns || this.#count !== turns.length) {
      this.#order = turns.toSorted((a, b) => a.start_ms - b.start_ms);
      this.#ordered = turns;
      this.#count = turns.length;
    }
    let [low, high] = [0, this.#order.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#order[middle].start_ms <= ms) low = middle + 1;
      else high = middle;
    }
    const near = this.#order.slice(Math.max(0, low - OVERLAPS), low).reverse();
    return near.map((turn) => turns[turn.index]).filter((turn) => turn && turn.start_ms <= ms && ms < turn.end_ms + 250);
  }
}

/** The place in the file of the word at a point of the page, or the start of its turn; null outside of turns. */
export function placeAt(transcript, turns, target, x, y) {
  const index = transcript.indexOf(target);
  const turn = turns[index];
  if (!turn) return null;
  const caret = caretAt(x, y);
  if (caret?.node !== transcript.at(index).text) return turn.start_ms;
  const word = wordSpans(turn).findLast(({ from }) => from <= caret.offset);
  return word && caret.offset <= word.to + 1 ? word.start_ms : turn.start_ms;
}

function caretAt(x, y) {
  if (document.caretPositionFromPoint) {
    const caret = document.caretPositionFromPoint(x, y);
    return caret && { node: caret.offsetNode, offset: caret.offset };
  }
  const range = document.caretRangeFromPoint?.(x, y);
  return range && { node: range.startContainer, offset: range.startOffset };
}
