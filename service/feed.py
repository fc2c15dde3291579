"""The one reader of a job's events, for SSE, page, command line and tests. FLOOR 3.

One hub per job and process listens: subscribe first, then read how far the log is, then live. The bus may drop,
double and reorder; the hub puts durable events in order (a gap is filled from the store, a silence is checked against
it) and keeps a short tail of them, the current partial of each session, and the progress. A follower is only a cursor
into that: it has no queue of its own, so a slow one costs nothing, gets partials merged to the newest, and reads the
log when it is behind the tail. No database connection is held while idle.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

import msgspec

from service.core.errors import Unavailable
from service.core.job import BEHIND, DELETED, LISTENING, Event, hint
from service.ports import Bus, Clock, Subscription
from service.store import Store
from service.telemetry import metrics

TAIL = 256
PAGE = 100
SILENCE_SECONDS = 5.0
WAKE = 50  # followers woken per turn of the event loop: a burst to thousands must not hold up the pacer


class _Key(msgspec.Struct):
    session_id: str = ""
    turn_order: int = -1


class _Head(msgspec.Struct):
    """What the hub needs to know of an event's payload."""

    turn: _Key | None = None
    session_id: str | None = None
    sent_ms: int = 0


_head = msgspec.json.Decoder(_Head).decode


class Feed:
    """Follows jobs."""

    def __init__(self, store: Store, bus: Bus, clock: Clock) -> None:
        """Hubs are made on demand."""
        self._store = store
        self._bus = bus
        self._clock = clock
        self._hubs: dict[str, _Hub] = {}
        self._ending = False

    def end(self) -> None:
        """Let every follower return once it has caught up with the log, those to come too: the process stops."""
        self._ending = True
        for hub in self._hubs.values():
            hub.wake()

    async def follow(self, job_id: str, after: int = 0) -> AsyncGenerator[Event, None]:
        """The events of `pages`, one by one."""
        async with aclosing(self.pages(job_id, after)) as pages:
            async for page in pages:
                for event in page:
                    yield event

    async def pages(self, job_id: str, after: int = 0) -> AsyncGenerator[Sequence[Event], None]:
        """Every durable event after `after` exactly once and in order, and between them partials and progress as they
        are: together what there is at a time, at most `PAGE` durable ones.

        Ends after the newest event once that is terminal, when the job is deleted, or at `end`. Who leaves early
        closes it.
        """
        hub = self._hubs.get(job_id)
        if hub is None or hub.over:
            hub = self._hubs[job_id] = _Hub(job_id, self._store, self._bus, self._clock)
        hub.followers += 1
        metrics.followers.inc()
        try:
            await hub.ready.wait()
            cursor, seen = after, 0
            while True:
                while cursor < hub.last:
                    page = hub.tail_after(cursor) or await hub.read_after(cursor)
                    if not page:
                        return  # deleted meanwhile
                    yield page
                    cursor = page[-1].seq or cursor
                hub.check()
                if hub.gone or hub.ended or self._ending:
                    return
                version = hub.version  # from here on every change is noticed
                if cursor == hub.last:  # a follower who comes from elsewhere may know more than this hub
                    if current := hub.current(seen):
                        yield current
                    seen = version
                if hub.version == version:
                    await hub.changed()
        finally:
            metrics.followers.dec()
            hub.followers -= 1
            if not hub.followers:
                hub.close()
                if self._hubs.get(job_id) is hub:
                    del self._hubs[job_id]


