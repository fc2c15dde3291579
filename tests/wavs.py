"""Odd and broken WAV files, each with the verdict the contract demands: for the parser's test and that over HTTP.

The verdicts come from the contract's table of what is accepted and from what the format itself says, never from the
code: nothing of `service` is imported here. Every file is small, and made anew by `build`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

UNTOLD = 0xFFFF_FFFF
TAGS = {
    "pcm": 1,
    "adpcm": 2,
    "float": 3,
    "alaw": 6,
    "mulaw": 7,
    "ima": 0x11,
    "gsm": 0x31,
    "mp3": 0x55,
    "extensible": 0xFFFE,
}
ENCODINGS = {
    "pcm_u8": ("pcm", 8),
    "pcm_s16le": ("pcm", 16),
    "pcm_s24le": ("pcm", 24),
    "pcm_s32le": ("pcm", 32),
    "pcm_f32le": ("float", 32),
    "pcm_f64le": ("float", 64),
    "pcm_alaw": ("alaw", 8),
    "pcm_mulaw": ("mulaw", 8),
}
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")


@dataclass(frozen=True)
class WavCase:
    """`verdict` is `ok` or the code of the error; `warnings` are all the codes an accepted file is given."""

    name: str
    build: Callable[[], bytes]
    verdict: str = "ok"
    warnings: frozenset[str] = frozenset()
    channels: str = "reject"


def chunk(name: bytes, body: bytes = b"", size: int | None = None, *, pad: bool = True) -> bytes:
    """A chunk; `size` is what it claims instead of the truth."""
    told = len(body) if size is None else size
    return name + struct.pack("<I", told) + body + b"\0" * (len(body) % 2 if pad else 0)


def riff(*chunks: bytes, size: int | None = None, magic: bytes = b"RIFF", form: bytes = b"WAVE") -> bytes:
    """The file around its chunks; `size` is what it claims instead of the truth."""
    body = form + b"".join(chunks)
    return magic + struct.pack("<I", len(body) if size is None else size) + body


def fmt(
    *,
    tag: str | int = "pcm",
    channels: int = 1,
    rate: int = 16_000,
    bits: int = 16,
    align: int | None = None,
    byte_rate: int | None = None,
    extra: bytes = b"",
    size: int | None = None,
) -> bytes:
    """A `fmt ` chunk; align and byte rate are right unless given."""
    true_align = channels * ((bits + 7) // 8) if align is None else align
    true_rate = rate * true_align if byte_rate is None else byte_rate
    number = TAGS[tag] if isinstance(tag, str) else tag
    body = struct.pack(
        "<HHIIHH", number, channels, rate & 0xFFFF_FFFF, true_rate & 0xFFFF_FFFF, true_align & 0xFFFF, bits
    )
    return chunk(b"fmt ", body + extra, size)


def extensible(
    tag: int = 1, *, bits: int = 16, valid: int | None = None, channels: int = 1, tail: bytes = GUID_TAIL
) -> bytes:
    """A `fmt ` chunk of 40 bytes: the tag is in the sub-format's GUID."""
    extra = struct.pack("<HHI", 22, valid or bits, 0) + struct.pack("<H", tag) + tail
    return fmt(tag="extensible", bits=bits, channels=channels, extra=extra)


def samples(frames: int = 1_600, frame_bytes: int = 2) -> bytes:
    """Bytes that look like no chunk header; a quiet ramp."""
    return bytes(128 + i % 64 for i in range(frames * frame_bytes))


def wav_bytes(rate: int = 16_000, channels: int = 1, frames: int = 1_600, encoding: str = "pcm_s16le") -> bytes:
    """A plain and valid file; floats are silence, for a ramp of bytes would be noise."""
    tag, bits = ENCODINGS[encoding]
    frame_bytes = channels * bits // 8
    body = bytes(frames * frame_bytes) if tag == "float" else samples(frames, frame_bytes)
    return riff(fmt(tag=tag, channels=channels, rate=rate, bits=bits), chunk(b"data", body))


