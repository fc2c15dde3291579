// The waveform: 2 px bars, 1 px gaps; what was sent in accent; turns as segments beneath. Draws again only the bars that changed.

import { clock, spokenClock } from "./words.js";

const BAR = 2;
const STEP = 3;
const FOOT = 6; // beneath the bars, for the turns
const STEPS_MS = { ArrowLeft: -5000, ArrowRight: 5000, PageDown: -60_000, PageUp: 60_000 };

export class Waveform {
  #box;
  #canvas;
  #tip;
  #playhead;
  #seek;
  #peaks = null;
  #bars = [];
  #height = 0;
  #total = 0;
  #sent = 0;
  #painted = 0; // bars drawn in accent
  #turns = [];
  #gaps = [];
  #segments = 0; // turns drawn
  #colours = null;

  constructor({ box, canvas, playhead, tip }, seek) {
    this.#box = box;
    this.#canvas = canvas;
    this.#playhead = playhead;
    this.#tip = tip;
    this.#seek = seek;
    new ResizeObserver(() => this.#redraw()).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#redraw());
    box.addEventListener("pointermove", (event) => this.#point(event));
    box.addEventListener("pointerleave", () => (tip.hidden = true));
    box.addEventListener("pointerdown", (event) => {
      box.setPointerCapture(event.pointerId);
      seek(this.#msAt(event));
    });
    box.addEventListener("keydown", (event) => this.#press(event));
  }

  /** A new job: nothing known of it but its length. */
  reset(totalMs) {
    this.#peaks = null;
    this.#total = totalMs;
    this.#sent = 0;
    this.#turns = [];
    this.#gaps = [];
    this.head(null);
    this.#box.setAttribute("aria-valuemax", Math.round(totalMs / 1000));
    this.#redraw();
  }

  /** `{ms_per_peak, peaks: [[min, max], …]}` in any unit. */
  peaks({ ms_per_peak: ms, peaks }) {
    const heights = peaks.map(([low, high]) => Math.max(Math.abs(low), Math.abs(high)));
    const loudest = heights.reduce((most, height) => Math.max(most, height), 0);
    this.#peaks = { ms, heights: heights.map((height) => (loudest ? height / loudest : 0)) };
    this.#redraw();
  }

  sent(ms) {
    if (ms < this.#sent) {
      this.#sent = ms;
      this.#redraw();
      return;
    }
    this.#sent = ms;
    const upTo = this.#barsSent();
    if (upTo > this.#painted) this.#drawBars(this.#painted, upTo);
    this.#painted = upTo;
  }

  /** Final turns, and what is known to be missing. */
  turns(turns, gaps) {
    const withdrawn = turns.length < this.#segments || gaps.length !== this.#gaps.length;
    this.#turns = turns;
    this.#gaps = gaps;
    if (withdrawn) this.#redraw();
    else this.#drawSegments();
  }

  /** Where the ear is; null hides the line. */
  head(ms) {
    this.#playhead.hidden = ms === null;
    if (ms === null) return;
    const x = this.#total ? (ms / this.#total) * this.#box.clientWidth : 0;
    this.#playhead.style.transform = `translateX(${x.toFixed(1)}px)`;
  }

  /** What the slider says. */
  value(ms) {
    const seconds = String(Math.round(ms / 1000));
    if (this.#box.getAttribute("aria-valuenow") === seconds) return;
    this.#box.setAttribute("aria-valuenow", seconds);
    this.#box.setAttribute("aria-valuetext", `${spokenClock(ms)} of ${spokenClock(this.#total)}`);
  }

  #redraw() {
    const { clientWidth: width, clientHeight: height } = this.#box;
    if (!width || !this.#total) return;
    this.#height = height; // asking the element each time would lay the page out each time
    const density = devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * density);
    this.#canvas.height = Math.round(height * density);
    const context = this.#canvas.getContext("2d");
    context.setTransform(density, 0, 0, density, 0, 0);
    const style = getComputedStyle(this.#canvas);
    this.#colours = { sent: style.color, rest: style.outlineColor, turn: style.borderTopColor, gap: style.caretColor };
    this.#measure(Math.floor((width + 1) / STEP));
    this.#painted = this.#barsSent();
    this.#drawBars(0, this.#bars.length);
    this.#segments = 0;
    this.#drawSegments();
  }

  #measure(bars) {
    const { ms, heights } = this.#peaks ?? { ms: 1, heights: [] };
    const perBar = this.#total / bars / ms;
    this.#bars = Array.from({ length: bars }, (_, i) => {
      let most = 0;
      const end = Math.max(Math.floor(i * perBar) + 1, Math.ceil((i + 1) * perBar));
      for (let k = Math.floor(i * perBar); k < Math.min(end, heights.length); k += 1) most = Math.max(most, heights[k]);
      return most ** 0.8; // speech is mostly quiet: a little lift keeps it readable
    });
  }

  #barsSent() {
    return this.#total ? Math.round((this.#sent / this.#total) * this.#bars.length) : 0;
  }

  #drawBars(from, to) {
    if (!this.#colours) return;
    const context = this.#canvas.getContext("2d");
    const room = this.#height - FOOT;
    const sent = this.#barsSent();
    for (let i = from; i < to; i += 1) {
      const height = Math.max(2, Math.round(this.#bars[i] * room));
      context.clearRect(i * STEP, 0, STEP, room);
      context.fillStyle = i < sent ? this.#colours.sent : this.#colours.rest;
      context.fillRect(i * STEP, Math.round((room - height) / 2), BAR, height);
    }
  }

  #drawSegments() {
    if (!this.#colours) return;
    for (; this.#segments < this.#turns.length; this.#segments += 1) {
      const { start_ms: from, end_ms: to } = this.#turns[this.#segments];
      this.#drawSegment(from, to, this.#colours.turn);
    }
    for (const { from_ms: from, to_ms: to } of this.#gaps) this.#drawSegment(from, to, this.#colours.gap);
  }

  #drawSegment(from, to, colour) {
    const context = this.#canvas.getContext("2d");
    const scale = (this.#bars.length * STEP) / this.#total;
    context.fillStyle = colour;
    context.fillRect(from * scale, this.#height - 2, Math.max(1, (to - from) * scale - 1), 2);
  }

  #msAt(event) {
    const { left, width } = this.#box.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - left) / width)) * this.#total;
  }

  #point(event) {
    const ms = this.#msAt(event);
    if (event.buttons & 1) this.#seek(ms);
    this.#tip.textContent = clock(ms);
    this.#tip.hidden = false;
    const room = this.#box.clientWidth - this.#tip.offsetWidth;
    const x = (ms / (this.#total || 1)) * this.#box.clientWidth - this.#tip.offsetWidth / 2;
    this.#tip.style.transform = `translateX(${Math.round(Math.min(room, Math.max(0, x)))}px)`;
  }

  #press(event) {
    const now = Number(this.#box.getAttribute("aria-valuenow")) * 1000;
    const ends = { Home: 0, End: this.#total };
    const to = event.key in ends ? ends[event.key] : event.key in STEPS_MS ? now + STEPS_MS[event.key] : null;
    if (to === null || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    this.#seek(Math.min(this.#total, Math.max(0, to)));
  }
}
