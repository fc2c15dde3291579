"""The WAV parser: its verdicts on the corpus, the byte at which they fall, and that no cut and no rubbish upsets it."""

import struct
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.core.errors import InvalidAudio
from service.core.wav import AudioFormat, WavInfo, WavParser, check_channels, warnings_for
from tests import wavs
from tests.wavs import CASES, WavCase, chunk, extensible, fmt, plain, riff, samples, wav_bytes

HOUR = 3_600.0
AUDIO_CODES = {
    *("not_wav", "unsupported_container", "unsupported_encoding", "unsupported_channels", "unsupported_rate"),
    *("empty_audio", "missing_fmt", "missing_data", "bad_fmt", "truncated_header", "too_many_chunks", "too_long"),
}
WARNINGS = {
    *("streamed_header", "riff_size_mismatch", "truncated_data", "partial_frame", "missing_pad_byte"),
    *("trailing_bytes", "extra_data_chunk", "byterate_mismatch", "converted"),
}
NAMED = {case.name: case for case in CASES}


def parse(data: bytes, *, cuts: tuple[int, ...] = (), max_duration_s: float = HOUR) -> WavInfo:
    parser = WavParser(max_duration_s=max_duration_s)
    for start, stop in pairwise([0, *cuts, len(data)]):
        parser.feed(data[start:stop])
    return parser.finish()


def verdict(data: bytes, **how: object) -> WavInfo | tuple[str, str]:
    try:
        return parse(data, **how)  # type: ignore[arg-type]
    except InvalidAudio as error:
        return error.code, error.detail


def refusal(data: bytes, *, max_duration_s: float = HOUR) -> InvalidAudio:
    with pytest.raises(InvalidAudio) as caught:
        parse(data, max_duration_s=max_duration_s)
    return caught.value


def refused_at(data: bytes, *, max_duration_s: float = HOUR, total_bytes: int | None = None) -> int:
    """How many bytes it takes; more than there are if only the end proves it."""
    parser = WavParser(max_duration_s=max_duration_s, total_bytes=total_bytes)
    for at in range(len(data)):
        try:
            parser.feed(data[at : at + 1])
        except InvalidAudio:
            return at + 1
    return len(data) + 1


# The corpus.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(case: WavCase) -> None:
    if case.verdict != "ok":
        with pytest.raises(InvalidAudio) as caught:
            check_channels(parse(case.build()).format, case.channels)
        assert caught.value.code == case.verdict
        return
    info = parse(case.build())
    check_channels(info.format, case.channels)
    found = [warning.code for warning in warnings_for(info, case.channels)]
    assert sorted(found) == sorted(case.warnings)


def test_corpus_covers_the_contract() -> None:
    assert len(NAMED) == len(CASES) >= 80
    assert {case.verdict for case in CASES} == (AUDIO_CODES - {"too_long"}) | {"ok"}
    assert frozenset[str]().union(*(case.warnings for case in CASES)) == WARNINGS
    assert max(len(case.build()) for case in CASES) < 200_000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_byte_at_a_time_makes_no_difference(case: WavCase) -> None:
    data = case.build()
    head = tuple(range(1, min(len(data), 3_400)))
    assert verdict(data, cuts=head) == verdict(data)


# What is found.


def test_plain_file() -> None:
    info = parse(wav_bytes(44_100, frames=44_100))
    assert info == WavInfo(AudioFormat("pcm_s16le", 44_100, 1), 44, 44_100, ())
    assert (info.data_bytes, info.duration_ms) == (88_200, 1_000)
    assert not info.format.converted
    assert (info.format.upstream_rate, info.format.frame_bytes) == (44_100, 2)


@pytest.mark.parametrize(("encoding", "size"), [("pcm_u8", 1), ("pcm_s24le", 3), ("pcm_f64le", 8), ("pcm_mulaw", 1)])
def test_frame_size_is_computed(encoding: str, size: int) -> None:
    info = parse(wav_bytes(8_000, channels=3, frames=81, encoding=encoding))
    assert info.format == AudioFormat(encoding, 8_000, 3)
    assert (info.frames, info.format.frame_bytes, info.duration_ms) == (81, 3 * size, 10)
    assert info.format.converted


