// The ears of a view: the player's buttons, the line in the waveform, the words that are marked while they are heard.

import { $, say, show, swapIcon } from "./dom.js";
import { Heard } from "./heard.js";
import { Player } from "./player.js";

export class Listening {
  #heard;
  #wave;
  #changed;
  #player = null;

  /** `changed()` after anything that is to be drawn. */
  constructor(transcript, wave, changed) {
    this.#heard = new Heard(transcript);
    this.#wave = wave;
    this.#changed = changed;
    $("play").addEventListener("click", () => this.toggle());
    $("sound").addEventListener("click", () => (this.#player.inStep ? this.toggle() : this.#player.mute()));
    $("rate").addEventListener("click", () => this.#player.nextRate());
  }

  open(id) {
    this.#player = new Player(id, { changed: this.#changed, failed: (sentence) => say($("sound-note"), sentence) });
    say($("sound-note"), "");
  }

  close() {
    this.#player?.close();
    this.#heard.mark([], null);
    this.#wave.head(null);
  }

  /** Milliseconds the ear is at, null while nothing is listened to. */
  get positionMs() {
    const player = this.#player;
    return player.mode === "free" || player.listening ? player.positionMs : null;
  }

  /** Whether a place was chosen: the ear is not where the stream is. */
  get apart() {
    return this.#player.mode === "free" && this.#player.positionMs !== null;
  }

  /** Whether the stream is listened to. */
  get listening() {
    return this.#player.inStep && this.#player.listening;
  }

  get playing() {
    return this.#player.playing && !this.#player.inStep;
  }

  /** Space: listen along while the job runs, play or pause else. `fromMs`: where to begin if nothing was played yet. */
  toggle(fromMs = null) {
    const player = this.#player;
    if (fromMs !== null && !player.inStep && player.positionMs === null) return player.playFrom(fromMs);
    return player.toggle();
  }

  playFrom(ms) {
    this.#player.playFrom(ms);
  }

  seek(ms) {
    if (this.#player.playing) this.#player.seek(ms);
    else this.#player.playFrom(ms);
  }

  live() {
    this.#player.live();
  }

  /** Draw; returns the index of the turn that is heard, or -1. */
  render({ job, turns, terminal }, connected) {
    const player = this.#player;
    player.stream(job.progress.sent_ms, connected && job.stage === "streaming", !terminal);
    const step = player.inStep;
    show($("play"), !step);
    show($("rate"), !step);
    swapIcon($("play"), player.playing ? "pause" : "play");
    $("play").setAttribute("aria-label", player.playing ? "Pause" : "Play");
    say($("rate"), `${player.rate}×`);
    $("rate").setAttribute("aria-label", `Speed: ${player.rate}×`);
    const heard = step ? player.listening : !player.muted;
    swapIcon($("sound"), heard ? "sound" : "mute");
    $("sound").setAttribute("aria-pressed", String(heard));
    $("sound").setAttribute("aria-label", step ? "Listen along" : "Sound");
    say($("sound").querySelector(".label"), step ? (heard ? "Listening" : "Listen") : "");
    const ms = this.positionMs;
    this.#wave.head(ms);
    this.#wave.value(ms ?? job.progress.sent_ms);
    const index = this.#heard.mark(turns, ms);
    if (player.playing) this.#changed();
    return player.playing ? index : -1;
  }
}
