"""The one reader of a job's events, for SSE, page, command line and tests. FLOOR 3.

One hub per job and process listens: subscribe first, then read how far the log is, then live. The bus may drop,
double and reorder; the hub puts durable events in order (a gap is filled from the store, a silence is checked against
it) and keeps a short tail of them while somebody lags, the current partial of each session, and the progress. A
follower is only a cursor into that: it has no queue of its own, so a slow one costs nothing, gets partials merged to
the newest, and reads the log when it is behind the tail. One that waits is handed what is new without a task being
woken for it, if it takes it at once. While the database is away followers wait. No connection to it is held while idle.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from service.core.job import Event
from service.feed.audience import Follower, Position, Push, Rounds
from service.feed.hub import Hub
from service.ports import Bus, Clock
from service.store import Store
from service.telemetry import metrics


class Feed:
    """Follows jobs."""

    def __init__(self, store: Store, bus: Bus, clock: Clock) -> None:
        """Hubs are made on demand."""
        self._store = store
        self._bus = bus
        self._clock = clock
        self._hubs: dict[str, Hub] = {}
        self._rounds = Rounds()
        self._ending = False

    def end(self) -> None:
        """Let every follower return once it has caught up with the log, those to come too: the process stops."""
        self._ending = True
        for hub in self._hubs.values():
            hub.end()

    async def follow(self, job_id: str, after: int = 0) -> AsyncGenerator[Event, None]:
        """The events of `pages`, one by one."""
        async with aclosing(self.pages(job_id, after)) as pages:
            async for page in pages:
                for event in page:
                    yield event

    async def pages(
        self, job_id: str, after: int = 0, push: Push = lambda _page: False
    ) -> AsyncGenerator[Sequence[Event], None]:
        """Every durable event after `after` exactly once and in order, and between them partials and progress as they
        are: together what there is at a time, at most `PAGE` durable ones.

        Ends after the newest event once that is terminal, when the job is deleted, or at `end`. Who leaves early
        closes it. While the caller waits for the next page it is offered to `push` instead, the same list to all who
        are equally far: True means that it was taken. Whatever `push` says, it must not raise nor call back.
        """
        hub = self._hubs.get(job_id)
        if hub is None or hub.over:
            hub = self._hubs[job_id] = Hub(job_id, self._store, self._bus, self._clock, self._rounds)
            if self._ending:
                hub.end()
        hub.followers += 1
        metrics.followers.inc()
        follower = Follower(after, push)
        try:
            await hub.ready.wait()
            while True:
                while follower.at.cursor < hub.last:
                    page = hub.tail_after(follower.at.cursor) or await hub.read_after(follower.at.cursor)
                    if not page:
                        return  # deleted meanwhile
                    yield page
                    follower.at = Position(page[-1].seq or 0, follower.at.seen)
                    del page  # the next may be long in coming
                hub.check()
                if hub.done:
                    return
                version = hub.audience.version  # from here on every change is noticed
                # One who comes from elsewhere may know more than this hub.
                if follower.at.cursor == hub.last and not hub.looking:
                    if current := hub.current(follower.at.seen):
                        yield current
                    follower.at = Position(follower.at.cursor, version)
                if hub.audience.version == version:
                    await hub.audience.changed(follower)
        finally:
            metrics.followers.dec()
            hub.followers -= 1
            if not hub.followers:
                hub.close()
                if self._hubs.get(job_id) is hub:
                    del self._hubs[job_id]
