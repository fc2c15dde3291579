"""One job and process: what the bus and the store tell of it, put in order. Part of FLOOR 3.

Listens before it reads how far the log is. What the bus brings is taken as it is published, a durable event when it is
the next; any sign of one that did not come, and any silence, is a reason for the hub's task to look into the log, soon
again where the bus is known to lose. What is heard meanwhile waits. A database that is away is asked again until it is
back.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from service.core.errors import Unavailable
from service.core.job import BEHIND, DELETED, LISTENING, Event, hint
from service.feed.audience import Audience, News, Position, Rounds
from service.flag import Flag
from service.ports import Bus, Clock
from service.store import Store

TAIL = 256
PAGE = 100
SILENCE_SECONDS = 5.0
RETRY_SECONDS = 1.0  # while the database is away; and instead of a silence, where the bus is known to lose
WARY = 10  # so many looks into the log have to find nothing before the bus is trusted again
BACKLOG = 1000  # events kept while the log is looked into; of more than those the oldest are read in it


class _Key(msgspec.Struct):
    session_id: str = ""
    turn_order: int = -1


class _Head(msgspec.Struct):
    """What the hub needs to know of an event's payload."""

    turn: _Key | None = None
    session_id: str | None = None
    sent_ms: int = 0


_head = msgspec.json.Decoder(_Head).decode