@pytest.mark.parametrize(("rate", "upstream"), [(8_000, 8_000), (96_000, 96_000), (96_001, 48_000), (192_000, 48_000)])
def test_upstream_rate(rate: int, upstream: int) -> None:
    assert AudioFormat("pcm_s16le", rate, 1).upstream_rate == upstream


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("both sizes 0", 1_600),
        ("both sizes 0xFFFFFFFF", 1_600),
        ("RIFF size too small", 1_600),
        ("data cut", 1_000),
        ("data cut within a frame", 1_000),
        ("data size too small", 800),
        ("two data chunks", 1_600),
        ("block align wrong", 1_600),
        ("RF64", 1_600),
        ("RF64 without ds64", 1_600),
        ("pipe, one frame", 1),
        ("odd LIST without pad before data", 1_600),
        ("odd chunk whose pad byte is a space", 1_600),
        ("extensible, 20 bits valid of 24", 1_000),
    ],
)
def test_received_bytes_decide(name: str, frames: int) -> None:
    data = NAMED[name].build()
    info = parse(data)
    assert info.frames == frames
    assert data[info.data_start - 8 : info.data_start - 4] == b"data"


def test_warnings_keep_the_contracts_order() -> None:
    codes = [warning.code for warning in warnings_for(parse(NAMED["several at once"].build()), "reject")]
    assert codes == [
        "riff_size_mismatch",
        "missing_pad_byte",
        "trailing_bytes",
        "extra_data_chunk",
        "byterate_mismatch",
    ]


def test_format_is_known_before_the_audio() -> None:
    parser = WavParser(max_duration_s=HOUR)
    parser.feed(wav_bytes(22_050)[:35])
    assert parser.format is None
    parser.feed(wav_bytes(22_050)[35:36])
    assert parser.format == AudioFormat("pcm_s16le", 22_050, 1)


@pytest.mark.parametrize(
    ("fmt_", "option", "words"),
    [
        (AudioFormat("pcm_s16le", 16_000, 2), "mix", "2 channels are mixed into one"),
        (AudioFormat("pcm_s16le", 16_000, 2), "first", "2 channels are reduced to the first"),
        (AudioFormat("pcm_s16le", 16_000, 3), "split", "3 channels go to one session each"),
        (AudioFormat("pcm_s24le", 16_000, 1), "reject", "pcm_s24le samples are made 16-bit"),
        (AudioFormat("pcm_s16le", 192_000, 1), "reject", "192,000 Hz is resampled to 48,000 Hz"),
    ],
)
def test_converted_names_the_conversion(fmt_: AudioFormat, option: str, words: str) -> None:
    (warning,) = warnings_for(WavInfo(fmt_, 44, 1, ()), option)
    assert (warning.code, warning.message) == ("converted", f"Not sent as it is: {words}.")


# What a refusal says.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MP3 with ID3", "MP3"),
        ("MP3 without tag", "MP3"),
        ("AAC", "AAC"),
        ("Ogg", "Ogg"),
        ("FLAC", "FLAC"),
        ("M4A", "MP4, M4A"),
        ("AIFF", "AIFF"),
        ("CAF", "CAF"),
        ("AU", "Sun AU"),
        ("WebM", "WebM"),
        ("AMR", "AMR"),
        ("AVI", "AVI"),
        ("RIFX", "RIFX"),
        ("W64", "W64"),
        ("Microsoft ADPCM", "Microsoft ADPCM"),
        ("IMA ADPCM", "IMA ADPCM"),
        ("GSM", "GSM 6.10"),
        ("MP3 in WAV", "MP3"),
        ("extensible MP3", "MP3"),
        ("unknown tag", "0x1234"),
        ("PCM 17 bits", "17-bit PCM"),
        ("float 16 bits", "16-bit float"),
        ("raw samples", "does not begin with RIFF"),
    ],
)
def test_what_ffmpeg_mends_is_named_with_the_command(name: str, words: str) -> None:
    detail = refusal(NAMED[name].build()).detail
    assert words in detail
    assert detail.endswith(" ffmpeg -i <file> -ar 16000 -ac 1 -sample_fmt s16 output.wav")


