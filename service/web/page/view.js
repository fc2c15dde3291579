// One job on the page: puts state, stream, transcript, waveform, player, card, details together and draws what changed, once a frame.

import { Actions } from "./actions.js";
import { ask } from "./api.js";
import { Card } from "./card.js";
import { Details } from "./details.js";
import { $, say, show } from "./dom.js";
import { Follow, keepInView } from "./follow.js";
import { placeAt } from "./heard.js";
import { Inspector } from "./inspector.js";
import { JobState, TERMINAL } from "./job.js";
import { Listening } from "./listening.js";
import { Queue } from "./queue.js";
import { blank, describe } from "./status.js";
import { drawSteps, stepOf } from "./steps.js";
import { Stream } from "./stream.js";
import { Transcript } from "./transcript.js";
import { Waveform } from "./waveform.js";
import { clock } from "./words.js";

const NOTE_MS = 6000;
const REST_MS = 5000;

export class View {
  #on;
  #transcript = new Transcript($("log"), $("partials"));
  #follow = new Follow($("reading"), $("log").parentElement, () => this.draw());
  #wave = new Waveform({ box: $("wave"), canvas: $("canvas"), playhead: $("playhead"), tip: $("tip") }, (ms) => this.#seek(ms));
  #ears = new Listening(this.#transcript, this.#wave, () => this.draw());
  #actions = new Actions(this);
  #card = new Card($("card"), { retry: (from) => this.#actions.retry(from), playFrom: (ms) => this.playFrom(ms) });
  #details = new Details();
  #inspector = new Inspector();
  #queue = new Queue(() => this.draw());
  #stream = null;
  #connection = { name: "connecting" };
  #due = false;
  #fresh = 0; // turns added since the reader let go
  #caughtUp = false; // whether the former drawing held all there was
  #chosen = -1; // the turn J and K are at
  #noteTimer = 0;
  #restTimer = 0;

