// What can be done with a job: cancel, retry, copy, download, delete. Errors become a toast in the server's own words.

import { ask, link, request } from "./api.js";
import { $, announce, copyText, h, say, show } from "./dom.js";
import { clock, count } from "./words.js";
import { speakerOf } from "./transcript.js";

let toastTimer = 0;

/** A sentence that goes away by itself. */
export function toast(text, seconds = 7) {
  const box = $("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), seconds * 1000);
}

export class Actions {
  #view;

  constructor(view) {
    this.#view = view;
    this.#on("copy", () => this.copy());
    this.#on("cancel", () => this.cancel());
    this.#on("retry-here", () => this.retry("here"));
    this.#on("retry-start", () => this.retry("start"));
    this.#on("delete", () => this.delete());
    this.#on("speak", () => this.speak());
    for (const item of $("downloads").querySelectorAll("[data-format]")) {
      item.addEventListener("click", () => this.#guard(() => this.download(item.dataset.format)));
    }
    for (const menu of document.querySelectorAll(".menu")) wireMenu(menu);
  }

  /** What may be done now. */
  render(state) {
    const { terminal, job } = state;
    const retryable = job && (job.status === "failed" || job.status === "canceled" || (job.status === "completed" && job.coverage?.complete === false));
    show($("cancel"), Boolean(job) && !terminal);
    show($("retry-here"), Boolean(retryable));
    show($("retry-start"), Boolean(retryable));
    show($("partial-note"), !terminal);
  }

  /** Whether new turns are announced to a screen reader. */
  get speaking() {
    return $("speak").getAttribute("aria-checked") === "true";
  }

  speak() {
    const on = !this.speaking;
    $("speak").setAttribute("aria-checked", String(on));
    announce(on ? "Turns are announced" : "Turns are not announced");
    this.#view.draw();
  }

  async copy() {
    const { state } = this.#view;
    const text = state.turns.map((turn) => [speakerOf(turn), turn.transcript].filter(Boolean).join(": ")).join("\n");
    const done = await copyText(text);
    const note = done ? `Copied ${count(state.turns.length, "turn")}` : "The browser refused to copy";
    const label = $("copy").querySelector(".label");
    say(label, done ? "Copied" : "Not copied");
    setTimeout(() => say(label, "Copy"), 1600);
    announce(state.terminal ? note : `${note}, as far as it goes`);
  }

  async cancel() {
    $("cancel").disabled = true;
    await this.#change("cancel");
    $("cancel").disabled = false;
  }

  async retry(from) {
    if (await this.#change("retry", from === "start" ? { from: "start" } : {})) this.#view.again();
  }

  async download(format) {
    const { state } = this.#view;
    const name = state.job.filename.replace(/\.[^.]*$/, "") || "audio";
    const partial = state.terminal || format === "wav" ? "" : `.partial-${clock(state.job.progress.sent_ms).replaceAll(":", "-")}`;
    const url = await link(state.id, format === "wav" ? "audio" : `transcript.${format}`);
    const anchor = h("a", { href: url, download: format === "wav" ? state.job.filename : `${name}${partial}.${format}` });
    document.body.append(anchor);
    anchor.click();
    anchor.remove();
  }

  async delete() {
    const { job, turns } = this.#view.state;
    say($("confirm-title"), `Delete ${job.filename}?`);
    const what = turns.length ? `its ${count(turns.length, "turn")}` : "its transcript";
    say($("confirm-text"), `The audio and ${what} will be gone for good.${this.#view.state.terminal ? "" : " The job is canceled first."}`);
    const dialog = $("confirm");
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue !== "yes") return;
    await this.#guard(async () => {
      await request(`/jobs/${job.id}`, { method: "DELETE" });
      this.#view.deleted();
    });
  }

  async #change(verb, json = {}) {
    return this.#guard(async () => {
      await ask(`/jobs/${this.#view.state.id}/${verb}`, { method: "POST", json });
      return true;
    });
  }

  #on(id, act) {
    $(id).addEventListener("click", () => this.#guard(act));
  }

  async #guard(act) {
    try {
      return await act();
    } catch (error) {
      toast(error.message);
      return false;
    }
  }
}

/** A menu closes at a choice, at a click elsewhere and at Escape. */
function wireMenu(menu) {
  const close = () => (menu.open = false);
  menu.addEventListener("click", (event) => {
    if (event.target.closest(".item:not([role='switch'])")) close();
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !menu.open) return;
    event.stopPropagation();
    close();
    menu.querySelector("summary").focus();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!menu.contains(event.target)) close();
  });
  menu.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !menu.contains(event.relatedTarget)) close();
  });
}
