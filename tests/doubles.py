"""In place of the outside world: time that leaps, a bus that loses, a browser's EventSource; and values to start
from.
"""

import asyncio
import random
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple, TypeVar

from service.core.errors import Fenced
from service.core.job import Audio, Claim, Event, Job, Progress, Session, Status, Turn, TurnWord, links, make_event
from service.ports import Bus
from service.store import Record, Renewal, Store, Write
from service.transcription.control import Control, Lease
from service.transcription.heartbeat import Heartbeat, Life
from service.transcription.recorder import Recorder

T = TypeVar("T")


# --- time ------------------------------------------------------------------------------------------------------------


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop on which waiting takes no time: when nothing is ready its clock leaps to the next timer.

    Only for code without threads and sockets. `late` says by how much a leap overshoots, as a busy machine does.
    """

    def __init__(self, late: Callable[[], float] = lambda: 0.0) -> None:
        """Starts at second 1000."""
        self._leapt = 1000.0
        self._late = late
        super().__init__(_LeapingSelector(self._leap))

    def time(self) -> float:
        return self._leapt

    def _leap(self, seconds: float) -> None:
        self._leapt += seconds + self._late()


class _LeapingSelector(selectors.SelectSelector):
    def __init__(self, leap: Callable[[float], None]) -> None:
        super().__init__()
        self._leap = leap

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits and no timer is set: this would hang"
            if timeout > 0:
                self._leap(timeout)
        return ready


def leaping(main: Coroutine[Any, Any, T], late: Callable[[], float] = lambda: 0.0) -> T:
    """Run `main` on a `LeapingLoop`."""
    with asyncio.Runner(loop_factory=lambda: LeapingLoop(late)) as runner:
        return runner.run(main)


class LoopClock:
    """A `Clock` that tells the time of the running loop."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def utc_ms(self) -> int:
        return 1_800_000_000_000 + round(self.now() * 1000)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def real(self, seconds: float) -> float:
        return seconds


# --- a bus that may do all that a bus may do -------------------------------------------------------------------------


class LossyBus:
    """A bus that drops, doubles and reorders what is published; what it holds back comes after later events."""

    def __init__(
        self, inner: Bus, dice: random.Random, *, drop: float = 0.2, double: float = 0.2, hold: float = 0.3
    ) -> None:
        """The three odds are independent."""
        self._inner = inner
        self._dice = dice
        self._drop, self._double, self._hold = drop, double, hold
        self._held: list[tuple[str, Event]] = []

    def publish(self, topic: str, event: Event) -> None:
        if self._dice.random() >= self._drop:
            for _ in range(1 + (self._dice.random() < self._double)):
                self._held.append((topic, event))
        self._dice.shuffle(self._held)
        while self._held and self._dice.random() >= self._hold:
            self._inner.publish(*self._held.pop())

    def subscribe(self, topic: str, hear: Callable[[Event], None]) -> AbstractAsyncContextManager[None]:
        return self._inner.subscribe(topic, hear)


class DeafBus:
    """A bus that brings nothing at all, as a broker that is down."""

    def publish(self, topic: str, event: Event) -> None:
        """Lost."""

    @asynccontextmanager
    async def subscribe(self, topic: str, hear: Callable[[Event], None]) -> AsyncIterator[None]:
        yield


@asynccontextmanager
async def listening(bus: Bus, topic: str) -> AsyncIterator[asyncio.Queue[Event]]:
    """What is published to `topic` meanwhile."""
    heard: asyncio.Queue[Event] = asyncio.Queue()
    async with bus.subscribe(topic, heard.put_nowait):
        yield heard


# --- EventSource, after https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation ---


class Message(NamedTuple):
    """What an EventSource dispatches."""

    type: str
    data: str
    last_event_id: str


def parse_event_stream(stream: bytes) -> list[Message]:
    """The messages a browser would dispatch for `stream`; one not ended by an empty line is discarded."""
    text = stream.decode("utf-8", errors="replace").removeprefix("\ufeff")
    dispatched: list[Message] = []
    data, kind, last_id = "", "", ""
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        if not line:
            if data:
                dispatched.append(Message(kind or "message", data.removesuffix("\n"), last_id))
            data = kind = ""
            continue
        name, colon, value = line.partition(":")
        if not name and colon:
            continue  # a comment
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            last_id = value
    return dispatched


