"""The converter: known values of every encoding, channels, resampling, and that cuts between blocks leave no trace."""

import math
import struct
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.formats import SAMPLE_BYTES, AudioFormat
from service.core.samples import Converter

Channel = int | Literal["mix"]


def convert(
    data: bytes, encoding: str = "pcm_s16le", *, rate: int = 16_000, channels: int = 1, channel: Channel = 0
) -> list[int]:
    out = Converter(AudioFormat(encoding, rate, channels), channel).convert(data, last=True)
    return list(struct.unpack(f"<{len(out) // 2}h", out))


def blockwise(data: bytes, fmt: AudioFormat, channel: Channel, cuts: list[int]) -> bytes:
    converter = Converter(fmt, channel)
    blocks = [data[start:stop] for start, stop in pairwise([0, *cuts, len(data)])]
    return b"".join(converter.convert(block, last=at == len(blocks) - 1) for at, block in enumerate(blocks))


def s24(*values: int) -> bytes:
    return b"".join(value.to_bytes(3, "little", signed=True) for value in values)


# Encodings. Values by hand; those of G.711 from the tables of the Recommendation.


def test_16_bit_mono_is_handed_through_untouched() -> None:
    block = struct.pack("<3h", -32_768, 0, 32_767)
    assert Converter(AudioFormat("pcm_s16le", 96_000, 1)).convert(block) is block


def test_u8() -> None:
    assert convert(bytes([0, 127, 128, 129, 255]), "pcm_u8") == [-32_768, -256, 0, 256, 32_512]


def test_s24_is_rounded_half_to_even_and_clipped() -> None:
    data = s24(0, 256, -256, 128, 384, -128, 127, -129, 0x7FFFFF, -0x800000)
    assert convert(data, "pcm_s24le") == [0, 1, -1, 0, 2, 0, 0, -1, 32_767, -32_768]


def test_s32() -> None:
    data = struct.pack("<6i", 0, 1 << 16, -(1 << 16), 1 << 15, 2**31 - 1, -(2**31))
    assert convert(data, "pcm_s32le") == [0, 1, -1, 0, 32_767, -32_768]


@pytest.mark.parametrize(("encoding", "letter"), [("pcm_f32le", "f"), ("pcm_f64le", "d")])
def test_float_is_clipped_and_nan_is_silence(encoding: str, letter: str) -> None:
    values = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -7e30, math.inf, -math.inf, math.nan, 1 / 32_768, 1e-40]
    wanted = [0, 0, 16_384, -16_384, 32_767, -32_768, 32_767, -32_768, 32_767, -32_768, 0, 1, 0]
    assert convert(struct.pack(f"<{len(values)}{letter}", *values), encoding) == wanted


def test_signalling_nan_is_silence_too() -> None:
    assert convert(bytes.fromhex("010080ff 0100a07f 0000003f"), "pcm_f32le") == [0, 0, 16_384]


def test_mulaw() -> None:
    known = {0x00: -32_124, 0x0F: -16_764, 0x7F: 0, 0x80: 32_124, 0xAF: 4_092, 0xF0: 120, 0xFE: 8, 0xFF: 0, 0x7E: -8}
    assert convert(bytes(known), "pcm_mulaw") == list(known.values())


def test_alaw() -> None:
    known = {0xD5: 8, 0x55: -8, 0xD4: 24, 0x54: -24, 0xC5: 264, 0xAA: 32_256, 0x2A: -32_256, 0x80: 5_504, 0x00: -5_504}
    assert convert(bytes(known), "pcm_alaw") == list(known.values())


@pytest.mark.parametrize("encoding", ["pcm_alaw", "pcm_mulaw"])
def test_g711_is_odd_and_monotonic(encoding: str) -> None:
    values = convert(bytes(range(256)), encoding)
    assert [-value for value in values[128:]] == values[:128]
    invert = 0x55 if encoding == "pcm_alaw" else 0x7F
    rising = [values[0x80 | (step ^ invert)] for step in range(128)]
    assert rising == sorted(set(rising))