class _Hub:
    def __init__(self, job_id: str, store: Store, bus: Bus, clock: Clock) -> None:
        self.followers = 0
        self.ready = asyncio.Event()
        self.last = 0
        self.version = 0  # counts changes
        self.ended = False
        self.gone = False
        self._job_id = job_id
        self._store = store
        self._bus = bus
        self._clock = clock
        self._tail: deque[Event] = deque(maxlen=TAIL)
        self._partials: dict[str, tuple[int, _Key, Event]] = {}  # session → (version, key, event)
        self._final: dict[str, float] = {}  # session → highest turn order that is final
        self._progress: tuple[int, int, Event] | None = None  # version, sent_ms, event
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._reading: dict[int, asyncio.Task[Sequence[Event]]] = {}  # pages of the log that followers wait for
        self._floor = 0  # what followed an older event is of a run that is over, or from before this hub
        self._task = asyncio.create_task(self._listen(), name=f"feed-{job_id}")

    # --- followers ----------------------------------------------------------------------------------------------------

    def tail_after(self, seq: int) -> Sequence[Event]:
        """The events after `seq` if the tail has them."""
        first = self._tail[0].seq if self._tail else None
        if first is None or seq + 1 < first:
            return ()
        return [self._tail[i] for i in range(seq + 1 - first, min(len(self._tail), seq + 1 - first + PAGE))]

    async def read_after(self, seq: int) -> Sequence[Event]:
        """A page of the log; followers who come in a burst share what is being read."""
        reading = self._reading.get(seq)
        if reading is None:
            reading = asyncio.create_task(self._store.events_after(self._job_id, seq, PAGE))
            self._reading[seq] = reading
            reading.add_done_callback(lambda task: (self._reading.pop(seq), task.cancelled() or task.exception()))
        await asyncio.wait([reading])  # which a follower who leaves does not cancel
        return reading.result()

    def current(self, seen: int) -> list[Event]:
        """Partials and progress newer than version `seen`."""
        found = [event for version, _, event in self._partials.values() if version > seen]
        if self._progress and self._progress[0] > seen:
            found.append(self._progress[2])
        return found

    async def changed(self) -> None:
        """Wait for the next version."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    @property
    def over(self) -> bool:
        """Whether nobody listens any more; a slow follower may still be reading what there was."""
        return self._task.done()

    def check(self) -> None:
        """Raise what ended the listening task."""
        if self._task.done() and not self._task.cancelled():
            self._task.result()

    def close(self) -> None:
        """The last follower left."""
        self._task.cancel()
        for reading in self._reading.values():
            reading.cancel()

    # --- listening ----------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        try:
            async with self._bus.subscribe(f"events.{self._job_id}") as subscription:
                await self._catch_up()
                self._floor = self.last
                self.ready.set()
                await self._bus.publish(f"control.{self._job_id}", hint(self._job_id, LISTENING))
                while not self.gone:
                    with suppress(Unavailable):  # asked again at the next event, or after a silence
                        await self._take(subscription)
        finally:
            self.ready.set()
            self.wake()

    async def _take(self, subscription: Subscription) -> None:
        try:
            async with asyncio.timeout(self._clock.real(SILENCE_SECONDS)):
                event = await subscription.next()
        except TimeoutError:
            await self._catch_up()
            return
        if event.type == DELETED:
            self.gone = True
            self.wake()
            return
        if event.type == BEHIND:
            await self._catch_up()
            return
        if event.seq == self.last + 1:
            self._durable(event)
        elif max(event.seq or 0, event.after_seq) > self.last:
            await self._catch_up()  # it was committed before anyone was told of what follows it
        if event.seq is None:
            self._ephemeral(event)

    async def _catch_up(self) -> None:
        """Take from the store what the bus did not bring."""
        newest = await self._store.newest_seq(self._job_id)
        if newest is None:
            self.gone = True
            self.wake()
            return
        if not self.ready.is_set():
            # Followers replay from the store by themselves; the hub needs the newest event only, to know whether the
            # job has ended.
            self.last = max(0, newest - 1)
        while self.last < newest:
            page = await self._store.events_after(self._job_id, self.last, PAGE)
            if not page:
                return
            for event in page:
                self._durable(event)

    def _durable(self, event: Event) -> None:
        self.last = event.seq or self.last
        self._tail.append(event)
        self.ended = event.terminal
        if event.type == "turn.final":
            key = _head(event.json).turn or _Key()
            self._final[key.session_id] = max(self._final.get(key.session_id, -1), key.turn_order)
            held = self._partials.get(key.session_id)
            if held and held[1].turn_order <= key.turn_order:
                del self._partials[key.session_id]
        elif event.type == "session.lost":
            session = _head(event.json).session_id or ""
            if session is not None:  # None: it never began
                self._final[session] = float("inf")
                self._partials.pop(session, None)
        elif event.type == "job.restarted" or event.terminal:
            self._partials.clear()
            self._progress = None
            self._floor = self.last
        self.wake()

    def _ephemeral(self, event: Event) -> None:
        if self.ended or not self._floor <= event.after_seq <= self.last:
            return
        head = _head(event.json)
        if head.turn is None:
            if self._progress is None or head.sent_ms >= self._progress[1]:
                self._progress = (self.version + 1, head.sent_ms, event)
                self.wake()
        elif head.turn.turn_order > self._final.get(head.turn.session_id, -1):
            self._partials[head.turn.session_id] = (self.version + 1, head.turn, event)
            self.wake()

    def wake(self) -> None:
        """Tell every follower that there may be something new."""
        self.version += 1
        waiting, self._waiting = self._waiting, deque()
        if waiting:
            self._wake(waiting)

    def _wake(self, waiting: deque[asyncio.Future[None]]) -> None:
        for _ in range(min(WAKE, len(waiting))):
            future = waiting.popleft()
            with suppress(asyncio.InvalidStateError):
                future.set_result(None)
        if waiting:
            asyncio.get_running_loop().call_soon(self._wake, waiting)