@pytest.mark.parametrize(("name", "words"), [("ZIP", "a ZIP archive"), ("HTML", "HTML"), ("JSON", "JSON")])
def test_what_ffmpeg_does_not_mend_is_named_only(name: str, words: str) -> None:
    detail = refusal(NAMED[name].build()).detail
    assert words in detail
    assert "ffmpeg" not in detail


@pytest.mark.parametrize(
    ("data", "rate"),
    [
        (wav_bytes(4_000), 8_000),
        (wav_bytes(384_000), 48_000),
        (wav_bytes(44_100, channels=9), 44_100),
        (riff(fmt(tag="ima", bits=4, rate=22_050)), 22_050),
    ],
)
def test_the_command_keeps_what_it_can_of_the_rate(data: bytes, rate: int) -> None:
    assert f"ffmpeg -i <file> -ar {rate} -ac 1 -sample_fmt s16 output.wav" in refusal(data).detail


def test_channels_option() -> None:
    stereo = AudioFormat("pcm_s16le", 44_100, 2)
    with pytest.raises(InvalidAudio) as caught:
        check_channels(stereo, "reject")
    assert caught.value.code == "unsupported_channels"
    assert "channels=mix|first|split" in caught.value.detail
    assert "ffmpeg -i <file> -ar 44100 -ac 1 -sample_fmt s16 output.wav" in caught.value.detail
    for option in ("mix", "first", "split"):
        check_channels(stereo, option)
    check_channels(AudioFormat("pcm_s16le", 44_100, 1), "reject")


# When it says so.


@pytest.mark.parametrize(
    ("name", "byte"),
    [
        ("MP3 with ID3", 12),
        ("RIFX", 12),
        ("W64", 12),
        ("fmt of 14 bytes", 20),
        ("fmt of 1 GiB", 20),
        ("GSM", 40),
        ("nine channels", 36),
        ("rate 0", 36),
        ("only data", 20),
        ("LIST of 2 GiB", 44),
        ("data of half a frame", 44),
        ("data of size 0 then LIST", 48),
        ("two fmt that disagree", 60),
        ("chunks 20000", 12 + 24 + 1_023 * 8 + 8),
    ],
)
def test_refused_at_the_first_byte_that_proves_it(name: str, byte: int) -> None:
    assert refused_at(NAMED[name].build()) == byte


@pytest.mark.parametrize("size", [None, 0, wavs.UNTOLD])
def test_too_long_counts_received_audio(size: int | None) -> None:
    allowed = plain(data=samples(8_000), size=size)
    assert parse(allowed, max_duration_s=0.5).duration_ms == 500
    longer = plain(data=samples(8_001), size=size)
    assert refusal(longer, max_duration_s=0.5).code == "too_long"
    assert refused_at(longer, max_duration_s=0.5) == 44 + 16_002


def test_too_long_is_not_believed_from_the_header() -> None:
    assert parse(plain(data=samples(8_000), size=1 << 30), max_duration_s=0.5).frames == 8_000


@pytest.mark.parametrize("size", [None, 0, wavs.UNTOLD])
def test_the_bound_may_be_infinite(size: int | None) -> None:
    assert parse(plain(size=size), max_duration_s=float("inf")).frames == 1_600


def test_too_long_does_not_count_what_is_no_audio() -> None:
    after = chunk(b"LIST", bytes(1_000)) + bytes(1_000)
    assert parse(plain(data=samples(8_000), after=after), max_duration_s=0.5).frames == 8_000


@pytest.mark.parametrize(("frames", "total", "byte"), [(8_001, 44 + 16_002, 44), (8_001, 44 + 16_001, 16_046)])
def test_too_long_is_said_early_where_the_length_proves_it(frames: int, total: int, byte: int) -> None:
    assert refused_at(plain(data=samples(frames)), max_duration_s=0.5, total_bytes=total) == byte


def test_the_length_alone_proves_nothing() -> None:
    data = plain(data=samples(8_000), after=chunk(b"LIST", bytes(10_000)))
    assert refused_at(data, max_duration_s=0.5, total_bytes=len(data)) == len(data) + 1