  /** `on.changed(job)` for the rail, `on.deleted()`. */
  constructor(on) {
    this.#on = on;
    this.state = null;
    $("jump").addEventListener("click", () => this.live());
    $("log").addEventListener("click", (event) => this.#click(event));
    $("reading").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && this.#chosen >= 0) this.playFrom(this.state.turns[this.#chosen].start_ms);
    });
    $("details-open").addEventListener("click", () => this.toggleDetails());
    $("details-close").addEventListener("click", () => this.toggleDetails());
  }

  open(id) {
    this.close();
    this.state = new JobState(id);
    this.#stream = new Stream(this.state, {
      state: (name, detail) => this.#connected(name, detail),
      event: (event, raw) => this.#inspector.add(event, raw) ?? this.draw(),
      job: () => this.#seeded(),
    });
    this.#ears.open(id);
    this.#inspector.open(id);
    $("wave").removeAttribute("aria-valuetext");
    this.#stream.start();
  }

  close() {
    if (!this.state) return;
    this.#stream.stop();
    this.#ears.close();
    this.#queue.stop();
    this.state = null;
    this.#caughtUp = false;
    this.#fresh = 0;
    this.#chosen = -1;
    this.#transcript.clear();
    this.#details.clear();
    this.#wave.reset(0);
    for (const id of ["title", "sentence", "aside", "blank"]) say($(id), "");
    $("log").setAttribute("aria-live", "off");
    $("log").setAttribute("aria-busy", "true");
    delete $("view").dataset.state;
  }

  /** Draw with the next frame. */
  draw() {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      if (this.state?.job) this.#draw();
      else if (this.state) this.#head();
    });
  }

  // --- what people do

  live() {
    if (!this.state) return;
    this.#fresh = 0;
    this.#ears.live();
    this.#follow.hold();
    this.draw();
  }

  toggle() {
    this.#ears.toggle(this.#chosen >= 0 ? this.state.turns[this.#chosen].start_ms : null);
  }

  playFrom(ms) {
    this.#ears.playFrom(ms);
  }

  skip(ms) {
    const { job } = this.state;
    if (!job) return;
    const now = this.#ears.positionMs ?? job.progress.sent_ms;
    this.#seek(Math.min(job.audio.duration_ms, Math.max(0, now + ms)));
  }

  /** The next or the former turn. */
  step(by) {
    const { turns } = this.state;
    if (!turns.length) return;
    const from = this.#chosen >= 0 ? this.#chosen : by > 0 ? -1 : turns.length;
    this.#chosen = Math.min(turns.length - 1, Math.max(0, from + by));
    const { element } = this.#transcript.at(this.#chosen);
    if (this.#chosen < turns.length - 1) this.#follow.release();
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest" });
    if (this.#ears.playing) this.#ears.seek(turns[this.#chosen].start_ms);
  }

  toggleDetails() {
    const open = $("details").hidden;
    $("details").hidden = !open;
    $("details-open").setAttribute("aria-expanded", String(open));
    if (open) $("details-close").focus();
    else $("details-open").focus();
    this.draw();
  }

  /** After a retry: the job lives again. */
  again() {
    this.#follow.hold();
    this.#stream.start();
  }

  /** The rail saw this job at work though it had ended here: it was retried elsewhere, or the list was older. */
  noticed(job) {
    if (this.state?.id === job.id && this.state.terminal && !TERMINAL.has(job.status)) this.#stream.start();
  }

  /** The network is back, a key is there, or the tab is seen again. */
  hurry() {
    clearTimeout(this.#restTimer);
    this.#stream?.hurry();
  }

  /** The tab is not seen: over HTTP/1.1 a browser has six connections to a server for all its tabs, so this one gives its own up. */
  rest() {
    clearTimeout(this.#restTimer);
    this.#restTimer = setTimeout(() => {
      if (this.state && !this.#ears.listening) this.#stream.rest();
    }, REST_MS);
  }

  deleted() {
    this.#stream.stop();
    this.#on.deleted();
  }

  // --- what happens

  #connected(name, detail) {
    const note = name === "live" && detail.again ? (detail.replayed ? `replayed ${detail.replayed}` : "nothing missed") : this.#connection.note;
    this.#connection = { name, ...detail, note };
    if (name === "live" && detail.again) {
      clearTimeout(this.#noteTimer);
      this.#noteTimer = setTimeout(() => {
        this.#connection.note = "";
        this.draw();
      }, NOTE_MS);
    }
    if (name === "gone") this.#gone();
    this.draw();
  }

  #seeded() {
    const { state } = this;
    const { job } = state;
    $("view").dataset.state = "here";
    this.#queue.watch(state);
    if ($("title").textContent === "") {
      say($("title"), job.filename);
      if (state.terminal) this.#follow.release();
      else this.#follow.hold();
      this.#wave.reset(job.audio.duration_ms);
      this.#readPeaks(state);
    }
    this.draw();
  }

  async #readPeaks(state) {
    try {
      const peaks = await ask(`/jobs/${state.id}/peaks`);
      if (this.state === state) this.#wave.peaks(peaks);
    } catch {
      // Without peaks the line stays flat; nothing else depends on them.
    }
  }

  #gone() {
    $("view").dataset.state = "gone";
    say($("title"), "No such job");
    say($("sentence"), "");
    say($("blank"), "There is no such job: it was deleted, its time of keeping ran out, or it belongs to another key.");
    show($("blank"), true);
  }

  #seek(ms) {
    if (this.state?.job) this.#ears.seek(ms);
  }

  #click(event) {
    if (!getSelection().isCollapsed) return;
    const ms = placeAt(this.#transcript, this.state.turns, event.target, event.clientX, event.clientY);
    if (ms !== null) this.playFrom(ms);
  }

  // --- drawing

  #draw() {
    const { state } = this;
    const { job } = state;
    const added = this.#transcript.render(state);
    // What a replay brings is not new to the reader.
    if (this.#follow.holding || !this.#caughtUp) this.#fresh = 0;
    else this.#fresh += added;
    this.#caughtUp = state.caughtUp;
    this.#follow.stick();
    this.#head();
    drawSteps($("steps"), stepOf(job));
    this.#wave.sent(job.progress.sent_ms);
    this.#wave.turns(state.turns, job.coverage?.gaps ?? []);
    this.#card.render(state);
    this.#actions.render(state);
    this.#details.render(state);
    this.#inspector.render();
    this.#jump();
    this.#hear();
    // What was there before the page came is not news to a listener.
    const speak = state.caughtUp && !state.terminal && this.#actions.speaking;
    $("log").setAttribute("aria-live", speak ? "polite" : "off");
    $("log").setAttribute("aria-busy", String(!state.caughtUp));
    this.#on.changed(job);
  }

  #head() {
    const { state } = this;
    const { tone, sentence, aside } = describe(state, this.#connection);
    if (this.#connection.name === "gone") return;
    $("mark").dataset.tone = tone;
    say($("sentence"), sentence);
    say($("aside"), aside);
    if (!state.job) return;
    const { job } = state;
    show($("sandbox-mark"), job.sessions.some(({ model }) => model === "sandbox"));
    say($("position"), clock(this.#ears.apart ? this.#ears.positionMs : job.progress.sent_ms));
    say($("total"), clock(job.audio.duration_ms));
    say($("blank"), blank(state));
    show($("blank"), state.turns.length === 0 && state.partials.size === 0);
    document.title = `${tone === "live" ? "● " : ""}${job.filename} – Turnwire`;
  }

  #jump() {
    const { terminal } = this.state;
    const wanted = !this.#follow.holding && (!terminal || this.#fresh > 0);
    show($("jump"), wanted);
    if (wanted) say($("jump-text"), [terminal ? "Jump to the end" : "Jump to live", this.#fresh ? `${this.#fresh} new` : ""].filter(Boolean).join(" · "));
  }

  /** Keep what is heard in sight. */
  #hear() {
    const index = this.#ears.render(this.state, this.#connection.name === "live");
    if (index < 0 || index === this.#chosen) return;
    this.#chosen = index;
    if (!this.#follow.holding) keepInView(this.#transcript.at(index).element, $("reading"));
  }
}
