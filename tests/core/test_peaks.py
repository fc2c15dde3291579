"""The outline of a file's loudness."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.formats import SAMPLE_BYTES, AudioFormat
from service.core.peaks import MAX_PEAKS, PeakFinder, Peaks

MONO = AudioFormat("pcm_s16le", 16_000, 1)


def find(fmt: AudioFormat, data: bytes, *cuts: int) -> Peaks:
    finder = PeakFinder(fmt, len(data) // fmt.frame_bytes)
    for start, stop in zip((0, *cuts), (*cuts, len(data)), strict=True):
        finder.feed(data[start:stop])
    return finder.finish()


def s16(*samples: int) -> bytes:
    return np.array(samples, "<i2").tobytes()


def test_lowest_and_highest_of_each_stretch() -> None:
    data = s16(*[0] * 16, *[0] * 7, 16_384, -8_192, *[0] * 7, 32_767, -32_768, 5)
    assert find(MONO, data) == Peaks(1, [[0, 0], [-0.25, 0.5], [-1, 1]])


def test_the_louder_channel_counts() -> None:
    data = s16(*[100, -16_384, 8_192, 0] * 8)
    assert find(AudioFormat("pcm_s16le", 8_000, 2), data) == Peaks(1, [[-0.5, 0.25], [-0.5, 0.25]])


@pytest.mark.parametrize(
    ("encoding", "sample", "peak"),
    [
        ("pcm_u8", b"\xc0", 0.5),
        ("pcm_u8", b"\x00", -1.0),
        ("pcm_s16le", s16(-16_384), -0.5),
        ("pcm_s24le", b"\x00\x00\x40", 0.5),
        ("pcm_s32le", np.array([2**30], "<i4").tobytes(), 0.5),
        ("pcm_f32le", np.array([-0.125], "<f4").tobytes(), -0.125),
        ("pcm_f32le", np.array([np.nan], "<f4").tobytes(), 0.0),
        ("pcm_f64le", np.array([99.0], "<f8").tobytes(), 1.0),
        ("pcm_alaw", b"\xaa", 0.984),
        ("pcm_mulaw", b"\x00", -0.98),
    ],
)
def test_every_encoding(encoding: str, sample: bytes, peak: float) -> None:
    found = find(AudioFormat(encoding, 8_000, 3), sample * 3 * 8)
    assert found == Peaks(1, [[peak, peak]])


@given(st.data())
def test_the_same_however_the_file_is_cut(data: st.DataObject) -> None:
    fmt = AudioFormat(
        data.draw(st.sampled_from(["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_alaw"])),
        data.draw(st.sampled_from([8_000, 11_025, 44_100, 192_000])),
        data.draw(st.integers(1, 8)),
    )
    frames = data.draw(st.integers(1, 40_000))
    audio = np.random.default_rng(frames).integers(0, 256, frames * fmt.frame_bytes, np.uint8).tobytes()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(audio)), max_size=5)))
    whole = find(fmt, audio)
    assert find(fmt, audio, *cuts) == whole
    span = fmt.sample_rate * whole.ms_per_peak / 1000
    assert len(whole.peaks) == np.ceil(frames / span)


@given(st.sampled_from([8_000, 11_025, 16_000, 22_050, 192_000]), st.integers(1, 12 * 3600 * 16_000))
def test_there_are_few_and_they_cover_the_file(rate: int, frames: int) -> None:
    fmt = AudioFormat("pcm_s16le", rate, 1)
    found = PeakFinder(fmt, frames).finish()
    assert 1 <= len(found.peaks) <= MAX_PEAKS
    ms = frames * 1000 / rate
    assert (len(found.peaks) - 1) * found.ms_per_peak < ms <= len(found.peaks) * found.ms_per_peak
    assert found.ms_per_peak == 1 or len(found.peaks) > MAX_PEAKS // 2 - 1
    assert found.peaks == [[0.0, 0.0]] * len(found.peaks), "what never came is silent"


def test_every_encoding_is_tested() -> None:
    (mark,) = (m for m in test_every_encoding.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    assert {row[0] for row in mark.args[1]} == set(SAMPLE_BYTES)
