// A job's place in the queue, asked for from time to time: no event tells it.

import { ask } from "./api.js";

const EVERY_MS = 3000;

export class Queue {
  #changed;
  #timer = 0;

  constructor(changed) {
    this.#changed = changed;
  }

  /** Keep `queue_position` of a waiting job true. */
  watch(state) {
    clearTimeout(this.#timer);
    if (state.job.status === "queued") this.#timer = setTimeout(() => this.#ask(state), EVERY_MS);
  }

  stop() {
    clearTimeout(this.#timer);
  }

  async #ask(state) {
    const timer = this.#timer;
    try {
      const job = await ask(`/jobs/${state.id}`);
      if (state.job.status === "queued") state.job.queue_position = job.queue_position;
      this.#changed();
    } catch {
      // The stream says what is wrong.
    }
    if (timer === this.#timer) this.watch(state);
  }
}