# --- values ----------------------------------------------------------------------------------------------------------

CREATED_MS = 1_795_000_000_000


def a_job(job_id: str = "j1", **changes: Any) -> Job:
    """A queued job of 10 s."""
    values: dict[str, Any] = {
        "id": job_id, "status": Status.QUEUED, "created_at": "2026-11-21T09:35:27.123Z", "filename": "audio.wav",
        "audio": Audio(bytes=320_044, sha256="0" * 64, duration_ms=10_000, sample_rate=16_000, channels=1,
                       encoding="pcm_s16le", converted=False),
        "options": {"speech_model": "u3-rt-pro"}, "progress": Progress(0, 10_000), "links": links(job_id),
    }  # fmt: skip
    return Job(**values | changes)


def a_turn(
    index: int = 0,
    *,
    session_id: str = "s1",
    order: int | None = None,
    text: str = "hello there",
    end_ms: int | None = None,
) -> Turn:
    """A final turn of a second."""
    end = (index + 1) * 1000 if end_ms is None else end_ms
    begin = max(0, end - 1000)
    return Turn(
        index=index, start_ms=begin, end_ms=end, transcript=text,
        words=[TurnWord(text=w, start_ms=begin, end_ms=end, confidence=0.9, speaker=None) for w in text.split()],
        formatted=True, session_id=session_id, turn_order=index if order is None else order, end_of_turn_confidence=1.0,
        language=None, speaker=None, channel=None, latency_ms=300,
    )  # fmt: skip


def a_session(session_id: str = "s1", **changes: Any) -> Session:
    """A session at the start of the file."""
    values: dict[str, Any] = {"id": session_id, "model": "u3-rt-pro", "channel": None, "offset_ms": 0}
    return Session(**values | changes)


def an_event(job_id: str, seq: int | None, kind: str = "job.status", *, after_seq: int = 0, **payload: Any) -> Event:
    """Any event."""
    return make_event(job_id, seq, kind, CREATED_MS, payload, after_seq=after_seq)


def start(record: Record, strikes: int) -> tuple[Job, list[Event]]:
    """What a claim makes of a job, as plain as it can be; `strikes` can be read from the event."""
    job = record.job
    job.status, job.attempt = Status.PROCESSING, job.attempt + 1
    return job, [an_event(job.id, record.event_seq + 1, "job.status", status="processing", strikes=strikes)]


async def add_job(
    store: Store, job_id: str = "j1", *, owner: str = "", created_ms: int = CREATED_MS, **changes: Any
) -> Job:
    """Create a queued job with its first event."""
    job = a_job(job_id, **changes)
    await store.create(job, [an_event(job_id, 1, status="queued", stage=None)], owner=owner, created_ms=created_ms)
    return job


async def append(
    store: Store, job_id: str, *made: tuple[str, dict[str, Any]], status: Status | None = None
) -> Sequence[Event]:
    """Append events to a job that nobody holds; those appended."""
    appended: list[Event] = []

    def change(record: Record) -> Write:
        seqs = range(record.event_seq + 1, record.event_seq + 1 + len(made))
        appended.extend(an_event(job_id, seq, kind, **payload) for seq, (kind, payload) in zip(seqs, made, strict=True))
        record.job.status = status or record.job.status
        return Write(record.job, events=list(appended))

    await store.amend(job_id, change)
    return appended


async def renew(store: Store, claim: Claim, *, lease_s: float, job: Job | None) -> bool:
    """Renew one claim: whether a cancel was requested. Raises `Fenced` when it is not held any more."""
    (cancel,) = await store.renew([Renewal(claim, lease_s, job)])
    if cancel is None:
        raise Fenced
    return cancel


async def beat(store: Store, recorder: Recorder) -> Control:
    """One heartbeat of a recorder's claim; what has been asked of the job by then."""
    clock = LoopClock()
    life = Life(recorder, Control(drain_s=1), Lease(clock, 60, alone=True), 60, _nothing, extended=clock.now())
    await Heartbeat(store, clock)._renew([life])
    return life.control


async def _nothing() -> None:
    pass


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Let others run until `condition()` holds; fails when it never does."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0)
