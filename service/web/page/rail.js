// The recent jobs: searchable, with status, kept fresh while the tab is seen.

import { ask } from "./api.js";
import { $, h, icon, say, show } from "./dom.js";
import { TERMINAL } from "./job.js";
import { clock, when } from "./words.js";

const PAGE = 40;
const BUSY_MS = 5000;
const CALM_MS = 15_000;
const ICONS = { queued: "clock", processing: "wave", completed: "check", failed: "stop", canceled: "stop" };

export class Rail {
  #entries = new Map(); // id → {element, key}
  #jobs = [];
  #cursor = null;
  #pages = 1;
  #timer = 0;
  #asked = 0;
  #on;
  #plainSearch = false; // the server does not search: filter by file name here

  /** `on.job(job)` for every job read. */
  constructor(on) {
    this.#on = on;
    let typed = 0;
    $("search").addEventListener("input", () => {
      clearTimeout(typed);
      this.#pages = 1;
      typed = setTimeout(() => this.refresh(), 150);
    });
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && $("search").value) {
        $("search").value = "";
        this.refresh();
      } else if (event.key === "Enter" || event.key === "ArrowDown") {
        event.preventDefault();
        $("jobs").querySelector("a")?.focus();
      }
    });
    $("jobs").addEventListener("keydown", (event) => this.#walk(event));
    $("more").addEventListener("click", () => {
      this.#pages += 1;
      this.refresh();
    });
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.refresh();
    });
  }

  /** Read the list again, and from time to time from now on. */
  async refresh() {
    clearTimeout(this.#timer);
    const asked = (this.#asked += 1);
    try {
      const jobs = await this.#read();
      if (asked !== this.#asked) return;
      this.#jobs = jobs;
      for (const job of jobs) this.#on.job(job);
      this.#draw();
    } catch {
      // The view says when the server is away; the list stays as it was.
    }
    // The open job tells of itself.
    const busy = this.#jobs.some(({ id, status }) => id !== this.currentId && !TERMINAL.has(status));
    if (!document.hidden && asked === this.#asked) this.#timer = setTimeout(() => this.refresh(), busy ? BUSY_MS : CALM_MS);
  }

  clear() {
    clearTimeout(this.#timer);
    this.#asked += 1;
    this.#jobs = [];
    this.#draw();
  }

  /** The open view knows its job better than the last reading. */
  touch(job) {
    const index = this.#jobs.findIndex(({ id }) => id === job.id);
    if (index < 0) return;
    this.#jobs[index] = job;
    this.#fill(this.#entries.get(job.id), job);
  }

  current(id) {
    this.currentId = id;
    for (const [job, { element }] of this.#entries) {
      const link = element.firstElementChild;
      if (job === id) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  async #read() {
    const q = $("search").value.trim();
    const jobs = [];
    this.#cursor = null;
    for (let page = 0; page < this.#pages && (page === 0 || this.#cursor); page += 1) {
      const query = new URLSearchParams({ limit: String(PAGE) });
      if (q && !this.#plainSearch) query.set("q", q);
      if (this.#cursor) query.set("cursor", this.#cursor);
      let answer;
      try {
        answer = await ask(`/jobs?${query}`);
      } catch (error) {
        if (!q || error.status !== 422 || this.#plainSearch) throw error;
        this.#plainSearch = true;
        return this.#read();
      }
      jobs.push(...answer.data);
      this.#cursor = answer.has_more ? answer.next_cursor : null;
    }
    if (!q || !this.#plainSearch) return jobs;
    return jobs.filter(({ filename }) => filename.toLowerCase().includes(q.toLowerCase()));
  }

  #draw() {
    const list = $("jobs");
    const wanted = new Set(this.#jobs.map(({ id }) => id));
    for (const [id, { element }] of this.#entries) {
      if (wanted.has(id)) continue;
      element.remove();
      this.#entries.delete(id);
    }
    this.#jobs.forEach((job, i) => {
      let entry = this.#entries.get(job.id);
      if (!entry) this.#entries.set(job.id, (entry = make(job)));
      this.#fill(entry, job);
      if (list.children[i] !== entry.element) list.insertBefore(entry.element, list.children[i] ?? null);
    });
    this.current(this.currentId);
    const searching = $("search").value.trim() !== "";
    show($("rail-note"), this.#jobs.length === 0);
    say($("rail-note"), searching ? "No job like that." : "Jobs will be listed here.");
    show($("more"), this.#cursor !== null);
  }

  #fill(entry, job) {
    const [tone, sign, status] = told(job);
    const key = [job.filename, tone, sign, status, job.created_at].join("\n");
    if (entry.key === key) return;
    entry.key = key;
    entry.link.dataset.tone = tone;
    entry.icon.querySelector("use").setAttribute("href", `#i-${sign}`);
    say(entry.file, job.filename);
    say(entry.status, status);
    say(entry.time, when(job.created_at));
  }

  #walk(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    const links = [...$("jobs").querySelectorAll("a")];
    const to = links.indexOf(document.activeElement) + by;
    event.preventDefault();
    if (to < 0) $("search").focus();
    else links[to]?.focus();
  }
}

function make(job) {
  const entry = { key: "", icon: icon("clock"), file: h("bdi", { class: "file" }), status: h("span"), time: h("span") };
  entry.link = h("a", { class: "entry", href: `/jobs/${job.id}/view` }, entry.icon, entry.file, h("span", { class: "about" }, entry.status, entry.time));
  entry.element = h("li", {}, entry.link);
  return entry;
}

/** Tone, icon and words of a job in a line. */
function told(job) {
  const sign = ICONS[job.status] ?? "clock";
  const length = clock(job.audio.duration_ms);
  if (job.status === "processing") return ["live", sign, `${clock(job.progress.sent_ms)} / ${length}`];
  if (job.status === "queued") return ["calm", sign, job.queue_position ? `Queued, ${job.queue_position}` : "Queued"];
  if (job.status === "failed") return ["red", sign, "Failed"];
  if (job.status === "canceled") return ["calm", sign, "Canceled"];
  if (job.coverage?.complete === false) return ["amber", "gap", `${length} · gaps`];
  return ["calm", sign, length];
}
