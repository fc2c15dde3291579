"""How the channels of a running job are told to stop, held to a pace, and started together. Part of FLOOR 3."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import structlog

from service.core.errors import Fenced, OurError
from service.core.job import Failure
from service.core.wav import WavInfo
from service.flag import Flag
from service.pacer import Pacer
from service.ports import BlobStore, Clock, Upstream
from service.transcription.recorder import Recorder

CANCEL_SECONDS = 2.0
SLACK_SECONDS = 1.0  # of a minute of sessions
RESERVE_SECONDS = 2.0  # of the wall, for the database to give a place

Stop = Literal["cancel", "drain", "failed"]

log = structlog.get_logger(__name__)


class Control:
    """How a running job is told to stop."""

    def __init__(self, *, drain_s: float) -> None:
        """`drain_s`: how long sessions may take to say their last words on a drain."""
        self.stop: Stop | None = None
        self.stopped = Flag()
        self.listeners: set[Callable[[], None]] = set()
        self._drain_s = drain_s

    def ask(self, stop: Stop) -> None:
        """Stop the job. A cancel outranks a drain; a repeat changes nothing."""
        if self.stop in (stop, "cancel"):
            return
        self.stop = stop
        self.stopped.set()
        for listener in tuple(self.listeners):
            listener()

    @property
    def grace_s(self) -> float:
        """How long to wait for Termination."""
        return CANCEL_SECONDS if self.stop == "cancel" else self._drain_s


class Lease:
    """How long this process may act as the owner of a job, by its own clock: a safe part of what the database gives.

    It counts from before each renewal was asked for, so that it ends first wherever the answer was slow. A process that
    is alone with its database needs no such bound.
    """

    def __init__(self, clock: Clock, seconds: float, *, alone: bool) -> None:
        """`seconds` of the wall: that is what the database counts. No audio may go before the first renewal."""
        self._clock = clock
        self._seconds = 0.8 * seconds / clock.real(1)
        self._until = float("inf") if alone else clock.now() + self._seconds
        self._proven = alone

    def renewed(self, asked: float) -> None:
        """A renewal succeeded that was asked for at `asked`."""
        self._proven = True
        self._until = max(self._until, asked + self._seconds)

    def held(self, now: float) -> bool:
        """Whether audio may be sent. Whoever sends asks: a process that slept may wake up with its lease long over."""
        return self._proven and now < self._until

    async def over(self) -> None:
        """Wait for the end of the lease and raise `Fenced`."""
        while (left := self._until - self._clock.now()) > 0:
            await self._clock.sleep(min(left, 3600))
        raise Fenced("The lease ran out.")


class SessionGate:
    """Paces new upstream sessions, those of all processes on a database together, and bounds handshakes at once.

    Whoever is at the head of this process's line takes the next place, and leaves it to the one behind when it is
    stopped: places are not taken for sessions that never begin, and no process has more than one ahead.
    """

    def __init__(
        self, clock: Clock, *, per_minute: int, reserve: Callable[[float], Awaitable[float]], in_flight: int = 4
    ) -> None:
        """`per_minute` 0: no limit. `reserve(interval)` takes a place and returns how long it is until then, both in
        seconds of the wall; it raises `OurError` when that cannot be known.
        """
        self._clock = clock
        # A session may begin a little after its place, the N-th after it on time: not within one minute even so.
        self._interval = (60 + SLACK_SECONDS) / per_minute if per_minute else 0.0
        self._reserve = reserve
        self._line = asyncio.Lock()
        self._place: float | None = None  # taken and not used
        self._alone = 0.0  # the next place, where only this process is known of
        self._connecting = asyncio.Semaphore(in_flight)

    @asynccontextmanager
    async def enter(self, tell: Callable[[bool], None]) -> AsyncIterator[float]:
        """Wait for a place, then connect inside; yields how long the pace was waited for, in seconds.

        Calls `tell(True)` when it has to wait and `tell(False)` when it may connect.
        """
        began = self._clock.now()
        if not self._interval:
            tell(False)
            async with self._connecting:
                yield 0.0
            return
        if self._line.locked():
            tell(True)
        async with self._connecting:  # first: a place must be used when it is due
            async with self._line:
                await self._wait(tell)
            tell(False)
            yield self._clock.now() - began

    async def _wait(self, tell: Callable[[bool], None]) -> None:
        if self._place is None or self._place < self._clock.now() - SLACK_SECONDS:
            self._place = await self._next()
        if (left := self._place - self._clock.now()) > 0:
            tell(True)
            await self._clock.sleep(left)
        self._place = None

    async def _next(self) -> float:
        try:
            async with asyncio.timeout(RESERVE_SECONDS):
                wait = await self._reserve(self._clock.real(self._interval))
            place = self._clock.now() + wait / self._clock.real(1)
        except (OurError, TimeoutError) as exc:
            log.warning("sessions are paced without knowing of other processes", error=str(exc))
            place = max(self._clock.now(), self._alone)
        self._alone = place + self._interval
        return place


@dataclass(frozen=True, slots=True)
class Work:
    """What all channels of a running job share."""

    recorder: Recorder
    control: Control
    lease: Lease
    info: WavInfo
    clock: Clock
    pacer: Pacer
    blobs: BlobStore
    upstream: Upstream
    gate: SessionGate
    patience_s: float
    start_line: "StartLine"
    jitter: Callable[[], float] = random.random


@dataclass(slots=True)
class StartLine:
    """Lets the channels of a job start on one clock: nobody is fed before everyone has begun."""

    expected: int
    waiting: list[tuple[int, Callable[[float], None]]] = field(default_factory=list)
    open: bool = False

    def arrive(self, position_ms: int, go: Callable[[float], None], now: float) -> None:
        """`go(start)` is called once all are here; who is further in the file starts later by as much."""
        if self.open:
            go(now)
            return
        self.waiting.append((position_ms, go))
        self._check(now)

    def leave(self, now: float) -> None:
        """One will not arrive."""
        self.expected -= 1
        self._check(now)

    def _check(self, now: float) -> None:
        if len(self.waiting) >= self.expected and not self.open:
            self.open = True
            first = min((position for position, _ in self.waiting), default=0)
            for position, go in self.waiting:
                go(now + (position - first) / 1000)


class End(msgspec.Struct, frozen=True):
    """How a claim ended: the job is over, handed back until in `delay_s`, or dropped for somebody else to take."""

    kind: Literal["over", "handed_back", "dropped"]
    delay_s: float = 0.0


class Outcome(msgspec.Struct, frozen=True):
    """How a channel's streaming ended: all of it done, stopped as asked, to be tried later, or failed."""

    kind: Literal["done", "stopped", "no_capacity", "failed"]
    failure: Failure | None = None
    delay_s: float = 0.0
