// Details for engineers: the job, its sessions, coverage, warnings. Drawn only while open.

import { $, h, say } from "./dom.js";
import { bytes, channelsOf, clock, encodingOf, hertz } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

export class Details {
  #key = "";

  render(state) {
    const { job } = state;
    if (!job || $("details").hidden) return;
    const key = JSON.stringify(job);
    if (key === this.#key) return;
    this.#key = key;
    $("about").replaceChildren(...about(job));
    $("sessions").replaceChildren(...(job.sessions.length ? job.sessions.map(session) : [h("p", { class: "soft" }, "None has been opened yet.")]));
    $("coverage").replaceChildren(...coverage(job));
    const warnings = job.warnings.map(({ code, message }) => h("li", {}, h("span", { class: "mono" }, code), ` ${message}`));
    $("warnings").replaceChildren(...(warnings.length ? warnings : [h("li", { class: "soft" }, "None.")]));
  }

  clear() {
    this.#key = "";
    for (const id of ["about", "sessions", "coverage", "warnings"]) $(id).replaceChildren();
    say($("frame-count"), "");
  }
}

function pairs(...entries) {
  return entries.filter(([, value]) => value !== null && value !== undefined && value !== "").flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
}

function about(job) {
  const { audio } = job;
  const facts = [`${clock(audio.duration_ms)}`, hertz(audio.sample_rate), channelsOf(audio.channels), encodingOf(audio.encoding), bytes(audio.bytes)];
  const time = (iso) => (iso ? new Date(iso).toLocaleString() : null);
  return pairs(
    ["Id", h("span", { class: "mono" }, job.id)],
    ["Status", [job.status, job.stage].filter(Boolean).join(", ")],
    ["File", h("bdi", {}, job.filename)],
    ["Audio", `${facts.join(" · ")}${audio.converted ? " · converted" : ""}`],
    ["SHA-256", h("span", { class: "mono" }, audio.sha256)],
    ["Uploaded", time(job.created_at)],
    ["Started", time(job.started_at)],
    ["Ended", time(job.finished_at)],
    ["Attempt", job.attempt ? String(job.attempt) : null],
    ["Options", h("span", { class: "mono" }, Object.entries(job.options).map(([name, value]) => `${name}=${JSON.stringify(value)}`).join(" "))],
    ["Metadata", Object.keys(job.metadata ?? {}).length ? h("span", { class: "mono" }, JSON.stringify(job.metadata)) : null],
  );
}

function session({ id, model, channel, offset_ms: offset, sent_ms: sent, audio_duration_seconds: audio, session_duration_seconds: billed, closed }) {
  const seconds = (n) => (n === null || n === undefined ? null : `${n.toLocaleString("en")} s`);
  const code = closed && closed.code !== null ? ` (${closed.code})` : "";
  return h("dl", { class: "session" }, ...pairs(
    ["Session", h("span", { class: "mono" }, id)],
    ["Model", model],
    ["Channel", channel === null || channel === undefined ? null : String(channel + 1)],
    ["From", clock(offset)],
    ["Handed over", sent === null ? null : clock(sent)],
    ["Heard upstream", seconds(audio)],
    ["Session time", seconds(billed)],
    ["Ended", closed ? `${closed.reason || "closed"}${code}` : "open"],
  ));
}

function coverage(job) {
  const { coverage: told, audio, progress } = job;
  const total = audio.duration_ms || 1;
  const gaps = told?.gaps ?? [];
  const sent = told?.sent_ms ?? progress.sent_ms;
  const bar = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({ class: "span-bar", viewBox: "0 0 1000 8", preserveAspectRatio: "none", "aria-hidden": "true" })) bar.setAttribute(name, value);
  bar.append(stretch("sent", 0, told ? Math.max(progress.sent_ms, sent) : sent, total), ...gaps.map(({ from_ms: from, to_ms: to }) => stretch("gap", from, to, total)));
  if (!told) return [bar, h("p", { class: "soft" }, `${clock(sent)} of ${clock(total)} sent so far.`)];
  return [bar, h("dl", {}, ...pairs(
    ["File", clock(told.file_ms)],
    ["Handed over", clock(told.sent_ms)],
    ["Heard upstream", told.upstream_ms === null ? "not told" : clock(told.upstream_ms)],
    ["Last word", told.last_word_ms === null ? "none" : clock(told.last_word_ms)],
    ["Gaps", gaps.length ? gaps.map(({ from_ms: from, to_ms: to }) => `${clock(from)}–${clock(to)}`).join(", ") : "none"],
    ["Complete", told.complete ? "yes" : "no"],
  ))];
}

function stretch(name, from, to, total) {
  const rect = document.createElementNS(SVG, "rect");
  const place = { class: name, x: (from / total) * 1000, width: Math.max(name === "gap" ? 4 : 0, ((to - from) / total) * 1000), height: 8 };
  for (const [attribute, value] of Object.entries(place)) rect.setAttribute(attribute, String(value));
  return rect;
}
