// One job as the page knows it: the fold of its events. Pure, no DOM, no network.
//
// The log of events is the truth and is read from its start. Events up to `known` (the newest when the job itself was read) only bring text: what they say
// of status was over before the page opened. Applying is idempotent, so an event seen twice changes nothing. Text is withdrawn by `job.restarted` only;
// after `stream.reset` the old turns stay until the log has been read again.

const SILENT = new Set(["job.progress", "turn.partial", "stream.reset"]);

export const TERMINAL = new Set(["completed", "failed", "canceled"]);

export class JobState {
  constructor(id) {
    this.id = id;
    this.job = null;
    this.turns = [];
    this.touched = new Set(); // indexes whose turn changed after it was shown; the transcript clears it
    this.partials = new Map(); // session → partial turn
    this.lastId = 0;
    this.known = 0;
    this.lost = null; // the last session.lost that no session.begin has followed
    this.reread = null; // while the log is read again after a reset: how many turns it has given so far
  }

  /** The job as GET tells it, at event `newest`. */
  seed(job, newest) {
    const sent = this.job?.attempt === job.attempt && this.job.status === job.status ? this.job.progress.sent_ms : 0;
    this.job = job;
    this.job.progress.sent_ms = Math.max(sent, job.progress.sent_ms);
    this.known = newest;
    if (this.terminal) this.partials.clear();
    this.settle();
  }

  get terminal() {
    return this.job !== null && TERMINAL.has(this.job.status);
  }

  /** True once everything that was there when the job was read is here too. */
  get caughtUp() {
    return this.job !== null && this.lastId >= this.known;
  }

  /** Milliseconds from the word to its caption, the middle one of the last five turns; null before the first. */
  get latencyMs() {
    const last = this.turns.slice(-5).map((turn) => turn.latency_ms).filter((ms) => ms !== null && ms !== undefined);
    return last.length ? last.sort((a, b) => a - b)[last.length >> 1] : null;
  }

  /** Where the text ends: nothing before it is said again. */
  get reachedMs() {
    return this.turns.reduce((most, turn) => Math.max(most, turn.end_ms), 0);
  }

  apply(event) {
    const durable = event.id !== null && event.id !== undefined;
    if (durable && event.id <= this.lastId) return;
    const old = durable && event.id <= this.known;
    HANDLERS[event.type]?.(this, event);
    if (!old && !SILENT.has(event.type)) NEWS[event.type]?.(this, event);
    if (durable) {
      this.lastId = event.id;
      this.settle();
    }
  }

  /** After a reset: the log has been read again, so turns it did not give are gone. */
  settle() {
    if (this.reread === null || this.lastId < this.known) return;
    this.turns.length = Math.min(this.turns.length, this.reread);
    this.reread = null;
  }

  put(turn) {
    for (const [session, partial] of this.partials) {
      if (session === turn.session_id && partial.turn_order <= turn.turn_order) this.partials.delete(session);
    }
    if (turn.index < this.turns.length) this.touched.add(turn.index);
    this.turns[turn.index] = turn;
    if (this.reread !== null) this.reread = Math.max(this.reread, turn.index + 1);
    if (this.job) this.job.turn_count = Math.max(this.job.turn_count, this.turns.length);
  }
}

// What changes the text, whenever it is read.
const HANDLERS = {
  "turn.final": (state, { turn }) => state.put(turn),
  "turn.revised": (state, { turn }) => state.put(turn),
  "turn.partial": (state, { turn }) => state.partials.set(turn.session_id, turn),
  "job.restarted": (state, { from_turn }) => {
    if (state.reread === null) state.turns.length = Math.min(state.turns.length, from_turn);
    else state.reread = Math.min(state.reread, from_turn);
    for (const index of state.touched) if (index >= state.turns.length) state.touched.delete(index);
    state.partials.clear();
    state.lost = null;
  },
  "session.begin": (state) => (state.lost = null),
  "session.lost": (state, event) => {
    state.lost = event;
    state.partials.delete(event.session_id);
  },
  "job.progress": (state, { sent_ms, total_ms }) => {
    if (state.job && !state.terminal) state.job.progress = { sent_ms: Math.max(sent_ms, state.job.progress.sent_ms), total_ms };
  },
  "stream.reset": (state) => {
    state.lastId = 0;
    state.reread = 0;
    state.partials.clear();
  },
};

// What is news only when it is newer than the job that was read.
const NEWS = {
  "job.status": ({ job }, { status, stage }) => Object.assign(job, { status, stage }),
  "job.restarted": (state, { from_turn }) => {
    Object.assign(state.job, { error: null, coverage: null, finished_at: null, turn_count: from_turn });
    if (!from_turn) Object.assign(state.job, { sessions: [], progress: { ...state.job.progress, sent_ms: 0 } });
  },
  "session.begin": (state, { session_id, model, offset_ms, channel }) => {
    if (state.job.sessions.some(({ id }) => id === session_id)) return;
    state.job.sessions.push({ id: session_id, model, channel, offset_ms, sent_ms: null, audio_duration_seconds: null, closed: null });
  },
  "session.lost": (state, event) => {
    const session = state.job.sessions.find(({ id }) => id === event.session_id);
    if (session) session.closed = { code: event.code, reason: event.reason };
  },
  "job.warning": ({ job }, { code, message }) => {
    if (!job.warnings.some((known) => known.code === code && known.message === message)) job.warnings.push({ code, message });
  },
  "job.completed": ended,
  "job.failed": ended,
  "job.canceled": ended,
};

function ended(state, { job }) {
  state.job = job;
  state.partials.clear();
  state.lost = null;
}