def ds64(riff_size: int, data_size: int, *, size: int | None = None) -> bytes:
    """The chunk that holds the sizes of an RF64 file."""
    return chunk(b"ds64", struct.pack("<QQQI", riff_size, data_size, data_size // 2, 0), size)


def rf64(*, magic: bytes = b"RF64", riff_size: int | None = None, data_size: int = 3_200, ds: bool = True) -> bytes:
    """An RF64 or BW64 file of 1,600 frames whose 32-bit sizes are all 0xFFFFFFFF."""
    rest = fmt() + chunk(b"data", samples(), UNTOLD)
    total = 4 + 36 + len(rest) if riff_size is None else riff_size
    return riff(ds64(total, data_size) if ds else b"", rest, size=UNTOLD, magic=magic)


def plain(
    *, data: bytes | None = None, size: int | None = None, riff_size: int | None = None, after: bytes = b""
) -> bytes:
    """16-bit mono at 16 kHz with this data chunk, which claims `size`."""
    return riff(fmt(), chunk(b"data", samples() if data is None else data, size), after, size=riff_size)


def _ok(name: str, data: bytes, *warnings: str, channels: str = "reject") -> WavCase:
    return WavCase(name, partial(bytes, data), "ok", frozenset(warnings), channels)


def _bad(code: str, **files: bytes) -> list[WavCase]:
    return [WavCase(name.replace("_", " "), partial(bytes, data), code) for name, data in files.items()]


_LIST = chunk(b"LIST", b"INFOISFT\x0e\0\0\0Lavf60.16.100\0")
_GOOD = wav_bytes()
_DATA = chunk(b"data", samples())
_PIPED = chunk(b"data", samples(), UNTOLD)
_U8 = fmt(bits=8)
_ODD = chunk(b"LIST", b"odd", pad=False)

_ACCEPTED = [
    _ok("16-bit mono 16 kHz", _GOOD),
    _ok("8 kHz", wav_bytes(8_000)),
    _ok("11025 Hz", wav_bytes(11_025)),
    _ok("44100 Hz", wav_bytes(44_100)),
    _ok("96 kHz", wav_bytes(96_000)),
    _ok("one frame", wav_bytes(frames=1)),
    _ok("fmt of 18 bytes", riff(fmt(extra=b"\0\0"), _DATA)),
    _ok("fmt of 17 bytes, padded", riff(fmt(extra=b"\0"), _DATA)),
    _ok("fmt of 4096 bytes", riff(fmt(extra=bytes(4_080)), _DATA)),
    _ok("extensible 16-bit", riff(extensible(), _DATA)),
    _ok("LIST before data", riff(fmt(), _LIST, _DATA)),
    _ok("LIST after data", riff(fmt(), _DATA, _LIST)),
    _ok("odd chunk with its pad byte before data", riff(fmt(), chunk(b"LIST", b"odd"), _DATA)),
    _ok("odd chunk with its pad byte after data", riff(fmt(), _DATA, chunk(b"LIST", b"odd"))),
    _ok("odd chunk whose pad byte is not 0", riff(fmt(), _ODD, b"\xff", _DATA)),
    _ok("odd chunk whose pad byte is a space", riff(fmt(), _ODD, b" ", _DATA)),
    _ok("a space for a pad byte, then an unknown chunk", riff(fmt(), _ODD, b" ", chunk(b"abcd"), _DATA)),
    _ok(
        "unknown chunks everywhere",
        riff(chunk(b"abcd", b"1"), fmt(), chunk(b"\x01\x02\x03\x04"), _DATA, chunk(b"wxyz")),
    ),
    _ok(
        "fact, PEAK and bext", riff(chunk(b"bext", bytes(602)), fmt(), chunk(b"fact", bytes(4)), _DATA, chunk(b"PEAK"))
    ),
    _ok("data at the next 64 KiB", riff(fmt(), chunk(b"JUNK", bytes(65_484)), _DATA)),
    _ok("1024 chunks", riff(fmt(), chunk(b"JUNK") * 1_022, _DATA)),
    _ok("the same fmt twice", riff(fmt(), fmt(), _DATA)),
    _ok("another fmt after data", riff(fmt(), _DATA, fmt(rate=8_000))),
    _ok("audio that spells chunk names", plain(data=b"dataLISTfmt RIFF" * 100)),
    _ok("RF64", rf64()),
    _ok("BW64", rf64(magic=b"BW64")),
    _ok("RF64 with a 32-bit data size", riff(ds64(4 + 36 + 24 + 3_208, 0), fmt(), _DATA, size=UNTOLD, magic=b"RF64")),
    _ok(
        "RF64 whose ds64 has a table",
        riff(
            chunk(b"ds64", struct.pack("<QQQI", 3_284, 3_200, 1_600, 1) + b"abcd" + bytes(8)),
            fmt(),
            chunk(b"data", samples(), UNTOLD),
            size=UNTOLD,
            magic=b"RF64",
        ),
    ),
    _ok("ds64 in a plain RIFF", riff(ds64(1, 1), fmt(), _DATA)),
]

_CONVERTED = [
    _ok("RIFF size without the last pad byte", riff(_U8, chunk(b"data", samples(1_601, 1)), size=1_637),
        "converted"),
    *(_ok(encoding, wav_bytes(encoding=encoding), "converted") for encoding in ENCODINGS if encoding != "pcm_s16le"),
    _ok("extensible float", riff(extensible(3, bits=32), chunk(b"data", bytes(6_400))), "converted"),
    _ok("extensible A-law", riff(extensible(6, bits=8), _DATA), "converted"),
    _ok("extensible, 20 bits valid of 24", riff(extensible(bits=24, valid=20), chunk(b"data", samples(1_000, 3))),
        "converted"),
    _ok("96001 Hz", wav_bytes(96_001), "converted"),
    _ok("176400 Hz", wav_bytes(176_400), "converted"),
    _ok("192 kHz", wav_bytes(192_000, frames=9_600), "converted"),
    _ok("192 kHz stereo 24-bit", wav_bytes(192_000, 2, 9_600, "pcm_s24le"), "converted", channels="mix"),
    _ok("stereo mixed", wav_bytes(channels=2), "converted", channels="mix"),
    _ok("stereo, the first", wav_bytes(channels=2), "converted", channels="first"),
    _ok("stereo, split", wav_bytes(channels=2), "converted", channels="split"),
    _ok("eight channels mixed", wav_bytes(channels=8), "converted", channels="mix"),
    _ok("mono with an option", _GOOD, channels="mix"),
]  # fmt: skip

_WARNED = [
    _ok("both sizes 0xFFFFFFFF", plain(size=UNTOLD, riff_size=UNTOLD), "streamed_header"),
    _ok("both sizes 0", plain(size=0, riff_size=0), "streamed_header"),
    _ok("header of a recorder that crashed", plain(size=0, riff_size=36), "streamed_header"),
    _ok("data size 0xFFFFFFFF, RIFF size right", plain(size=UNTOLD), "streamed_header"),
    _ok("RIFF size 0, data size right", plain(riff_size=0), "streamed_header"),
    _ok("RIFF size 0xFFFFFFFF, data size right", plain(riff_size=UNTOLD), "streamed_header"),
    _ok("pipe, LIST before data", riff(fmt(), _LIST, _PIPED, size=UNTOLD), "streamed_header"),
    _ok("pipe, one frame", plain(data=b"\x90\x90", size=0, riff_size=0), "streamed_header"),
    _ok("pipe, odd tail", plain(data=samples() + b"\x90", size=UNTOLD, riff_size=UNTOLD)[:-1],
        "streamed_header", "partial_frame"),
    _ok("pipe with a stray ds64", riff(ds64(100, 1_600), fmt(), _PIPED, size=UNTOLD), "streamed_header"),
    _ok("RF64 without ds64", rf64(ds=False), "streamed_header"),
    _ok("RF64 whose ds64 says 0", rf64(data_size=0, riff_size=0), "streamed_header"),
    _ok("RF64 whose ds64 is too short", riff(chunk(b"ds64", bytes(8)), fmt(), _PIPED, size=UNTOLD, magic=b"RF64"),
        "streamed_header"),
    _ok("RIFF size too small", plain(riff_size=100), "riff_size_mismatch"),
    _ok("RIFF size too large", plain(riff_size=1_000_000), "riff_size_mismatch"),
    _ok("RIFF size off by 8", plain(riff_size=36 + 3_200 + 8), "riff_size_mismatch"),
    _ok("RIFF size without the LIST after data", plain(after=_LIST, riff_size=36 + 3_200), "riff_size_mismatch"),
    _ok("RF64 whose ds64 RIFF size is wrong", rf64(riff_size=99), "riff_size_mismatch"),
    _ok("data cut", _GOOD[:2_044], "truncated_data"),
    _ok("data cut within a frame", _GOOD[:2_045], "truncated_data", "partial_frame"),
    _ok("data size 2 GiB", plain(size=0x7FFF_FFFE), "truncated_data"),
    _ok("RF64 data size 2**63", rf64(data_size=2**63), "truncated_data"),
    _ok("RIFF size too small and data cut", plain(riff_size=100)[:2_044], "riff_size_mismatch", "truncated_data"),
    _ok("odd tail byte, padded", plain(data=samples() + b"\x90"), "partial_frame"),
    _ok("odd tail byte, not padded", plain(data=samples() + b"\x90")[:-1], "partial_frame", "missing_pad_byte"),
    _ok("24-bit, two bytes over", riff(fmt(bits=24), chunk(b"data", samples(100, 3) + b"\x90\x90")),
        "partial_frame", "converted"),
    _ok("odd LIST without pad before data", riff(fmt(), _ODD, _DATA), "missing_pad_byte"),
    _ok("odd unknown chunk without pad", riff(fmt(), chunk(b"JUNQ", b"odd", pad=False), _DATA), "missing_pad_byte"),
    _ok("odd data without pad before LIST", riff(_U8, chunk(b"data", samples(1_601, 1), pad=False), _LIST),
        "missing_pad_byte", "converted"),
    _ok("odd data without pad at the end", riff(_U8, chunk(b"data", samples(1_601, 1), pad=False)),
        "missing_pad_byte", "converted"),
    _ok("fmt of 17 bytes without pad", riff(fmt(extra=b"\0")[:-1], _DATA), "missing_pad_byte"),
    _ok("zeros after the end", _GOOD + bytes(100), "trailing_bytes"),
    _ok("three bytes after the end", _GOOD + b"\x01\x02\x03", "trailing_bytes"),
    _ok("text after the end", _GOOD + b"and now for something completely different", "trailing_bytes"),
    _ok("zeros within the RIFF size", plain(after=bytes(512)), "trailing_bytes"),
    _ok("LIST after data cut", plain(after=_LIST)[:-10], "trailing_bytes"),
    _ok("data size too small", plain(size=1_600), "trailing_bytes"),
    _ok("two data chunks", riff(fmt(), _DATA, _DATA), "extra_data_chunk"),
    _ok("a LIST between two data chunks", riff(fmt(), _DATA, _LIST, _DATA), "extra_data_chunk"),
    _ok("second data chunk empty", riff(fmt(), _DATA, chunk(b"data")), "extra_data_chunk"),
    _ok("byte rate 0", riff(fmt(byte_rate=0), _DATA), "byterate_mismatch"),
    _ok("byte rate of stereo", riff(fmt(byte_rate=64_000), _DATA), "byterate_mismatch"),
    _ok("block align 0", riff(fmt(align=0, byte_rate=32_000), _DATA), "byterate_mismatch"),
    _ok("block align wrong", riff(fmt(align=4, byte_rate=32_000), _DATA), "byterate_mismatch"),
    _ok("several at once", riff(fmt(byte_rate=1), _ODD, _DATA, _DATA, size=9) + b"\0\0",
        "riff_size_mismatch", "missing_pad_byte", "trailing_bytes", "extra_data_chunk", "byterate_mismatch"),
]  # fmt: skip

_NOT_WAV = [
    *_bad(
        "not_wav",
        MP3_with_ID3=b"ID3\x04\0\0\0\0\0\x23TSSE" + bytes(500),
        MP3_without_tag=b"\xff\xfb\x90\x64" + bytes(500),
        AAC=b"\xff\xf1\x50\x80" + bytes(500),
        Ogg=b"OggS\0\x02" + bytes(500),
        FLAC=b"fLaC\0\0\0\x22" + bytes(500),
        M4A=b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(500),
        AIFF=b"FORM\0\0\x01\0AIFFCOMM" + bytes(500),
        CAF=b"caff\0\x01\0\0desc" + bytes(500),
        AU=b".snd\0\0\0\x18" + bytes(500),
        WebM=b"\x1aE\xdf\xa3\x01\0\0\0" + bytes(500),
        AMR=b"#!AMR\n" + bytes(500),
        AVI=riff(bytes(500), form=b"AVI "),
        WebP=riff(b"VP8 " + bytes(500), form=b"WEBP"),
        ZIP=b"PK\x03\x04" + bytes(500),
        HTML=b"<!doctype html><title>Log in</title>",
        JSON=b'{"error": "gone"}',
        lower_case_riff=b"riff" + _GOOD[4:],
        raw_samples=samples(),
        zeros=bytes(1_000),
        a_WAV_after_a_blank_line=b"\r\n" + _GOOD,
        one_byte=b"\x00",
    ),
    *_bad("unsupported_container", RIFX=b"RIFX\0\0\x0c\xa4WAVEfmt \0\0\0\x10\0\x01\0\x01" + bytes(500)),
    *_bad("unsupported_container", W64=bytes.fromhex("726966662e91cf11a5d628db04c10000") + bytes(500)),
]
_FMT_WAVE = _GOOD[:36]
_REFUSED = [
    *_bad(
        "unsupported_encoding",
        Microsoft_ADPCM=riff(fmt(tag="adpcm", bits=4, extra=bytes(34)), _DATA),
        IMA_ADPCM=riff(fmt(tag="ima", bits=4, extra=bytes(4)), _DATA),
        GSM=riff(fmt(tag="gsm", bits=0, extra=bytes(4)), _DATA),
        MP3_in_WAV=riff(fmt(tag="mp3", bits=0, extra=bytes(14)), _DATA),
        unknown_tag=riff(fmt(tag=0x1234), _DATA),
        tag_0=riff(fmt(tag=0), _DATA),
        PCM_17_bits=riff(fmt(bits=17), _DATA),
        PCM_12_bits=riff(fmt(bits=12), _DATA),
        PCM_64_bits=riff(fmt(bits=64), _DATA),
        float_16_bits=riff(fmt(tag="float", bits=16), _DATA),
        extensible_MP3=riff(extensible(0x55), _DATA),
        extensible_ambisonic=riff(extensible(tail=bytes.fromhex("00002107d3118644c8c1ca000000")), _DATA),
    ),
    *_bad(
        "unsupported_channels",
        no_channels=riff(fmt(channels=0, align=2), _DATA),
        nine_channels=wav_bytes(channels=9),
        channels_65535=riff(fmt(channels=65_535), _DATA),
        stereo_without_an_option=wav_bytes(channels=2),
        eight_channels_without_an_option=wav_bytes(channels=8),
    ),
    WavCase("nine channels, mixed", partial(wav_bytes, channels=9), "unsupported_channels", channels="mix"),
    *_bad(
        "unsupported_rate",
        rate_0=riff(fmt(rate=0), _DATA),
        rate_1=riff(fmt(rate=1), _DATA),
        rate_7999=wav_bytes(7_999),
        rate_192001=wav_bytes(192_001),
        rate_2100_million=riff(fmt(rate=2_100_000_000), _DATA),
    ),
    *_bad(
        "empty_audio",
        no_bytes=b"",
        data_of_size_0=plain(data=b""),
        data_of_size_0_then_LIST=plain(data=b"", after=_LIST),
        data_of_half_a_frame=plain(data=b"\x90"),
        pipe_without_audio=plain(data=b"", size=UNTOLD, riff_size=UNTOLD),
        cut_at_the_audio=_GOOD[:44],
        cut_after_one_byte_of_audio=_GOOD[:45],
        empty_data_before_another=riff(fmt(), chunk(b"data"), _DATA),
        RF64_without_audio=rf64()[:-3_200],
    ),
    *_bad(
        "missing_fmt",
        no_chunks=riff(),
        only_data=riff(_DATA),
        fmt_after_data=riff(_DATA, fmt()),
        only_LIST=riff(_LIST),
        fmt_spelt_wrong=riff(b"FMT " + fmt()[4:], _DATA),
    ),
    *_bad(
        "missing_data",
        only_fmt=riff(fmt()),
        fmt_and_odd_LIST=riff(fmt(), chunk(b"LIST", b"odd")),
        fmt_and_LIST=riff(fmt(), _LIST),
        data_spelt_wrong=riff(fmt(), b"DATA" + _DATA[4:]),
        cut_after_fmt=_FMT_WAVE,
        LIST_of_2_GiB=riff(fmt(), chunk(b"LIST", bytes(100), 0x7FFF_FFFE), _DATA),
        chunk_size_that_wraps=riff(fmt(), chunk(b"LIST", b"", 0xFFFF_FFF8), _DATA),
    ),
    *_bad(
        "bad_fmt",
        fmt_of_0_bytes=riff(chunk(b"fmt "), _DATA),
        fmt_of_14_bytes=riff(chunk(b"fmt ", bytes(14)), _DATA),
        fmt_of_4097_bytes=riff(fmt(extra=bytes(4_081)), _DATA),
        fmt_of_1_GiB=riff(fmt(size=1 << 30), _DATA),
        extensible_of_18_bytes=riff(fmt(tag="extensible", extra=bytes(2)), _DATA),
        two_fmt_that_disagree=riff(fmt(), fmt(rate=8_000), _DATA),
        no_bits=riff(fmt(bits=0, align=2), _DATA),
    ),
    *_bad(
        "truncated_header",
        cut_in_the_magic=b"RIFF\x24",
        one_letter=b"R",
        cut_in_the_first_chunk_header=_GOOD[:17],
        cut_before_the_body_of_fmt=_GOOD[:20],
        cut_in_fmt=_GOOD[:30],
        cut_in_the_header_of_data=_GOOD[:42],
        cut_in_LIST=riff(fmt(), _LIST)[:-5],
    ),
    *_bad(
        "too_many_chunks",
        chunks_1025=riff(fmt(), chunk(b"JUNK") * 1_023, _DATA),
        chunks_20000=riff(fmt(), chunk(b"JUNK") * 20_000, _DATA),
        chunks_1025_after_the_audio=riff(fmt(), _DATA, chunk(b"JUNK") * 1_023),
    ),
]

CASES: list[WavCase] = [*_ACCEPTED, *_CONVERTED, *_WARNED, *_NOT_WAV, *_REFUSED]
