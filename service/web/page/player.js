// The audio: in step with the stream while it runs, a player afterwards.
//
// "Step" follows the position the service streams at, as the vendor's guide does with PLAY_AUDIO: small drifts are mended by speed, large ones by a jump, and it
// pauses whenever the stream does. It starts silent and loads nothing until somebody listens. "Free" is an ordinary player; choosing a place enters it,
// `live()` leaves it.

import { link, Problem, request } from "./api.js";

const RATES = [1, 1.25, 1.5, 2, 0.75];
const JUMP_MS = 700;
const AHEAD_MS = 2500; // without a word of progress for that long the stream is standing

export class Player {
  #audio = new Audio();
  #id;
  #changed;
  #failed;
  #position = 0; // of the stream, ms
  #at = 0; // when that was known
  #flows = false;
  #timer = 0;
  #loaded = false;

  /** `changed()` after any change; `failed(sentence)` when there is nothing to hear. */
  constructor(id, { changed, failed }) {
    this.#id = id;
    this.#changed = changed;
    this.#failed = failed;
    this.running = true; // the job has not ended
    this.mode = "step";
    this.listening = false; // in step: whether it is heard
    this.rate = 1;
    this.#audio.preload = "auto";
    for (const name of ["play", "pause", "ended", "seeked", "volumechange"]) this.#audio.addEventListener(name, changed);
    this.#audio.addEventListener("error", () => this.#explain());
  }

  get playing() {
    return !this.#audio.paused && !this.#audio.ended;
  }

  get muted() {
    return this.#audio.muted;
  }

  /** Milliseconds of the file the ear is at, null before anything was asked for. */
  get positionMs() {
    return this.#loaded ? this.#audio.currentTime * 1000 : null;
  }

  get inStep() {
    return this.running && this.mode === "step";
  }

  /** Where the stream is, and whether it moves. */
  stream(positionMs, flows, running) {
    if (positionMs !== this.#position) {
      this.#position = positionMs;
      this.#at = performance.now();
    }
    this.#flows = flows;
    if (this.running && !running && this.mode === "step") {
      this.mode = "free";
      this.#setRate(this.rate);
      if (!this.listening) this.#audio.pause();
      clearInterval(this.#timer);
    }
    this.running = running;
  }

  /** Space: listen along while in step, else play or pause. */
  async toggle() {
    if (this.inStep) return this.listen(!this.listening);
    if (this.playing) this.#audio.pause();
    else {
      await this.#load();
      if (this.#audio.ended) this.#audio.currentTime = 0;
      await this.#play();
    }
    return undefined;
  }

  async listen(on) {
    this.listening = on;
    clearInterval(this.#timer);
    if (on) {
      await this.#load();
      this.#keepStep();
      this.#timer = setInterval(() => this.#keepStep(), 500);
    } else this.#audio.pause();
    this.#changed();
  }

  /** Leave the present and play from a place. */
  async playFrom(ms) {
    await this.seek(ms);
    await this.#play();
  }

  async seek(ms) {
    clearInterval(this.#timer);
    this.mode = "free";
    this.#setRate(this.rate);
    await this.#load();
    this.#audio.currentTime = Math.max(0, ms / 1000);
    this.#changed();
  }

  /** Back into step with the stream. */
  live() {
    if (!this.running || this.mode === "step") return;
    const heard = this.playing;
    this.mode = "step";
    this.#audio.pause();
    this.listen(heard || this.listening);
  }

  mute(on = !this.#audio.muted) {
    this.#audio.muted = on;
  }

  nextRate() {
    this.rate = RATES[(RATES.indexOf(this.rate) + 1) % RATES.length];
    this.#setRate(this.rate);
    this.#changed();
  }

  close() {
    clearInterval(this.#timer);
    this.#audio.pause();
    this.#audio.removeAttribute("src");
    this.#audio.load();
    this.#loaded = false;
  }

  #setRate(rate) {
    this.#audio.playbackRate = rate;
    this.#audio.preservesPitch = true;
  }

  async #load() {
    if (this.#loaded) return;
    this.#loaded = true;
    this.#audio.src = await link(this.#id, "audio");
    if (this.#audio.readyState >= 1) return;
    await new Promise((resolve) => {
      for (const name of ["loadedmetadata", "error"]) this.#audio.addEventListener(name, resolve, { once: true });
    });
  }

  async #play() {
    try {
      await this.#audio.play();
    } catch (error) {
      if (error.name === "NotAllowedError") this.#failed("The browser wants a click before it plays sound.");
      // AbortError: paused again before it began; an error of the source has its own event.
    }
  }

  #keepStep() {
    if (!this.inStep || !this.listening || !this.#loaded) return;
    const since = performance.now() - this.#at;
    if (!this.#flows || since > AHEAD_MS) {
      if (this.playing) this.#audio.pause();
      return;
    }
    const drift = this.#position + since - this.#audio.currentTime * 1000;
    if (Math.abs(drift) > JUMP_MS) this.#audio.currentTime = (this.#position + since) / 1000;
    else this.#setRate(1 + Math.max(-0.05, Math.min(0.05, drift / 4000)));
    if (this.#audio.paused) this.#play();
  }

  async #explain() {
    if (!this.#audio.getAttribute("src")) return;
    this.#loaded = false;
    this.listening = false;
    clearInterval(this.#timer);
    let sentence = "This browser cannot play the encoding of this file.";
    try {
      await request(`/jobs/${this.#id}/audio`, { method: "HEAD" });
    } catch (error) {
      const gone = error instanceof Problem && (error.status === 410 || error.status === 404);
      sentence = gone ? "The audio has been removed; the text stays." : "The audio cannot be loaded now.";
    }
    this.#failed(sentence);
    this.#changed();
  }
}
