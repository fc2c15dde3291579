// Numbers and names as people say them. Pure.

/** `04:12`, or `1:04:12` from an hour on. */
export function clock(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  const pad = (n) => String(n).padStart(2, "0");
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  return h ? `${h}:${pad(m)}:${pad(s)}` : `${pad(m)}:${pad(s)}`;
}

/** For ears: `4 minutes 12 seconds`. */
export function spokenClock(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  const parts = [
    [Math.floor(seconds / 3600), "hour"],
    [Math.floor(seconds / 60) % 60, "minute"],
    [seconds % 60, "second"],
  ];
  const said = parts.filter(([n]) => n).map(([n, unit]) => count(n, unit));
  return said.join(" ") || "0 seconds";
}

const numbers = new Intl.NumberFormat("en");

/** `1 turn`, `3 turns`, `3,000 turns`. */
export const count = (n, noun) => `${numbers.format(n)} ${noun}${n === 1 ? "" : "s"}`;

const SMALL = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"];

/** `two`, but `12`. */
export const spelled = (n) => SMALL[n] ?? numbers.format(n);

/** `Two`. */
export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const PLACES = ["", "next", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"];

/** A place in a queue: `next in line`, `third in line`, `23rd in line`. */
export function inLine(position) {
  const tail = { 1: "st", 2: "nd", 3: "rd" }[position % 10];
  const suffix = tail && ![11, 12, 13].includes(position % 100) ? tail : "th";
  return `${PLACES[position] ?? `${position}${suffix}`} in line`;
}

/** `344 kB`, `1.2 GB`. */
export function bytes(n) {
  if (n < 1000) return `${n} bytes`;
  const units = ["kB", "MB", "GB", "TB"];
  let unit = -1;
  do {
    n /= 1000;
    unit += 1;
  } while (n >= 999.5 && unit < units.length - 1);
  return `${n < 10 ? n.toFixed(1) : Math.round(n)} ${units[unit]}`;
}

/** `16 kHz`, `44.1 kHz`. */
export const hertz = (rate) => `${+(rate / 1000).toFixed(3)} kHz`;

/** `mono`, `stereo`, `6 channels`. */
export const channelsOf = (n) => (n === 1 ? "mono" : n === 2 ? "stereo" : `${n} channels`);

const ENCODINGS = {
  pcm_u8: "8-bit", pcm_s16le: "16-bit", pcm_s24le: "24-bit", pcm_s32le: "32-bit",
  pcm_f32le: "32-bit float", pcm_f64le: "64-bit float", pcm_alaw: "A-law", pcm_mulaw: "µ-law",
};

/** ffmpeg's name of an encoding in plain words. */
export const encodingOf = (name) => ENCODINGS[name] ?? name;

/** `today 14:05`, `Tue 14:05`, `3 Nov`. */
export function when(iso, now = new Date()) {
  const then = new Date(iso);
  const time = then.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit" });
  if (then.toDateString() === now.toDateString()) return time;
  if (now - then < 6 * 86_400_000) return `${then.toLocaleDateString(undefined, { weekday: "short" })} ${time}`;
  return then.toLocaleDateString(undefined, { day: "numeric", month: "short", year: now.getFullYear() === then.getFullYear() ? undefined : "numeric" });
}

/** A sentence ends with a stop. */
export const sentence = (text) => (/[.!?…]$/.test(text.trim()) ? text.trim() : `${text.trim()}.`);

/** A word safe in a POSIX shell, and no option of the command that gets it. */
export function shellQuote(text) {
  const word = text.startsWith("-") ? `./${text}` : text;
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
