// The way of a file into the service: drop or pick, look at its header, ask what must be asked, send it with real progress.

import { authorization, session, signedIn, toProblem } from "./api.js";
import { $, h, say, sayCommand, show, wireCopy } from "./dom.js";
import { drawSteps } from "./steps.js";
import { readWav } from "./wav.js";
import { bytes, capital, channelsOf, encodingOf, hertz, spelled, spokenClock } from "./words.js";

export class Upload {
  #on;
  #file = null;
  #key = ""; // names this upload, so that sending it twice makes one job
  #sending = null;

  /** `on.accepted(job)`. */
  constructor(on) {
    this.#on = on;
    $("choose").addEventListener("click", () => $("file").click());
    $("other").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => {
      const [file] = $("file").files;
      $("file").value = "";
      if (file) this.look(file);
    });
    $("abort").addEventListener("click", () => this.#sending?.abort());
    $("sheet").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#file && !$("send").hidden) this.#send();
    });
    wireCopy($("copy-ffmpeg"), () => $("ffmpeg").textContent);
    wireCopy($("copy-curl"), () => $("curl").textContent);
    for (const name of ["signed-in", "signed-out"]) session.addEventListener(name, () => this.#tellCurl());
    this.#tellCurl();
  }

  get busy() {
    return this.#sending !== null;
  }

  /** Back to the invitation. */
  reset() {
    if (this.busy) return;
    this.#file = null;
    this.#stage("invitation");
  }

  /** Read a file's header and say what it is. */
  async look(file) {
    if (this.busy) return;
    this.#file = file;
    this.#key = newKey();
    let info;
    try {
      info = await readWav(file);
    } catch {
      info = { name: file.name, bytes: file.size, notes: [], trouble: { text: "The browser cannot read this file. Is it a folder, or gone?", command: null } };
    }
    if (this.#file !== file) return;
    this.#describe(info);
    this.#stage("looked");
    show($("send"), !info.trouble);
    if (info.trouble) $("other").focus();
    else $("send").focus();
  }

  #describe(info) {
    const facts = [
      info.durationMs ? spokenClock(info.durationMs) : null,
      info.rate ? hertz(info.rate) : null,
      info.channels ? channelsOf(info.channels) : null,
      info.encoding ? encodingOf(info.encoding) : null,
      bytes(info.bytes),
    ];
    say($("sheet-name"), info.name);
    say($("facts"), facts.filter(Boolean).join(" · "));
    this.#trouble(info.trouble);
    $("notes").replaceChildren(...info.notes.map((note) => h("li", {}, note)));
    const several = !info.trouble && info.channels > 1;
    show($("question"), several);
    if (several) {
      const name = info.channels === 2 ? "Stereo: two channels" : `${capital(spelled(info.channels))} channels`;
      say($("question-text"), `${name}. Mix them, take the first, or transcribe each on its own?`);
      say($("split-note"), `${capital(spelled(info.channels))} sessions at once; every turn says its channel.`);
    }
    say($("estimate"), info.trouble ? "" : `It is heard in real time, so it takes ${spokenClock(info.durationMs)}.`);
  }

  #trouble(trouble) {
    show($("trouble"), Boolean(trouble));
    say($("trouble-text"), trouble?.text ?? "");
    show($("trouble-command"), Boolean(trouble?.command));
    sayCommand($("ffmpeg"), trouble?.command ?? "");
  }

  #send() {
    const file = this.#file;
    const query = new URLSearchParams({ filename: file.name });
    if (!$("question").hidden) query.set("channels", new FormData($("sheet")).get("channels"));
    // fetch tells no upload progress yet; XMLHttpRequest does.
    const sending = (this.#sending = new XMLHttpRequest());
    sending.open("POST", `/jobs?${query}`);
    const headers = { ...authorization(), "Content-Type": "audio/wav", "Idempotency-Key": this.#key };
    for (const [name, value] of Object.entries(headers)) sending.setRequestHeader(name, value);
    sending.upload.onprogress = ({ loaded }) => this.#sent(loaded, file.size);
    sending.onload = () => this.#answered(sending);
    sending.onerror = () => this.#ended({ text: "The connection broke before the upload was whole. Nothing was kept; send it again." });
    sending.onabort = () => this.#ended(null);
    this.#trouble(null);
    this.#sent(0, file.size);
    this.#stage("sending");
    $("abort").focus();
    sending.send(file);
  }

  #sent(loaded, size) {
    $("sent-bar").value = size ? loaded / size : 0;
    say($("sent-text"), loaded < size ? `${bytes(loaded)} of ${bytes(size)}` : "All sent; Turnwire is storing it.");
  }

  #answered(sending) {
    let told = {};
    try {
      told = JSON.parse(sending.responseText);
    } catch {
      // No JSON: the status has to do.
    }
    if (sending.status >= 200 && sending.status < 300) {
      this.#sending = null;
      this.#file = null;
      this.#stage("invitation");
      this.#on.accepted(told);
      return;
    }
    if (sending.status === 401) session.dispatchEvent(new Event("signed-out"));
    const [, text, command] = /^(.*?)\s*(ffmpeg -i .*)?$/s.exec(toProblem(sending.status, told).message);
    this.#ended({ text, command: command ?? null });
  }

  #ended(trouble) {
    this.#sending = null;
    this.#trouble(trouble);
    this.#stage("looked");
    show($("send"), true);
    $("send").focus();
  }

  /** invitation, looked or sending. */
  #stage(name) {
    const sending = name === "sending";
    show($("invitation"), name === "invitation");
    show($("sheet"), name !== "invitation");
    $("drop").classList.toggle("busy", name !== "invitation");
    drawSteps($("upload-steps"), sending ? "Upload" : null);
    show($("upload-progress"), sending);
    show($("abort"), sending);
    show($("other"), !sending);
    show($("send"), !sending);
    $("question").disabled = sending;
  }

  #tellCurl() {
    const key = signedIn() ? ` -H "Authorization: Bearer $TURNWIRE_KEY"` : "";
    sayCommand($("curl"), `curl -N -H 'Accept: text/event-stream'${key} -F file=@audio.wav ${location.origin}/jobs`);
  }
}

function newKey() {
  const digits = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(digits, (digit) => digit.toString(16).padStart(2, "0")).join("");
}
