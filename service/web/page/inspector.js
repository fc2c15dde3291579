// The event inspector: frames as they came, newest first; pause, look into one, copy as curl. Keeps the last thousand and draws the last two hundred.

import { signedIn } from "./api.js";
import { $, copyText, h, say, wireCopy } from "./dom.js";
import { shellQuote } from "./words.js";

const KEPT = 1000;
const SHOWN = 200;
const PASSING = new Set(["turn.partial", "job.progress"]);

export class Inspector {
  #frames = [];
  #paused = null; // the frames as they were when paused
  #drawn = 0; // serial of the newest frame drawn
  #serial = 0;
  #id;

  constructor() {
    $("pause").addEventListener("click", () => this.#pause());
    $("with-passing").addEventListener("change", () => this.#redraw());
    wireCopy($("copy-follow"), () => followCommand(this.#id, this.#frames.findLast(({ event }) => event.id)?.event.id ?? 0));
  }

  open(id) {
    this.#id = id;
    this.#frames = [];
    this.#paused = null;
    $("pause").setAttribute("aria-pressed", "false");
    say($("pause"), "Pause");
    this.#redraw();
  }

  add(event, raw) {
    this.#serial += 1;
    this.#frames.push({ serial: this.#serial, event, raw });
    if (this.#frames.length > KEPT * 1.2) this.#frames.splice(0, this.#frames.length - KEPT);
  }

  /** Draw what came since the last time. */
  render() {
    if ($("details").hidden) return;
    say($("frame-count"), this.#serial ? `${this.#serial.toLocaleString("en")} so far${this.#serial > KEPT ? `, the last ${KEPT.toLocaleString("en")} kept` : ""}` : "");
    if (this.#paused) return;
    const fresh = this.#visible().filter(({ serial }) => serial > this.#drawn);
    if (!fresh.length) return;
    const list = $("frames");
    list.prepend(...fresh.slice(-SHOWN).map(row.bind(null, this.#id)).reverse());
    while (list.childElementCount > SHOWN) list.lastElementChild.remove();
    this.#drawn = this.#serial;
  }

  #visible() {
    const frames = this.#paused ?? this.#frames;
    return $("with-passing").checked ? frames : frames.filter(({ event }) => !PASSING.has(event.type));
  }

  #redraw() {
    this.#drawn = 0;
    $("frames").replaceChildren();
    if (this.#paused) $("frames").replaceChildren(...this.#visible().slice(-SHOWN).map(row.bind(null, this.#id)).reverse());
    else this.render();
  }

  #pause() {
    this.#paused = this.#paused ? null : [...this.#frames];
    $("pause").setAttribute("aria-pressed", String(this.#paused !== null));
    say($("pause"), this.#paused ? "Paused" : "Pause");
    if (!this.#paused) this.#redraw();
  }
}

function row(jobId, { event, raw }) {
  const body = h("div");
  const details = h("details", {},
    h("summary", {}, h("span", { class: "frame-id" }, event.id ?? "–"), h("span", { class: "frame-at" }, (event.at ?? "").slice(11, 19)), h("span", { class: "frame-type" }, event.type, gist(event))),
    body);
  details.addEventListener("toggle", () => {
    if (!details.open || body.childElementCount) return;
    const from = Math.max(0, (event.id ?? 1) - 1);
    body.append(
      h("pre", { tabindex: "0" }, JSON.stringify(event, null, 2)),
      h("p", { class: "buttons" },
        h("button", { type: "button", class: "button small", onclick: () => copyText(raw) }, "Copy JSON"),
        h("button", { type: "button", class: "button small", onclick: () => copyText(followCommand(jobId, from)) }, "Copy as curl")),
    );
  });
  return h("li", { class: PASSING.has(event.type) ? "passing" : "" }, details);
}

function gist({ type, turn, status, stage, sent_ms: sent, code, model }) {
  const told = turn?.transcript ?? (type === "job.status" ? [status, stage].filter(Boolean).join(", ") : type === "job.progress" ? `${sent} ms` : (code ?? model ?? ""));
  return told === "" || told === null ? "" : ` ${String(told).slice(0, 80)}`;
}

/** A command that follows the job from an event on. It names the key and does not hold it. */
function followCommand(id, after) {
  const key = signedIn() ? ` -H "Authorization: Bearer $TURNWIRE_KEY"` : "";
  const from = after ? ` -H 'Last-Event-ID: ${after}'` : "";
  return `curl -N${key}${from} ${shellQuote(`${location.origin}/jobs/${id}/events`)}`;
}
