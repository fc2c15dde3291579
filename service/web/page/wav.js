// What a file is, read in the browser from its first bytes, so that a mistake shows before one is sent.
//
// The rules are those of the server (the bytes decide, never name or MIME type), which judges again. Only small slices are read: a chunk's header is
// looked at and its body skipped. `readWav` answers {name, bytes, encoding, rate, channels, durationMs, notes: [text], trouble: {text, command} | null}.

import { shellQuote } from "./words.js";

const MAX_CHUNKS = 1024;
const HEADER_BUDGET = 1 << 20;
const UNTOLD = new Set([0, 0xffffffff]);
const LINEAR = { 1: "PCM", 3: "float", 6: "A-law", 7: "µ-law" };
const ENCODINGS = {
  "1/8": ["pcm_u8", 1], "1/16": ["pcm_s16le", 2], "1/24": ["pcm_s24le", 3], "1/32": ["pcm_s32le", 4],
  "3/32": ["pcm_f32le", 4], "3/64": ["pcm_f64le", 8], "6/8": ["pcm_alaw", 1], "7/8": ["pcm_mulaw", 1],
};
const CODECS = {
  0x0002: "Microsoft ADPCM", 0x0011: "IMA ADPCM", 0x0031: "GSM 6.10", 0x0050: "MPEG audio", 0x0055: "MP3", 0x00ff: "AAC", 0x0161: "Windows Media Audio",
  0x1600: "AAC", 0x2000: "AC-3", 0x674f: "Vorbis", 0x704f: "Opus", 0xf1ac: "FLAC",
};
// KSDATAFORMAT_SUBTYPE_…: the format tag, then this.
const GUID_TAIL = "\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71";
const KNOWN = new Set(
  "data,fmt ,LIST,fact,ds64,bext,JUNK,junk,PAD ,FLLR,PEAK,cue ,smpl,inst,plst,iXML,axml,chna,id3 ,ID3 ,DISP,cart,umid,acid,afsp,levl,_PMX,qlty,mext,link,slnt,wavl,note,labl,ltxt".split(","),
);
// Offset, first bytes, name.
const AUDIO = [
  [0, "ID3", "an MP3"], [0, "\xff\xfb", "an MP3"], [0, "\xff\xf3", "an MP3"], [0, "\xff\xf1", "AAC audio"], [0, "OggS", "an Ogg file (Opus or Vorbis)"],
  [0, "fLaC", "a FLAC file"], [4, "ftyp", "an MP4 or M4A file"], [8, "AIFF", "an AIFF file"], [8, "AIFC", "an AIFF file"], [0, "caff", "an Apple CAF file"],
  [0, "\x1aE\xdf\xa3", "a Matroska or WebM file"], [0, "#!AMR", "an AMR file"], [0, "0&\xb2u", "a Windows Media file"], [0, ".snd", "a Sun AU file"],
  [0, "RIFX", "a big-endian WAV (RIFX)"], [0, "riff\x2e\x91\xcf\x11", "a Sony Wave64 file"], [8, "AVI ", "an AVI video"],
];
const OTHER = [
  [0, "PK\x03\x04", "a ZIP archive"], [0, "\x1f\x8b", "a gzip archive"], [0, "%PDF", "a PDF"], [0, "\x89PNG", "an image"],
  [0, "\xff\xd8\xff", "an image"], [0, "<", "a web page or XML"], [0, "{", "JSON text"], [0, "MThd", "MIDI, which holds notes and no sound"],
];

/** Raised inside; becomes `trouble`. */
class Trouble extends Error {
  constructor(text, rate = undefined) {
    super(text);
    this.rate = rate; // undefined: no command mends it
  }
}

/** The command that makes a WAV which is taken as it is; the same as the server's, with the file's own name. */
export function ffmpeg(name, rate) {
  const fit = rate === null ? 16_000 : rate > 96_000 ? 48_000 : Math.max(rate, 8_000);
  const target = name.replace(/\.[^.]*$/, "").replaceAll("/", "-") || "audio";
  return `ffmpeg -i ${shellQuote(name)} -ar ${fit} -ac 1 -sample_fmt s16 ${shellQuote(`${target}-mono.wav`)}`;
}

export async function readWav(file) {
  const info = { name: file.name, bytes: file.size, encoding: null, rate: null, channels: null, durationMs: null, notes: [], trouble: null };
  try {
    await walk(file, info);
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    info.trouble = { text: error.message, command: error.rate === undefined ? null : ffmpeg(file.name, error.rate) };
  }
  return info;
}

