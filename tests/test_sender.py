"""Audio out: what is read ahead, what of it is kept, and what counts as late."""

import asyncio
import random
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from service.core.admission import LATE_SECONDS
from service.core.formats import AudioFormat
from service.core.pacing import Schedule
from service.core.wav import WavInfo
from service.pacer import Pacer
from service.ports import UpstreamSession
from service.telemetry import metrics
from service.transcription.sender import Sender, Source
from tests.doubles import LoopClock, leaping

Read = Callable[[int, int], Awaitable[bytes]]
HEAD = 44


def mono(rate: int, seconds: float) -> WavInfo:
    return WavInfo(AudioFormat("pcm_s16le", rate, 1), HEAD, int(rate * seconds), ())


@asynccontextmanager
async def reading(read: Read, info: WavInfo, block_seconds: float = 1) -> AsyncIterator[Source]:
    """A source whose task runs."""
    source = Source(read, info, 0, 0, block_seconds)
    task = asyncio.create_task(source.run())
    try:
        yield source
    finally:
        task.cancel()
        await asyncio.wait([task])


async def taken(source: Source, size: int) -> bytes:
    """The next chunk, once it is there."""
    async with asyncio.timeout(10):
        while (chunk := source.take(size)) is None:
            await asyncio.sleep(0)
    return chunk


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("chunk_ms", [50, 100, 1000])
async def test_every_byte_comes_once_in_chunks_of_any_length(rate: int, chunk_ms: int) -> None:
    """Also where a chunk is longer than a block."""
    info = mono(rate, 7.3)
    audio = random.Random(rate).randbytes(info.data_bytes)

    async def read(start: int, length: int) -> bytes:
        return audio[start - HEAD : start - HEAD + length]

    size, got = Schedule(rate, chunk_ms).chunk_bytes, []
    async with reading(read, info) as source:
        while not source.exhausted():
            got.append(await taken(source, size))
    assert b"".join(got) == audio
    assert {len(chunk) for chunk in got[:-1]} == {size}


async def test_two_seconds_are_held_and_no_copy_of_them() -> None:
    """However long the file is."""
    info, reads = mono(16_000, 3600), 0

    async def read(_start: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        return bytes(length)

    most = 0
    async with reading(read, info) as source:
        await taken(source, 1600)
        tracemalloc.start()
        try:
            while reads < 40:
                await taken(source, 1600)
                await asyncio.sleep(0)
                most = max(most, tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert 32_000 < most < 64_000 + 8192


async def test_a_slow_store_is_read_seldom_and_in_time() -> None:
    """Blocks of four seconds, and one of them always ahead."""
    info, asked, answer = mono(16_000, 40), [], asyncio.Event()

    async def read(start: int, length: int) -> bytes:
        asked.append(start)
        if len(asked) > 2:
            await answer.wait()
        return bytes(length)

    async with reading(read, info, 4) as source:
        for second in range(8):
            assert await taken(source, 32_000) == bytes(32_000), second
            await asyncio.sleep(0.01)  # the reader looks how much is left
            assert len(asked) == (2 if second < 4 else 3)
        assert source.take(32_000) is None
        answer.set()
        await taken(source, 32_000)
    assert asked[:3] == [HEAD, HEAD + 4 * 32_000, HEAD + 8 * 32_000]


class Wire:
    """An upstream session that takes everything, or for a while nothing."""

    failed = False

    def __init__(self) -> None:
        self.sent = 0
        self.full = False

    @property
    def ready(self) -> bool:
        return not self.full

    def send(self, _frame: bytes) -> None:
        self.sent += 1


def sent_and_late(*, loop_late: Callable[[], float] = lambda: 0.0, disk: float = 0.0, stall: float = 0.0) -> list[int]:
    """Stream 30 s; how many chunks went within 30 s, and how many of them count as late.

    The disk takes `disk` seconds for the first block, and upstream takes nothing for `stall` seconds.
    """

    async def main() -> int:
        info = mono(16_000, 3600)
        clock, wire, first = LoopClock(), Wire(), True

        async def read(_start: int, length: int) -> bytes:
            nonlocal first
            if first:
                await asyncio.sleep(disk)
                first = False
            return bytes(length)

        async with reading(read, info) as source:
            sender = Sender(
                cast("UpstreamSession", wire), source, Schedule(16_000, 50), clock, offset_ms=0, total_ms=info.duration_ms,
                paused=lambda _now: False, sent=lambda _now: None, ended=lambda: None, broke=lambda _exc: None,
            )  # fmt: skip
            sender.begin(Pacer(clock), clock.now())
            await clock.sleep(10)
            wire.full = True
            await clock.sleep(stall)
            wire.full = False
            await clock.sleep(20 - stall)
            sender.stop()
        return wire.sent

    def late() -> float:
        value = metrics.registry.get_sample_value
        name = "turnwire_chunk_lateness_seconds"
        return (value(f"{name}_count") or 0) - (value(f"{name}_bucket", {"le": str(LATE_SECONDS)}) or 0)

    before = late()
    return [leaping(main(), loop_late), round(late() - before)]


def test_making_up_for_an_outage_is_not_late() -> None:
    """What comes after is behind the recording, for twenty times as long, and goes when it is due."""
    total, late = sent_and_late(disk=0.5)
    assert late == 1
    assert 597 <= total <= 601, "and all is made up for"
    total, late = sent_and_late(stall=0.5)
    assert late == 0
    assert 597 <= total <= 601


def test_what_the_machine_delays_is_late() -> None:
    stalls = iter([*([0.0] * 300), 0.5])
    assert sent_and_late(loop_late=lambda: next(stalls, 0.0))[1] == 1
    total, late = sent_and_late(loop_late=lambda: 0.03)
    assert late > total / 4
