"""The send schedule: no drift at any rate, never early, bounded catch-up that does catch up, messages of legal size."""

from fractions import Fraction
from itertools import islice
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.core.pacing import LAG, Schedule, backoff
from service.core.protocol import MAX_MESSAGE_BYTES

RATES = st.integers(8000, 96_000)
CHUNKS = st.integers(50, 1000)
USUAL_RATES = [8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 64_000, 88_200, 96_000]
TWELVE_HOURS = 12 * 3600
CATCH_UP = 1.05  # times real time, at most


# --- sizes -----------------------------------------------------------------------------------------------------------


@given(RATES, CHUNKS)
@example(11_025, 50)
@example(22_050, 50)
@example(96_000, 1000)
def test_every_message_is_of_a_length_that_upstream_accepts(rate: int, chunk_ms: int) -> None:
    schedule = Schedule(rate, chunk_ms)
    milliseconds = Fraction(1000 * schedule.chunk_frames, rate)
    assert 50 <= milliseconds <= 1000
    assert schedule.chunk_bytes == 2 * schedule.chunk_frames <= MAX_MESSAGE_BYTES
    if schedule.chunk_bytes < MAX_MESSAGE_BYTES:
        assert schedule.chunk_frames == ceil(Fraction(rate * chunk_ms, 1000)), "no shorter than asked for"


def test_the_size_limit_bites_only_above_64_khz() -> None:
    assert Schedule(64_000, 1000).chunk_bytes == MAX_MESSAGE_BYTES == 128_000
    assert Schedule(96_000, 1000).chunk_bytes == 128_000
    assert Schedule(96_000, 600).chunk_bytes == 115_200


@given(RATES, CHUNKS, st.integers(1, 96_000))
@example(11_025, 100, 1)
def test_a_short_tail_is_padded_with_silence_to_50_ms_and_no_more(rate: int, chunk_ms: int, frames: int) -> None:
    schedule = Schedule(rate, chunk_ms)
    tail = b"\x01\x02" * min(frames, schedule.chunk_frames)
    message = schedule.padded(tail)
    assert message[: len(tail)] == tail
    assert set(message[len(tail) :]) <= {0}
    assert Fraction(1000 * len(message) // 2, rate) >= 50
    assert len(message) == max(len(tail), 2 * ceil(Fraction(rate, 20)))
    assert schedule.padded(message) == message


@given(RATES, st.integers(0, 10**9))
def test_bytes_are_seconds(rate: int, frames: int) -> None:
    assert Schedule(rate, 100).seconds(2 * frames) == pytest.approx(frames / rate, rel=1e-12)


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_ms", [50, 100, 333, 1000])
@pytest.mark.parametrize("rate", USUAL_RATES)
def test_no_rate_drifts_in_twelve_hours(rate: int, chunk_ms: int) -> None:
    schedule = Schedule(rate, chunk_ms)
    last = TWELVE_HOURS * rate // schedule.chunk_frames
    for chunk in (0, 1, 2, 1000, last - 1, last):
        assert abs(Fraction(schedule.due(chunk)) - Fraction(chunk * schedule.chunk_frames, rate)) < Fraction(1, 10**6)


@given(RATES, CHUNKS, st.lists(st.floats(0, 0.019), min_size=50, max_size=50))
def test_a_stream_that_is_called_a_little_late_each_time_stays_on_time(
    rate: int, chunk_ms: int, lateness: list[float]
) -> None:
    schedule = Schedule(rate, chunk_ms)
    wanted = 0.0
    for chunk, late in enumerate(lateness, 1):
        wanted = schedule.next_send(chunk, start=0.0, sent_at=wanted + late)
        assert wanted == schedule.due(chunk)


@given(
    RATES,
    CHUNKS,
    st.lists(st.one_of(st.floats(0, 0.03), st.floats(0, 30)), min_size=2, max_size=60),
    st.sampled_from([0.0, 0.005]),
)
def test_never_early_and_never_faster_than_the_catch_up(
    rate: int, chunk_ms: int, lateness: list[float], tick: float
) -> None:
    """Whatever happens between the calls; `tick`: calls fall on a grid, as the pacer's do."""
    schedule = Schedule(rate, chunk_ms)
    start = 1000.0
    sent: list[float] = []
    wanted = start
    for chunk, late in enumerate(lateness, 1):
        at = wanted if not tick else ceil(wanted / tick) * tick
        sent.append(at + late)
        assert sent[-1] >= start + schedule.due(chunk - 1) - 1e-9
        wanted = schedule.next_send(chunk, start=start, sent_at=sent[-1])
    for i, first in enumerate(sent):
        for j, later in enumerate(sent[i:]):
            assert j * schedule.chunk_seconds <= CATCH_UP * (later - first + LAG) + 1e-6


@pytest.mark.parametrize("chunk_ms", [50, 100, 250, 1000])
def test_a_stall_is_made_up_for_at_the_catch_up_speed(chunk_ms: int) -> None:
    """Also on the grid of the pacer and with the usual lateness, which at 50 and 100 ms are longer than what a chunk gains."""
    schedule = Schedule(16_000, chunk_ms)
    stall, tick, late = 2.0, 0.005, 0.003
    wanted, now, chunk = 0.0, 0.0, 0
    while True:
        now = max(now, ceil(wanted / tick) * tick) + late
        if chunk == 10:
            now += stall
        chunk += 1
        wanted = schedule.next_send(chunk, start=0.0, sent_at=now)
        if chunk > 10 and wanted == schedule.due(chunk):
            break
        assert now < 60, "it never catches up"
    needed = schedule.due(10) + stall * CATCH_UP / (CATCH_UP - 1)
    assert needed - 2 < now < needed + 2


# --- reconnecting ----------------------------------------------------------------------------------------------------


def test_the_backoff_doubles_to_thirty_seconds() -> None:
    assert [backoff(n, 1.0) for n in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_the_backoff_is_jittered_and_never_nothing(attempt: int, jitter: float) -> None:
    assert 0.05 <= backoff(attempt, jitter) <= 30
    assert backoff(attempt, jitter) == max(0.05, backoff(attempt, 1.0) * jitter)


def test_the_pieces_make_the_whole_file() -> None:
    """Chunks at 11,025 Hz: 551.25 frames of 50 ms are sent as 552, and the last message ends where the file does."""
    schedule = Schedule(11_025, 50)
    assert schedule.chunk_frames == 552
    pcm = bytes(range(256)) * 100
    pieces = [pcm[at : at + schedule.chunk_bytes] for at in range(0, len(pcm), schedule.chunk_bytes)]
    assert b"".join(pieces) == pcm
    assert list(islice((schedule.due(n) for n in range(3)), 3)) == [0, 552 / 11_025, 1104 / 11_025]