async function walk(file, info) {
  const riff64 = checkContainer(await bytesAt(file, 0, 12), file.size);
  let at = 12;
  let format = null;
  let wide = 0;
  let data = null;
  for (let chunks = 1; at + 8 <= file.size; chunks += 1) {
    const header = await bytesAt(file, at, 48);
    const [name, size] = [text(header, 0, 4), header.getUint32(4, true)];
    if (data && !printable(name)) break; // bytes behind the audio that are no chunk
    if (chunks > MAX_CHUNKS) throw new Trouble(`The file has more than ${MAX_CHUNKS} chunks.`);
    if (name === "fmt " && !data) format = readFormat(header, size, format);
    if (name === "ds64" && riff64 && header.byteLength >= 24) wide = Number(header.getBigUint64(16, true));
    if (name === "data" && !data) {
      if (!format) throw new Trouble("The audio begins before the file says how it is written.", null);
      data = { start: at + 8, told: size === 0xffffffff && wide ? wide : size };
      if (UNTOLD.has(data.told)) break;
      at += data.told - size;
    }
    at = await nextChunk(file, at + 8 + size, size & 1);
    if (!data && at > HEADER_BUDGET && at < file.size) throw new Trouble("No audio begins within the first megabyte of the file.", null);
  }
  if (!data) throw new Trouble(format ? "The file ends before its audio begins." : "The file ends inside its header.");
  if (!data.told && KNOWN.has(text(await bytesAt(file, data.start, 4), 0, 4))) throw new Trouble("There is no audio in the file.");
  Object.assign(info, { encoding: format.encoding, rate: format.rate, channels: format.channels });
  measure(file, info, { ...data, frameBytes: format.frameBytes });
}

/** Where the chunk after `end` begins. One of odd size has a pad byte after it, which some writers forget. */
async function nextChunk(file, end, odd) {
  if (!odd) return end;
  const head = text(await bytesAt(file, end, 8), 0, 8);
  const second = head.slice(1, 5);
  const there = KNOWN.has(head.slice(0, 4)) || (printable(head.slice(0, 4)) && !KNOWN.has(second) && !printable(second));
  return there && head.length === 8 ? end : end + 1;
}

const printable = (name) => /^[ -~]+$/.test(name);

function checkContainer(head, size) {
  if (!size) throw new Trouble("The file is empty.");
  const magic = text(head, 0, 4);
  if (["RIFF", "RF64", "BW64"].includes(magic) && text(head, 8, 4) === "WAVE") return magic !== "RIFF";
  const fits = ([offset, first]) => text(head, offset, first.length) === first;
  const audio = AUDIO.find(fits);
  if (audio) throw new Trouble(`This is ${audio[2]}; Turnwire takes WAV. Convert it:`, null);
  const other = OTHER.find(fits);
  if (other) throw new Trouble(`This is ${other[2]}, not a WAV file.`);
  throw new Trouble("This is not a WAV file. If it is audio, convert it:", null);
}

function readFormat(header, size, before) {
  if (size < 16 || size > 4096 || header.byteLength < 24) throw new Trouble("The header that says how the audio is written is damaged.", null);
  let tag = header.getUint16(8, true);
  const [channels, rate, bits] = [header.getUint16(10, true), header.getUint32(12, true), header.getUint16(22, true)];
  if (tag === 0xfffe) {
    if (size < 40 || header.byteLength < 48) throw new Trouble("The header that says how the audio is written is damaged.", null);
    tag = text(header, 34, 14) === GUID_TAIL ? header.getUint16(32, true) : -1;
  }
  const known = ENCODINGS[`${tag}/${bits}`];
  if (!known) {
    const codec = tag < 0 ? "of an unknown kind" : (CODECS[tag] ?? `of an unknown codec (0x${tag.toString(16)})`);
    throw new Trouble(`Its samples are ${LINEAR[tag] ? `${bits}-bit ${LINEAR[tag]}` : codec}, which is not taken. Convert it:`, rate || null);
  }
  if (!channels) throw new Trouble("The header says that there are no channels.");
  if (channels > 8) throw new Trouble(`It has ${channels} channels; up to 8 are taken. Make it mono:`, rate);
  if (rate < 8_000 || rate > 192_000) throw new Trouble(`Its sample rate is ${rate.toLocaleString("en")} Hz; 8,000 to 192,000 are taken. Resample it:`, rate || null);
  const format = { encoding: known[0], rate, channels, frameBytes: known[1] * channels };
  if (before && JSON.stringify(before) !== JSON.stringify(format)) throw new Trouble("Two headers in the file disagree on how the audio is written.", null);
  return format;
}

function measure(file, info, { start, told, frameBytes }) {
  const there = file.size - start;
  const data = UNTOLD.has(told) ? there : Math.min(told, there);
  const frames = Math.floor(data / frameBytes);
  if (frames < 1) throw new Trouble("There is no audio in the file.");
  info.durationMs = Math.floor((frames * 1000) / info.rate);
  if (UNTOLD.has(told)) info.notes.push("The header does not tell how long it is; everything up to its end is used.");
  else if (told > there) info.notes.push("It is cut short: less audio is there than its header says. What is there is used.");
  const changes = [];
  if (info.encoding !== "pcm_s16le") changes.push("made 16-bit");
  if (info.rate > 96_000) changes.push("resampled to 48 kHz");
  if (changes.length) info.notes.push(`On the way it is ${changes.join(" and ")}.`);
}

async function bytesAt(file, offset, length) {
  return new DataView(await file.slice(offset, offset + length).arrayBuffer());
}

function text(view, offset, length) {
  let out = "";
  for (let i = offset; i < Math.min(offset + length, view.byteLength); i += 1) out += String.fromCharCode(view.getUint8(i));
  return out;
}
