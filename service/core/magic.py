"""Which container the first twelve bytes of an upload announce, and how to mend one that is not taken. FLOOR 0.

The file's name and MIME type are never asked: only the bytes speak. What is not RIFF/WAVE is refused with the name of
what it seems to be and, where `ffmpeg` reads it, the exact command that makes a WAV of it. Nothing is ever unpacked.
"""

from typing import Final

from service.core.errors import InvalidAudio

CONTAINERS: Final = (b"RIFF", b"RF64", b"BW64")
LENGTH: Final = 12

_W64: Final = bytes.fromhex("726966662e91cf11")

# Offset, bytes, name: what ffmpeg reads.
_AUDIO: Final = (
    (0, b"ID3", "MP3"),
    (0, b"\xff\xfb", "MP3"),
    (0, b"\xff\xfa", "MP3"),
    (0, b"\xff\xf3", "MP3"),
    (0, b"\xff\xf2", "MP3"),
    (0, b"\xff\xe3", "MP3"),
    (0, b"\xff\xfd", "MPEG audio layer II"),
    (0, b"\xff\xf1", "AAC (ADTS)"),
    (0, b"\xff\xf9", "AAC (ADTS)"),
    (0, b"ADIF", "AAC (ADIF)"),
    (0, b"OggS", "Ogg (Opus or Vorbis)"),
    (0, b"fLaC", "FLAC"),
    (4, b"ftyp", "MP4, M4A or QuickTime"),
    (8, b"AIFF", "AIFF"),
    (8, b"AIFC", "AIFF-C"),
    (0, b"caff", "Apple CAF"),
    (0, b".snd", "Sun AU"),
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM"),
    (0, b"#!AMR", "AMR"),
    (0, b"\x30\x26\xb2\x75", "Windows Media (ASF)"),
    (0, b"\x0b\x77", "AC-3"),
    (0, b"wvpk", "WavPack"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"NIST_1A", "NIST SPHERE"),
    (0, b"Creative Voi", "Creative Voice (VOC)"),
    (0, b"FLV", "Flash Video"),
    (0, b"DSD ", "DSD"),
    (8, b"AVI ", "AVI"),
)
# The same for what no converter makes speech of.
_OTHER: Final = (
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"MThd", "MIDI, which holds notes and no sound"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"<", "an HTML or XML page"),
    (0, b"{", "JSON text"),
)


def ffmpeg(rate: int | None = None) -> str:
    """The command that makes a WAV taken as it is: mono, 16-bit, as near to `rate` as may be, else at 16 kHz."""
    if rate is None:
        fit = 16_000
    elif rate > 96_000:
        fit = 48_000
    else:
        fit = max(rate, 8_000)
    return f"ffmpeg -i <file> -ar {fit} -ac 1 -sample_fmt s16 output.wav"


def check_container(head: bytes) -> None:
    """Raise unless `head`, the first 12 bytes or the whole of a shorter file, opens a container that is taken."""
    if not head:
        raise InvalidAudio("empty_audio", "The file is empty: not one byte arrived.")
    if head.startswith(b"RIFX"):
        raise InvalidAudio("unsupported_container", f"RIFX (big-endian WAV) is not taken. Convert it: {ffmpeg()}")
    if head.startswith(_W64):
        raise InvalidAudio("unsupported_container", f"Sony Wave64 (W64) is not taken. Convert it: {ffmpeg()}")
    if any(_agrees(head, magic) for magic in CONTAINERS):
        if len(head) == LENGTH:
            return
        raise InvalidAudio("truncated_header", f"The file ends after {len(head)} bytes, inside its first header.")
    raise InvalidAudio("not_wav", _what(head))


def _agrees(head: bytes, magic: bytes) -> bool:
    return head[:4] == magic[: len(head)] and b"WAVE".startswith(head[8:12])


def _what(head: bytes) -> str:
    for offset, magic, name in _AUDIO:
        if head.startswith(magic, offset):
            return f"This is not a WAV file; it seems to be {name}. Convert it: {ffmpeg()}"
    for offset, magic, name in _OTHER:
        if head.startswith(magic, offset):
            return f"This is not a WAV file; it seems to be {name}. Send the WAV file itself."
    return f"This is not a WAV file: it does not begin with RIFF and WAVE. If it is audio, convert it: {ffmpeg()}"
