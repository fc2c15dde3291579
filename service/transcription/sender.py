"""Audio out: read ahead from the blob store, converted, and sent chunk by chunk when the pacer says so. Part of FLOOR
3.

`Source` reads off the event loop, a block at a time, and holds one to two. `Sender.tick` runs on the
pacer's wheel and never waits: a chunk is there or it is tried again a tick later, and the schedule catches up gently.
Positions are milliseconds of the file.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal

from service.core.errors import Unavailable
from service.core.pacing import FRAME_BYTES, Schedule
from service.core.samples import Converter
from service.core.wav import WavInfo
from service.flag import Flag
from service.pacer import TICK, Pacer, Timer
from service.ports import BlobStore, Clock, UpstreamSession
from service.telemetry import metrics

RETRY_SECONDS = 1.0
LOOK_SECONDS = 0.25  # whether to pause, and what follows from a position, is looked at as often, not for every chunk


async def read(
    blobs: BlobStore, key: str, start: int, length: int, clock: Clock, patience: Callable[[], float]
) -> bytes:
    """`BlobStore.read`, tried again each second for `patience()` seconds while the audio store is away."""
    began = clock.now()
    while True:
        try:
            return await blobs.read(key, start, length)
        except Unavailable:
            if clock.now() - began >= patience():
                raise
        await clock.sleep(RETRY_SECONDS)


class Source:
    """The audio of one channel from a position on, as it goes upstream."""

    def __init__(
        self,
        read: Callable[[int, int], Awaitable[bytes]],
        info: WavInfo,
        channel: int | Literal["mix"],
        position_ms: int,
        block_seconds: float = 1,
    ) -> None:
        """`read(start, length)` reads the file; `position_ms` may be anywhere in it."""
        self._read = read
        self._converter = Converter(info.format, channel)
        self._plain = not info.format.converted
        # Blocks of one size, never joined: others would leave holes in the heap that cost a thousand streams as much
        # again.
        self._block = int(block_seconds * info.format.sample_rate) * info.format.frame_bytes
        self._enough = int(block_seconds * info.format.upstream_rate) * FRAME_BYTES
        frame = position_ms * info.format.sample_rate // 1000
        self._at = info.data_start + frame * info.format.frame_bytes
        self._end = info.data_start + info.data_bytes
        self._blocks: deque[bytes] = deque()
        self._taken = 0  # of the first
        self._left = 0  # of all
        self._low = Flag()
        self._low.set()
        self.complete = False  # everything has been read; what is buffered is the rest

    async def run(self) -> None:
        """Keep the buffer filled until the end of the audio."""
        while not self.complete:
            await self._low.wait()
            await self._fill()

    async def _fill(self) -> None:
        # Apart from `run`, which waits for seconds: a thousand streams would all keep their last block meanwhile.
        block = await self._read(self._at, min(self._block, self._end - self._at))
        self._at += len(block)
        last = self._at >= self._end or not block
        if self._plain:  # no work for a thread
            data = self._converter.convert(block, last=last)
        else:
            data = await asyncio.to_thread(self._converter.convert, block, last=last)
        self._blocks.append(data)
        self._left += len(data)
        self.complete = last
        if self._left >= self._enough:
            self._low.clear()

    def take(self, size: int) -> bytes | None:
        """The next `size` bytes; fewer only at the end, empty after it; None if the disk has not delivered yet."""
        if self._left < size and not self.complete:
            self._enough = max(self._enough, size)  # a chunk may be longer than a block
            self._low.set()
            return None
        chunk = self._next(size)
        while self._blocks and len(chunk) < size:
            chunk += self._next(size - len(chunk))
        self._left -= len(chunk)
        if self._left < self._enough:
            self._low.set()
        return chunk

    def _next(self, size: int) -> bytes:
        """Up to `size` bytes of the first block."""
        if not self._blocks:
            return b""
        block, start = self._blocks[0], self._taken
        self._taken = end = start + size
        if end >= len(block):
            self._blocks.popleft()
            self._taken = 0
        return block[start:end]

    def exhausted(self) -> bool:
        """Nothing more will come."""
        return self.complete and not self._left


class Sender:
    """Feeds one session."""

    def __init__(
        self,
        session: UpstreamSession,
        source: Source,
        schedule: Schedule,
        clock: Clock,
        *,
        offset_ms: int,
        total_ms: int,
        paused: Callable[[float], bool],
        sent: Callable[[float], None],
        ended: Callable[[], None],
        broke: Callable[[Exception], None],
    ) -> None:
        """`paused(now)`: nothing may be sent. It and `sent(now)` are called each `LOOK_SECONDS`, and first by a process
        that slept for longer. `ended()` when the last chunk would have been spoken. `broke(exc)`: something raised, and
        nothing more will be sent.
        """
        self._session = session
        self._source = source
        self._schedule = schedule
        self._clock = clock
        self._offset_ms = offset_ms
        self._total_ms = total_ms
        self._paused = paused
        self._sent = sent
        self._ended = ended
        self._broke = broke
        self._chunk = 0
        self._bytes = 0
        self._timer: Timer | None = None
        self._due = 0.0  # when the next chunk is to go
        self._look_at = 0.0
        self.start: float | None = None

    def begin(self, pacer: Pacer, start: float) -> None:
        """Send chunk 0 at `start` and the others after it."""
        self.start = self._due = start
        self._timer = pacer.add(start, self.tick)

    def stop(self) -> None:
        """Send nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def elapsed_ms(self, now: float) -> float:
        """How long the session has been fed."""
        return 0.0 if self.start is None else (now - self.start) * 1000

    def tick(self, now: float) -> float | None:
        """Called by the pacer when a chunk, or the end, is due."""
        try:
            looking = now >= self._look_at
            if not self._session.ready or (looking and self._paused(now)):
                return self._later(now)
            chunk = self._source.take(self._schedule.chunk_bytes)
            if chunk is None:
                return now + TICK
            if not chunk:
                self._ended()
                return None
            again = self._send(chunk, now)
            if looking:
                self._look_at = now + LOOK_SECONDS
                self._sent(now)
            return again
        except Exception as exc:
            self._broke(exc)  # the pacer would only drop it, and the job would stream nothing for ever
            raise

    def _later(self, now: float) -> float | None:
        if self._session.failed:
            return None
        self._due = now + self._schedule.chunk_seconds
        return self._due

    def _send(self, chunk: bytes, now: float) -> float:
        # Against its own plan: a stream that makes up for an outage is behind the recording, and yet in time.
        metrics.chunk_lateness.observe(now - self._due)
        self._session.send(self._schedule.padded(chunk))
        self._chunk += 1
        self._bytes += len(chunk)
        assert self.start is not None
        if self._source.exhausted():
            return max(now, self.start + self._schedule.seconds(self._bytes))
        self._due = self._schedule.next_send(self._chunk, start=self.start, sent_at=now)
        return self._due

    @property
    def position_ms(self) -> int | None:
        """Where in the file the audio that was sent ends; None before any was."""
        if not self._bytes:
            return None
        sent_ms = self._bytes // FRAME_BYTES * 1000 // self._schedule.rate
        return self._total_ms if self._source.exhausted() else min(self._offset_ms + sent_ms, self._total_ms)
