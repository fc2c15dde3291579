"""How the samples of a file are written: `AudioFormat`, and the `fmt ` chunk that says so. FLOOR 0.

What decides is the format tag (in an EXTENSIBLE header: that of the sub-format) with the bits of a sample. Frame size
and byte rate are computed from those and never taken from the header. A codec that is not taken is refused by its name,
with the command that mends it.
"""

import struct
from dataclasses import dataclass
from typing import Final

from service.core.errors import InvalidAudio
from service.core.magic import ffmpeg

MAX_CHANNELS: Final = 8
MIN_RATE: Final = 8_000
MAX_RATE: Final = 192_000
MAX_UPSTREAM_RATE: Final = 96_000
REDUCED_RATE: Final = 48_000

SAMPLE_BYTES: Final = {
    "pcm_u8": 1,
    "pcm_s16le": 2,
    "pcm_s24le": 3,
    "pcm_s32le": 4,
    "pcm_f32le": 4,
    "pcm_f64le": 8,
    "pcm_alaw": 1,
    "pcm_mulaw": 1,
}

# Format tags: RFC 2361 and Microsoft's mmreg.h.
_PCM, _FLOAT, _ALAW, _MULAW, _EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
_ENCODINGS: Final = {
    (_PCM, 8): "pcm_u8",
    (_PCM, 16): "pcm_s16le",
    (_PCM, 24): "pcm_s24le",
    (_PCM, 32): "pcm_s32le",
    (_FLOAT, 32): "pcm_f32le",
    (_FLOAT, 64): "pcm_f64le",
    (_ALAW, 8): "pcm_alaw",
    (_MULAW, 8): "pcm_mulaw",
}
_LINEAR: Final = {_PCM: "PCM", _FLOAT: "float", _ALAW: "A-law", _MULAW: "µ-law"}
_CODECS: Final = {
    0x0002: "Microsoft ADPCM",
    0x0011: "IMA ADPCM",
    0x0022: "TrueSpeech",
    0x0031: "GSM 6.10",
    0x0042: "G.723.1",
    0x0045: "G.726",
    0x0050: "MPEG layer I or II",
    0x0055: "MP3",
    0x0064: "G.726",
    0x0065: "G.722",
    0x0083: "G.729",
    0x00FF: "AAC",
    0x0160: "Windows Media Audio",
    0x0161: "Windows Media Audio",
    0x0162: "Windows Media Audio",
    0x0163: "Windows Media Audio",
    0x0270: "ATRAC3",
    0x1600: "AAC",
    0x2000: "AC-3",
    0x2001: "DTS",
    0x674F: "Vorbis",
    0x704F: "Opus",
    0x706D: "AAC",
    0xA109: "Speex",
    0xF1AC: "FLAC",
}
# KSDATAFORMAT_SUBTYPE_…: the format tag, then this.
_GUID_TAIL: Final = bytes.fromhex("0000 0000 1000 8000 00aa00389b71")
_EXTENSIBLE_BYTES: Final = 40
_FMT: Final = struct.Struct("<HHIIHH")


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """The encoding of the samples, by ffmpeg's name, their rate and how many make a frame."""

    encoding: str
    sample_rate: int
    channels: int

    @property
    def frame_bytes(self) -> int:
        return SAMPLE_BYTES[self.encoding] * self.channels

    @property
    def upstream_rate(self) -> int:
        return self.sample_rate if self.sample_rate <= MAX_UPSTREAM_RATE else REDUCED_RATE

    @property
    def converted(self) -> bool:
        """Whether what goes upstream differs from what is in the file."""
        return self.encoding != "pcm_s16le" or self.channels > 1 or self.upstream_rate != self.sample_rate

    def __str__(self) -> str:
        return f"{self.encoding} at {self.sample_rate:,} Hz, channels: {self.channels}"


def read_fmt(body: bytes) -> tuple[AudioFormat, int, int]:
    """Of the first 16 to 40 bytes of the chunk: the format, and the byte rate and block align the header claims."""
    tag, channels, rate, byte_rate, align, bits = _FMT.unpack_from(body)
    if tag == _EXTENSIBLE:
        if len(body) < _EXTENSIBLE_BYTES:
            raise InvalidAudio("bad_fmt", "The fmt chunk says WAVE_FORMAT_EXTENSIBLE but is too short to be one.")
        tag = int.from_bytes(body[24:26], "little") if body[26:40] == _GUID_TAIL else -1
    encoding = _ENCODINGS.get((tag, bits))
    if encoding is None:
        raise _refused(tag, bits, ffmpeg(rate or None))
    if not 1 <= channels <= MAX_CHANNELS:
        mend = f" Make it mono: {ffmpeg(rate or None)}" if channels else ""
        raise InvalidAudio("unsupported_channels", f"The file has {channels:,} channels; 1 to 8 are taken.{mend}")
    if not MIN_RATE <= rate <= MAX_RATE:
        mend = f" Resample it: {ffmpeg(rate)}" if rate else ""
        raise InvalidAudio("unsupported_rate", f"The sample rate is {rate:,} Hz; 8,000 to 192,000 are taken.{mend}")
    return AudioFormat(encoding, rate, channels), byte_rate, align


def check_channels(fmt: AudioFormat, option: str) -> None:
    """Raise unless the option `channels` (reject, mix, first or split) allows as many channels as there are."""
    if fmt.channels > 1 and option == "reject":
        raise InvalidAudio(
            "unsupported_channels",
            f"The file has {fmt.channels} channels. Say what to do with them (channels=mix|first|split) "
            f"or make it mono: {ffmpeg(fmt.sample_rate)}",
        )


def conversion(fmt: AudioFormat, option: str) -> str:
    """What is done to the samples before they go upstream, for people; empty if nothing is."""
    done = []
    if fmt.encoding != "pcm_s16le":
        done.append(f"{fmt.encoding} samples are made 16-bit")
    if fmt.upstream_rate != fmt.sample_rate:
        done.append(f"{fmt.sample_rate:,} Hz is resampled to {fmt.upstream_rate:,} Hz")
    if fmt.channels > 1:
        ways = {"mix": "are mixed into one", "first": "are reduced to the first", "split": "go to one session each"}
        done.append(f"{fmt.channels} channels {ways[option]}")
    return ", ".join(done)


def _refused(tag: int, bits: int, command: str) -> InvalidAudio:
    if tag in _LINEAR and bits == 0:
        return InvalidAudio("bad_fmt", "The fmt chunk says that a sample has 0 bits.")
    if tag in _LINEAR:
        name = f"{bits}-bit {_LINEAR[tag]}"
    elif tag < 0:
        name = "of an unknown sub-format"
    else:
        name = _CODECS.get(tag, f"of an unknown codec (format tag {tag:#06x})")
    return InvalidAudio("unsupported_encoding", f"The samples are {name}, which is not taken. Convert it: {command}")
