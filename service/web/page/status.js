// What is going on, in one mark and one sentence. Pure.

import { capital, clock, count, inLine, spelled } from "./words.js";

/** `{tone, sentence, aside}`: the sentence is announced, the aside changes by the second and is only seen. */
export function describe(state, stream) {
  const broken = connection(stream);
  if (broken) return broken;
  const { job } = state;
  if (!job) return { tone: "calm", sentence: "Loading.", aside: "" };
  const told = (STATUS[job.status] ?? unknown)(job, state);
  const note = stream.note && job.status === "processing" ? stream.note : "";
  return { ...told, aside: [told.aside, note].filter(Boolean).join(" · ") };
}

function connection({ name, seconds }) {
  const lost = { tone: "amber", sentence: "Server unreachable. The text is safe.", aside: "" };
  if (name === "waiting") return { ...lost, aside: `Trying again in ${seconds} s.` };
  if (name === "signed-out") return { tone: "amber", sentence: "Signed out. Sign in to go on; the text is safe.", aside: "" };
  return null;
}

const STATUS = {
  queued: (job, state) => {
    const place = job.queue_position ? `, ${inLine(job.queue_position)}` : "";
    if (!state.lost) return { tone: "calm", sentence: `Queued${place}. It starts by itself.`, aside: "" };
    return { tone: "amber", sentence: `Waiting for capacity at AssemblyAI${place}. It goes on by itself.`, aside: why(state) };
  },
  processing: (job, state) => (STAGES[job.stage] ?? unknown)(job, state),
  completed: (job) => {
    const took = job.started_at ? ` in ${clock(Date.parse(job.finished_at) - Date.parse(job.started_at))}` : "";
    const whole = job.coverage?.complete !== false;
    return { tone: whole ? "calm" : "amber", sentence: whole ? "Done" : "Done, but not all of it", aside: `${count(job.turn_count, "turn")}${took}` };
  },
  failed: (job) => ({ tone: "red", sentence: `Stopped at ${clock(job.progress.sent_ms)}`, aside: kept(job) }),
  canceled: (job) => ({ tone: "calm", sentence: `Canceled at ${clock(job.progress.sent_ms)}`, aside: kept(job) }),
};

const STAGES = {
  validating: () => ({ tone: "calm", sentence: "Checking the stored audio.", aside: "" }),
  connecting: () => ({ tone: "calm", sentence: "Connecting to AssemblyAI.", aside: "" }),
  streaming: (job, state) => {
    const left = Math.max(0, job.progress.total_ms - job.progress.sent_ms);
    const behind = state.latencyMs === null ? [] : [`captions ${(state.latencyMs / 1000).toFixed(1)} s behind`];
    return { tone: "live", sentence: "Live", aside: [...behind, `${clock(left)} left`].join(" · ") };
  },
  finalizing: () => ({ tone: "live", sentence: "All audio is sent. Waiting for the last words.", aside: "" }),
  reconnecting: (job, state) => ({ tone: "amber", sentence: `Connection to AssemblyAI lost. Resuming from ${clock(state.reachedMs)}, nothing is missing.`, aside: why(state) }),
  waiting_for_capacity: (job, state) => ({ tone: "amber", sentence: "Waiting for capacity at AssemblyAI. It goes on by itself.", aside: why(state) }),
};

/** Why upstream ended: its own words, with the code where there is one. */
function why({ lost }) {
  if (!lost) return "";
  return [lost.reason, lost.code === null ? null : `(${lost.code})`].filter(Boolean).join(" ");
}

/** New stages may come; their names are plain. */
const unknown = (job) => ({ tone: "calm", sentence: `${capital(String(job.stage ?? job.status).replaceAll("_", " "))}.`, aside: "" });

const kept = (job) => (job.turn_count ? `${count(job.turn_count, "turn")} kept` : "");

/** What stands where no text is. */
export function blank({ job, terminal, caughtUp }) {
  if (!caughtUp) return "";
  if (terminal) return job.status === "completed" ? "Nothing was said in this file." : "";
  if (job.status === "processing" && job.stage === "streaming") return "The first words will stand here.";
  return "";
}

const HEADINGS = {
  upstream_auth: "AssemblyAI refused the key",
  upstream_rejected: "AssemblyAI refused the request",
  upstream_unavailable: "AssemblyAI could not be reached in time",
  upstream_protocol: "AssemblyAI was not understood",
  audio_corrupt: "The stored audio is damaged",
  audio_missing: "The stored audio is gone",
  too_many_attempts: "Several attempts ended without a word",
};

/** What a card says after an end that was not a whole one, or null. */
export function aftermath(state) {
  const { job } = state;
  const retryable = { retry: true };
  if (job?.status === "failed") {
    const { code, message, upstream_code: upstream } = job.error ?? { code: "internal", message: "It gave no reason.", upstream_code: null };
    const lost = code === "audio_corrupt" || code === "audio_missing";
    return {
      tone: "red", heading: HEADINGS[code] ?? "Turnwire could not finish this", text: message, kept: whatIsKept(job, !lost),
      code: upstream === null ? code : `${code} · upstream ${upstream}`, retry: !lost,
    };
  }
  if (job?.status === "canceled") return { tone: "calm", heading: "Canceled", text: whatIsKept(job, true), kept: "", code: "", ...retryable };
  if (job?.status === "completed" && job.coverage?.complete === false) {
    return { tone: "amber", ...incomplete(job.coverage), code: "", ...retryable };
  }
  return null;
}

function whatIsKept(job, audio) {
  const { turn_count: turns, progress, audio: file } = job;
  const streamed = progress.sent_ms ? `${clock(progress.sent_ms)} of ${clock(file.duration_ms)} were streamed.` : "Nothing was streamed.";
  const things = [turns === 1 ? "the one turn until then" : turns ? `all ${count(turns, "turn")} until then` : "", audio ? "the upload" : ""].filter(Boolean);
  const rest = things.length ? `${capital(things.join(" and "))} ${things.length > 1 || turns > 1 ? "are" : "is"} kept.` : "";
  return [streamed, rest].filter(Boolean).join(" ");
}

function incomplete({ gaps, file_ms: file, upstream_ms: upstream }) {
  if (gaps.length) {
    const heading = gaps.length === 1 ? "One stretch was not transcribed" : `${capital(spelled(gaps.length))} stretches were not transcribed`;
    return { heading, text: "", gaps, kept: "Retry to transcribe from the last turn on, or all of it again." };
  }
  const heard = upstream === null ? "AssemblyAI did not confirm how much it heard" : `AssemblyAI says it heard ${clock(upstream)} of ${clock(file)}`;
  return { heading: "The end may be incomplete", text: `${heard}.`, kept: "" };
}
