// The page's one connection to a job's events, for as long as there is something to hear.
//
// The browser's own reconnecting is not used: it says nothing of when it tries again, and gives up for good at a 503. Each round reads the job first (so that
// "not there", "signed out" and "ended" are known for what they are), then opens an EventSource behind the last event id. Nothing is ever lost by that:
// the server replays from the id. States: connecting, live {again, replayed}, waiting {seconds}, resting, ended, signed-out, gone.

import { link, Problem, readJob } from "./api.js";

const TYPES = [
  "job.status", "job.progress", "session.begin", "session.lost", "turn.partial", "turn.final", "turn.revised", "job.restarted", "job.warning",
  "job.completed", "job.failed", "job.canceled", "stream.reset",
];
const DELAYS = [1, 2, 3, 5];
const SILENCE_MS = 20_000; // a streaming job says where it is each second
const OPEN_MS = 15_000;

export class Stream {
  #state;
  #on;
  #source = null;
  #round = null; // AbortController of the attempt under way
  #failures = 0;
  #timer = 0;
  #watch = 0;
  #heard = 0;
  #opened = false;
  #openedAt = 0;

  /** `on.state(name, detail)`, `on.event(event, raw)`, `on.job()` after the job was read anew. */
  constructor(state, on) {
    this.#state = state;
    this.#on = on;
  }

  /** Connect, now. Also what brings an ended or waiting stream back. */
  start() {
    this.#close();
    this.#connect();
  }

  stop() {
    this.#close();
    this.#tell("stopped");
  }

  /** Let go of the connection until `hurry`; what comes meanwhile is replayed. */
  rest() {
    if (this.name !== "live" && this.name !== "waiting") return;
    this.#close();
    this.#tell("resting");
  }

  /** Try at once if it is not connected: the network is back, a key is there, the tab is seen. */
  hurry() {
    if (["waiting", "resting", "signed-out"].includes(this.name)) this.start();
  }

  #tell(name, detail = {}) {
    this.name = name;
    this.#on.state(name, detail);
  }

  #close() {
    this.#round?.abort();
    this.#round = null;
    this.#source?.close();
    this.#source = null;
    clearTimeout(this.#timer);
    clearInterval(this.#watch);
  }

  async #connect() {
    const round = (this.#round = new AbortController());
    this.#tell("connecting");
    try {
      const { job, newest } = await readJob(this.#state.id, { signal: AbortSignal.any([round.signal, AbortSignal.timeout(OPEN_MS)]) });
      if (round.signal.aborted) return;
      this.#state.seed(job, newest);
      this.#on.job();
      if (this.#state.terminal && this.#state.lastId === newest) {
        this.#tell("ended");
        return;
      }
      const after = this.#state.lastId;
      const url = await link(this.#state.id, "events", after ? { last_event_id: after } : {});
      if (!round.signal.aborted) this.#open(url, newest - after);
    } catch (error) {
      if (!round.signal.aborted) this.#failed(error);
    }
  }

  #open(url, behind) {
    const source = (this.#source = new EventSource(url));
    this.#heard = Date.now();
    source.onopen = () => {
      this.#failures = 0;
      this.#openedAt = Date.now();
      this.#tell("live", { again: this.#opened, replayed: Math.max(0, behind) });
      this.#opened = true;
    };
    source.onerror = () => this.#dropped();
    for (const type of TYPES) source.addEventListener(type, (message) => this.#take(message));
    this.#watch = setInterval(() => this.#checkSilence(), 5_000);
  }

  #take(message) {
    this.#heard = Date.now();
    const event = JSON.parse(message.data);
    this.#state.apply(event);
    this.#on.event(event, message.data);
    if (this.#state.terminal && this.#state.caughtUp && event.type.startsWith("job.")) {
      this.#close();
      this.#tell("ended");
    }
  }

  /** A connection may die without a word: a laptop that slept, a proxy that forgot. */
  #checkSilence() {
    if (this.#state.job?.stage === "streaming" && Date.now() - this.#heard > SILENCE_MS) this.#dropped();
  }

  #dropped() {
    this.#close();
    // A server ends streams for good reasons (it drains, the job was handed on): look at once, but never in a tight circle.
    if (this.#failures === 0 && Date.now() - this.#openedAt > 2_000) this.#connect();
    else this.#wait();
  }

  #failed(error) {
    if (error instanceof Problem && error.status === 401) this.#tell("signed-out");
    else if (error instanceof Problem && error.status === 404) this.#tell("gone");
    else this.#wait();
  }

  #wait() {
    this.#close();
    let seconds = DELAYS[Math.min(this.#failures, DELAYS.length - 1)];
    this.#failures += 1;
    const tick = () => {
      if (seconds <= 0) {
        this.#connect();
        return;
      }
      this.#tell("waiting", { seconds });
      seconds -= 1;
      this.#timer = setTimeout(tick, 1000);
    };
    tick();
  }
}