class Hub:
    """Listens to one job for all who follow it in this process, until the last has left."""

    def __init__(self, job_id: str, store: Store, bus: Bus, clock: Clock, rounds: Rounds) -> None:
        """Begins at once."""
        self.followers = 0
        self.ready = Flag()
        self.last = 0
        self.looking = False  # into the log: what else there is may be old by now
        self.wary = 0  # looks into the log until the bus is trusted again
        self.audience = Audience(rounds, self._news)
        self._ended = self._gone = False
        self._stopping = Flag()
        self._job_id = job_id
        self._store = store
        self._bus = bus
        self._clock = clock
        self._tail: deque[Event] = deque(maxlen=TAIL)
        self._partials: dict[str, tuple[int, _Key, Event]] = {}  # session → (version, key, event)
        self._final: dict[str, float] = {}  # session → highest turn order that is final
        self._progress: tuple[int, int, Event] | None = None  # version, sent_ms, event
        self._reading: dict[int, asyncio.Task[Sequence[Event]]] = {}  # pages of the log that followers wait for
        self._floor = 0  # what followed an older event is of a run that is over, or from before this hub
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._missed: list[Event] = []  # heard and not taken: the log comes first
        self._must_look = Flag()
        self._must_look.set()
        self._task = asyncio.create_task(self._listen(), name=f"feed-{job_id}")

    # --- followers ----------------------------------------------------------------------------------------------------

    def tail_after(self, seq: int) -> Sequence[Event]:
        """The events after `seq` if the tail has them."""
        first = self._tail[0].seq if self._tail else None
        if first is None or seq + 1 < first:
            return ()
        return [self._tail[i] for i in range(seq + 1 - first, min(len(self._tail), seq + 1 - first + PAGE))]

    async def read_after(self, seq: int) -> Sequence[Event]:
        """A page of the log, however long the database is away; empty if the job is gone or the process stops.

        Followers who come in a burst share what is being read.
        """
        while True:
            reading = self._reading.get(seq)
            if reading is None:
                reading = asyncio.create_task(self._store.events_after(self._job_id, seq, PAGE))
                self._reading[seq] = reading
                reading.add_done_callback(lambda task: (self._reading.pop(seq), task.cancelled() or task.exception()))
            await asyncio.wait([reading])  # which a follower who leaves does not cancel
            try:
                return reading.result()
            except Unavailable:
                if await self._stops_within(RETRY_SECONDS):
                    return ()

    def current(self, seen: int) -> list[Event]:
        """Partials and progress newer than version `seen`."""
        found = [event for version, _, event in self._partials.values() if version > seen]
        if self._progress and self._progress[0] > seen:
            found.append(self._progress[2])
        return found

    @property
    def done(self) -> bool:
        """Whether followers who have everything may go."""
        return self._gone or self._ended or self._stopping.is_set()

    @property
    def over(self) -> bool:
        """Whether nobody listens any more; a slow follower may still be reading what there was."""
        return self._task.done()

    def check(self) -> None:
        """Raise what ended the listening task."""
        if self._task.done() and not self._task.cancelled():
            self._task.result()

    def end(self) -> None:
        """The process stops."""
        self._stopping.set()
        self.audience.wake()

    def close(self) -> None:
        """The last follower left."""
        self._task.cancel()
        for reading in self._reading.values():
            reading.cancel()

    def _news(self, position: Position) -> News | None:
        """What the tail has for one who is that far; None where there is more to it."""
        cursor, seen = position
        if self.done or self.over:
            return None
        if cursor > self.last:
            return News((), position)  # who comes from elsewhere may know more than this hub
        durable: Sequence[Event] = ()
        if cursor < self.last:
            durable = self.tail_after(cursor)
            if not durable or durable[-1].seq != self.last:
                return None
        if self.looking:
            return News(durable, Position(self.last, seen))
        return News([*durable, *self.current(seen)], Position(self.last, self.audience.version))

    # --- listening ----------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        try:
            async with self._bus.subscribe(f"events.{self._job_id}", self._hear):
                while not self._gone:
                    try:
                        await (self._look() if self.ready.is_set() else self._begin())
                    except Unavailable:
                        self.wary = WARY
                        if await self._stops_within(RETRY_SECONDS):
                            self.ready.set()  # nobody will be told any more
        finally:
            self.ready.set()
            self.audience.wake()

    def _hear(self, event: Event) -> None:
        """Called by the bus, in the midst of whatever its publisher does."""
        self._heard_at = self._loop.time()
        if not self._must_look.is_set():
            try:
                if self._take(event):
                    return
            except Exception:  # noqa: BLE001, S110 - the publisher must not suffer; the task will meet it again
                pass
        self._missed.append(event)
        del self._missed[:-BACKLOG]
        self._must_look.set()

    def _take(self, event: Event) -> bool:
        """Whether all is well: False for the first event that tells of one that did not come."""
        if event.seq is None:
            if event.after_seq > self.last or event.type == BEHIND:
                return False  # it was committed before anyone was told of what follows it
            if event.type == DELETED:
                self._leave()
            else:
                self._ephemeral(event)
        elif event.seq > self.last + 1:
            return False
        elif event.seq > self.last:
            self._durable(event)
        return True

    async def _trust(self) -> None:
        """Take what was heard meanwhile, then what the bus brings, until it has lost something or is silent."""
        self._must_look.clear()
        missed, self._missed = self._missed, []
        for event in missed:
            self._hear(event)
        patience = self._clock.real(RETRY_SECONDS if self.wary else SILENCE_SECONDS)
        self._heard_at = self._loop.time()
        while (until := self._heard_at + patience) > self._loop.time():  # a timer for each event would cost more
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._must_look.wait()
                    return
        self._must_look.set()

    async def _begin(self) -> None:
        """Followers replay from the store by themselves; the hub needs the newest event only, to know whether the job
        has ended.
        """
        newest = await self._newest()
        self.last = max(0, newest - 1)
        await self._read_up_to(newest)
        self._floor = self.last
        self.ready.set()
        self._bus.publish(f"control.{self._job_id}", hint(self._job_id, LISTENING))

    async def _look(self) -> None:
        """What the bus brings, as long as it can be trusted; then what the store has."""
        await self._trust()
        if self._gone:
            return
        sign = self._missed.pop(0) if self._missed else None  # what told of a loss
        before = self.last
        self.looking = True
        try:
            await self._read_up_to(await self._newest())
        finally:
            self.looking = False
            self.audience.wake()  # for those who came meanwhile; they are told in the loop's next turn
        self.wary = WARY if self.last > before else max(0, self.wary - 1)
        if sign is not None and sign.seq is None and sign.type != BEHIND:
            self._ephemeral(sign)

    async def _newest(self) -> int:
        newest = await self._store.newest_seq(self._job_id)
        if newest is None:
            self._leave()
        return newest or 0

    def _leave(self) -> None:
        self._gone = True
        self._must_look.set()
        self.audience.wake()

    async def _read_up_to(self, newest: int) -> None:
        while self.last < newest:
            page = await self._store.events_after(self._job_id, self.last, PAGE)
            if not page:
                return
            for event in page:
                self._durable(event)

    async def _stops_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._clock.real(seconds)):
                await self._stopping.wait()
        return self._stopping.is_set()

    def _durable(self, event: Event) -> None:
        self.last = event.seq or self.last
        if self.audience.has_all(self.followers):
            self._tail.clear()  # or each job would keep minutes of what nobody needs
        self._tail.append(event)
        self._ended = event.terminal
        if event.type == "turn.final":
            key = _head(event.json).turn or _Key()
            self._final[key.session_id] = max(self._final.get(key.session_id, -1), key.turn_order)
            held = self._partials.get(key.session_id)
            if held and held[1].turn_order <= key.turn_order:
                del self._partials[key.session_id]
        elif event.type == "session.lost":
            session = _head(event.json).session_id or ""  # null where it never began
            self._final[session] = float("inf")
            self._partials.pop(session, None)
        elif event.type == "job.restarted" or event.terminal:
            self._partials.clear()
            self._progress = None
            self._floor = self.last
        self.audience.wake()

    def _ephemeral(self, event: Event) -> None:
        if self._ended or not self._floor <= event.after_seq <= self.last:
            return
        head = _head(event.json)
        turn = head.turn
        if turn is None:
            if self._progress is None or head.sent_ms >= self._progress[1]:
                self._progress = (self.audience.wake(), head.sent_ms, event)
        elif turn.turn_order > self._final.get(turn.session_id, -1):
            self._partials[turn.session_id] = (self.audience.wake(), turn, event)