# Channels.


def test_one_channel() -> None:
    frames = struct.pack("<6h", 1, 2, 3, 4, 5, 6)
    assert convert(frames, channels=3) == [1, 4]
    assert convert(frames, channels=3, channel=2) == [3, 6]
    assert convert(s24(256, 512, 768, 1_024), "pcm_s24le", channels=2, channel=1) == [2, 4]


def test_mix_is_the_mean_rounded_once() -> None:
    frames = struct.pack("<8h", 1, 2, 3, 4, -32_768, -32_768, 32_767, 32_767)
    assert convert(frames, channels=2, channel="mix") == [2, 4, -32_768, 32_767]
    # Rounded each by itself these would be 0 and 0.
    assert convert(s24(120, 200), "pcm_s24le", channels=2, channel="mix") == [1]
    assert convert(struct.pack("<2d", 3.0, -0.5), "pcm_f64le", channels=2, channel="mix") == [8_192]
    assert convert(bytes([128, 130, 128]), "pcm_u8", channels=3, channel="mix") == [171]


# Blocks.


def test_unfinished_frame_is_dropped_at_the_end_only() -> None:
    converter = Converter(AudioFormat("pcm_s16le", 8_000, 1))
    assert converter.convert(b"\x01") == b""
    assert converter.convert(b"\x02\x03") == b"\x01\x02"
    assert converter.convert(b"\x04\x05", last=True) == b"\x03\x04"


@pytest.mark.parametrize("fmt", [AudioFormat("pcm_f32le", 192_000, 2), AudioFormat("pcm_u8", 8_000, 1)])
def test_nothing_becomes_nothing(fmt: AudioFormat) -> None:
    assert Converter(fmt, "mix").convert(b"") == b""
    assert Converter(fmt, "mix").convert(b"", last=True) == b""


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cuts_leave_no_trace(draw: st.DataObject) -> None:
    encoding = draw.draw(st.sampled_from(sorted(SAMPLE_BYTES)))
    channels = draw.draw(st.integers(1, 4))
    fmt = AudioFormat(encoding, draw.draw(st.sampled_from([8_000, 96_001, 192_000])), channels)
    channel = draw.draw(st.sampled_from(["mix", *range(channels)]))
    data = draw.draw(st.binary(max_size=1_200))
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    whole = Converter(fmt, channel).convert(data, last=True)
    assert blockwise(data, fmt, channel, cuts) == whole
    if fmt.upstream_rate == fmt.sample_rate:
        assert len(whole) == len(data) // fmt.frame_bytes * 2


# Resampling.


def tone(rate: int, frames: int, hertz: float = 1_000.0) -> npt.NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(frames) / rate)


@pytest.mark.parametrize("rate", [96_001, 100_000, 176_400, 192_000])
@pytest.mark.parametrize("frames", [1, 7, 1_000, 40_003])
def test_resampled_length(rate: int, frames: int) -> None:
    out = convert(bytes(2 * frames), rate=rate)
    assert abs(len(out) - frames * 48_000 / rate) <= 1


@pytest.mark.parametrize("rate", [96_001, 176_400, 192_000])
def test_resampling_keeps_a_tone_in_time_and_in_blocks(rate: int) -> None:
    fmt = AudioFormat("pcm_f32le", rate, 1)
    data = tone(rate, rate // 2).astype("<f4").tobytes()
    whole = Converter(fmt).convert(data, last=True)
    assert blockwise(data, fmt, 0, list(range(999, len(data), 10_007))) == whole
    got = np.frombuffer(whole, "<i2") / 32_768
    wanted = tone(48_000, len(got))
    assert np.abs(got - wanted)[200:-200].max() < 1e-3


def test_resampling_does_not_wrap_around() -> None:
    square = np.where(np.arange(19_200) // 192 % 2, 32_767, -32_768).astype("<i2").tobytes()
    out = np.array(convert(square, rate=192_000))
    halves = out.reshape(-1, 48)[:, 8:40]
    assert (np.sign(halves) == np.sign(halves[:, :1])).all()