# Properties.


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Valid and nearly valid files: sizes may lie, chunks may be odd, pads may lack."""
    body = draw(
        st.sampled_from([fmt(), fmt(extra=b"\0"), fmt(bits=8), fmt(bits=24, channels=2), extensible(3, bits=32)])
    )
    names = st.sampled_from([b"LIST", b"JUNK", b"data", b"fmt ", b"abcd", b"\0\0\0\0"])
    sizes = st.none() | st.sampled_from([0, 1, 7, 40, 5_000, wavs.UNTOLD])
    parts = st.builds(chunk, names, st.binary(max_size=60), sizes, pad=st.booleans())
    data = chunk(b"data", draw(st.binary(max_size=200)), draw(sizes), pad=draw(st.booleans()))
    before, after = draw(st.lists(parts, max_size=3)), draw(st.lists(parts, max_size=3))
    magic = draw(st.sampled_from([b"RIFF", b"RIFF", b"RF64"]))
    ds = (
        wavs.ds64(draw(st.sampled_from([0, 300])), draw(st.sampled_from([0, 40, 2**64 - 1])))
        if magic == b"RF64"
        else b""
    )
    return riff(ds, body, *before, data, *after, size=draw(sizes), magic=magic) + draw(st.binary(max_size=12))


@settings(max_examples=300, deadline=None)
@given(files(), st.data())
def test_cuts_do_not_matter(data: bytes, draw: st.DataObject) -> None:
    cuts = tuple(sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8))))
    whole = verdict(data, max_duration_s=0.002)
    assert verdict(data, cuts=cuts, max_duration_s=0.002) == whole
    assert verdict(data, cuts=tuple(range(len(data))), max_duration_s=0.002) == whole


@settings(max_examples=500, deadline=None)
@given(files(), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6), st.integers(0, 400))
@example(wav_bytes(frames=20), [(4, 255)], 400)
def test_rubbish_raises_nothing_else(data: bytes, flips: list[tuple[int, int]], length: int) -> None:
    broken = bytearray(data)
    for at, byte in flips:
        broken[at % len(broken)] = byte
    result = verdict(bytes(broken[:length]))
    if isinstance(result, tuple):
        assert result[0] in AUDIO_CODES
        assert result[1]
    else:
        assert {warning.code for warning in result.warnings} < WARNINGS
        assert result.frames > 0
        assert result.data_start + result.data_bytes <= length


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_after_the_magic(data: bytes) -> None:
    result = verdict(riff(data))
    assert isinstance(result, WavInfo) or result[0] in AUDIO_CODES


@settings(max_examples=100, deadline=None)
@given(files())
def test_little_is_held(data: bytes) -> None:
    parser = WavParser(max_duration_s=HOUR)
    try:
        for at in range(0, len(data), 7):
            parser.feed(data[at : at + 7])
            assert len(parser._held) <= 40
    except InvalidAudio:
        pass


@pytest.mark.parametrize("declared", [None, wavs.UNTOLD])
def test_a_gigabyte_of_audio_costs_no_memory(declared: int | None) -> None:
    size = declared or 64 << 20
    parser = WavParser(max_duration_s=1e6)
    parser.feed(riff(fmt(), size=size) + b"data" + struct.pack("<I", size))
    block = bytes(64 << 20)
    tracemalloc.start()
    try:
        for _ in range(16 if declared else 1):
            parser.feed(block)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10


def test_the_header_has_a_budget() -> None:
    within = riff(fmt(), chunk(b"JUNK", bytes((1 << 20) - 44)), chunk(b"data", samples()))
    assert parse(within).data_start == (1 << 20) + 8
    assert refusal(riff(fmt(), chunk(b"JUNK", bytes((1 << 20) - 42)), chunk(b"data", samples()))).code == "missing_data"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(kind: type[bytes] | type[bytearray] | type[memoryview]) -> None:
    parser = WavParser(max_duration_s=HOUR)
    parser.feed(kind(wav_bytes()))
    assert parser.finish().frames == 1_600


def test_a_refused_buffer_is_given_back() -> None:
    buffer = bytearray(b"ID3" + bytes(20))
    with pytest.raises(InvalidAudio) as caught:
        WavParser(max_duration_s=HOUR).feed(buffer)
    buffer.clear()
    assert caught.value.code == "not_wav"
