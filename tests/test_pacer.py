"""The wheel: nobody early, nobody much late, nobody stopped by another; and streams keep their time on it."""

import asyncio
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.pacing import LAG, Schedule
from service.pacer import TICK, Pacer, Timer
from tests.doubles import LoopClock, leaping

CATCH_UP = 1.05  # times real time, at most
SLACK = 0.001 + 1e-9  # the shortest timer the wheel sets


def wheel(on_tick: Callable[[float], None] = lambda _late: None) -> tuple[Pacer, LoopClock]:
    clock = LoopClock()
    return Pacer(clock, on_tick), clock


class Calls:
    """A stream that notes when it was called and asks for the times it is given."""

    def __init__(self, *again: float) -> None:
        self.at: list[float] = []
        self._again = list(again)

    def __call__(self, now: float) -> float | None:
        self.at.append(now)
        return self._again.pop(0) if self._again else None


@settings(max_examples=40)
@given(st.lists(st.floats(-1, 5), min_size=1, max_size=30))
def test_nobody_is_called_early_nor_more_than_a_tick_late(waits: list[float]) -> None:
    async def main() -> None:
        pacer, clock = wheel()
        start = clock.now()
        streams = [(start + wait, Calls()) for wait in waits]
        for due, stream in streams:
            pacer.add(due, stream)
        await clock.sleep(6)
        for due, stream in streams:
            (at,) = stream.at
            assert at >= due - 1e-9
            assert at <= max(due, start) + TICK + SLACK

    leaping(main())


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_stream_is_called_again_when_it_says_so(waits: list[float]) -> None:
    async def main() -> None:
        pacer, clock = wheel()
        wanted = [clock.now()]
        for wait in waits:
            wanted.append(wanted[-1] + wait)
        stream = Calls(*wanted[1:])
        pacer.add(wanted[0], stream)
        await clock.sleep(25)
        assert len(stream.at) == len(wanted)
        for due, at in zip(wanted, stream.at, strict=True):
            assert due - 1e-9 <= at

    leaping(main())


def test_a_stream_that_raises_is_dropped_with_its_error_and_stops_nobody() -> None:
    async def main() -> None:
        pacer, clock = wheel()
        now = clock.now()
        quiet = Calls(now + 0.1, now + 0.2)

        def broken(_now: float) -> float:
            raise ZeroDivisionError

        timers = [pacer.add(now + 0.05, broken), pacer.add(now + 0.05, quiet), pacer.add(now + 0.05, broken)]
        await clock.sleep(1)
        assert [type(timer.error) for timer in timers] == [ZeroDivisionError, type(None), ZeroDivisionError]
        assert len(quiet.at) == 3

    leaping(main())


def test_a_cancelled_stream_is_not_called_even_by_one_in_the_same_tick() -> None:
    async def main() -> None:
        pacer, clock = wheel()
        now = clock.now()
        victim, earlier, repeating = Calls(), Calls(), Calls(now + 0.1, now + 0.15)
        timers: list[Timer] = []

        def stops_the_others(_now: float) -> None:
            for timer in timers:
                timer.cancel()

        pacer.add(now + 0.05, earlier)
        pacer.add(now + 0.12, stops_the_others)
        timers += [pacer.add(now + 0.12, victim), pacer.add(now + 0.05, repeating)]
        await clock.sleep(1)
        assert (len(earlier.at), len(victim.at), len(repeating.at)) == (1, 0, 2)

    leaping(main())


def test_the_wheel_rests_when_nobody_is_on_it_and_starts_again() -> None:
    ticks: list[float] = []

    async def main() -> None:
        pacer, clock = wheel(ticks.append)
        for _ in range(3):
            stream = Calls()
            due = clock.now() + 0.05
            pacer.add(due, stream)
            await clock.sleep(0.1)
            assert due - 1e-9 <= stream.at[0] <= due + TICK + SLACK
            count = len(ticks)
            await clock.sleep(100)
            assert len(ticks) == count, "no tick while nobody is there"

    leaping(main())
    assert len(ticks) <= 3 * 13


def test_the_lateness_of_the_loop_is_told() -> None:
    ticks: list[float] = []
    late = iter([0.0, 0.0, 0.3])

    async def main() -> None:
        pacer, clock = wheel(ticks.append)
        stream = Calls()
        pacer.add(clock.now() + 0.5, stream)
        await clock.sleep(1)
        assert len(stream.at) == 1

    leaping(main(), late=lambda: next(late, 0.0))
    assert max(ticks) == pytest.approx(0.3, abs=0.01)


def test_streams_may_be_added_and_go_on_from_within_a_call() -> None:
    async def main() -> None:
        pacer, clock = wheel()
        seen: list[str] = []

        def child(_now: float) -> None:
            seen.append("child")

        def parent(now: float) -> float | None:
            seen.append("parent")
            pacer.add(now, child)
            return now + 0.02 if seen.count("parent") < 3 else None

        pacer.add(clock.now(), parent)
        await clock.sleep(1)
        assert seen == ["parent", "child"] * 3

    leaping(main())


# --- whole streams ---------------------------------------------------------------------------------------------------


def streamed(chunk_ms: int, seconds: float, late: Callable[[], float]) -> list[tuple[float, list[float]]]:
    """Twenty streams of an hour that start here and there; (start, times of sending) of each."""
    streams: list[tuple[float, list[float]]] = []

    async def main() -> None:
        pacer, clock = wheel()
        for n in range(20):
            start = clock.now() + 0.013 * n
            sent: list[float] = []
            streams.append((start, sent))
            pacer.add(start, sender(start, sent))
        await clock.sleep(seconds)

    def sender(start: float, sent: list[float]) -> Callable[[float], float]:
        schedule = Schedule(16_000, chunk_ms)

        def send(now: float) -> float:
            sent.append(now)
            return schedule.next_send(len(sent), start=start, sent_at=now)

        return send

    leaping(main(), late)
    return streams


@pytest.mark.parametrize("chunk_ms", [50, 100, 250])
def test_streams_keep_their_time_on_a_loop_that_is_always_a_little_late(chunk_ms: int) -> None:
    dice = random.Random(1)
    for start, sent in streamed(chunk_ms, 20, late=lambda: dice.uniform(0, 0.006)):
        lateness = [at - start - n * chunk_ms / 1000 for n, at in enumerate(sent)]
        assert min(lateness) >= -1e-9, "never early"
        assert max(lateness) < 0.02
        assert len(sent) >= (20 - 0.013 * 20) * 1000 / chunk_ms - 1, "and none falls behind"


@pytest.mark.parametrize("chunk_ms", [50, 100])
def test_streams_make_up_for_a_stall_of_the_loop_and_no_faster_than_they_may(chunk_ms: int) -> None:
    dice = random.Random(2)
    stalls = iter([*([0.0] * 200), 1.0])
    for start, sent in streamed(chunk_ms, 40, late=lambda: next(stalls, 0.0) + dice.uniform(0, 0.004)):
        lateness = [at - start - n * chunk_ms / 1000 for n, at in enumerate(sent)]
        assert min(lateness) >= -1e-9
        assert max(lateness) > 0.8, "there was a stall"
        assert max(lateness[-20:]) < 0.02, "and it is made up for"
        for n in range(0, len(sent) - 100, 10):
            for count in (1, 10, 100):
                took = sent[n + count] - sent[n]
                assert count * chunk_ms / 1000 <= CATCH_UP * (took + LAG + TICK) + 1e-6


async def test_on_a_real_loop_too() -> None:
    pacer = Pacer(LoopClock())
    loop = asyncio.get_running_loop()
    start = loop.time()
    stream = Calls(*[start + 0.01 * n for n in range(1, 10)])
    pacer.add(start, stream)
    async with asyncio.timeout(5):
        while len(stream.at) < 10:
            await asyncio.sleep(0)
    assert all(at >= start + 0.01 * n - 1e-9 for n, at in enumerate(stream.at))
