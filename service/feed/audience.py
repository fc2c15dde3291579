"""The followers of one job who wait for what is new, and how they are told. Part of FLOOR 3.

Most of them are equally far, so what is new is put together once. It is handed over without waking a task, to whoever
takes it at once; the others' tasks are woken and look by themselves. Telling all hubs' followers goes in slices: a
burst to thousands must not hold up the pacer.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

from service.core.job import Event

SLICE_SECONDS = 0.001  # of telling in one turn of the event loop
WAKE = 50  # tasks woken in such a slice

Push = Callable[[Sequence[Event]], bool]


class Position(NamedTuple):
    """How far a follower is."""

    cursor: int  # the last durable event it has
    seen: int  # the version of the audience whose partials and progress it has


class News(NamedTuple):
    """What is new, and where that leads."""

    events: Sequence[Event]
    then: Position


class Follower:
    """Somebody who follows a job."""

    __slots__ = ("at", "push", "woken")

    def __init__(self, after: int, push: Push) -> None:
        """`push` is offered what is new; it says whether it took it."""
        self.at = Position(after, 0)
        self.push = push
        self.woken: asyncio.Future[None] | None = None  # of the task that waits


class Rounds:
    """Telling, of all hubs of the process, a little in each turn of the event loop."""

    def __init__(self) -> None:
        """Nothing to tell."""
        self._rounds: deque[Iterator[bool]] = deque()

    def begin(self, telling: Iterator[bool]) -> None:
        """`telling` tells one follower a step, and says whether that woke a task."""
        if not self._rounds:
            asyncio.get_running_loop().call_soon(self._run)
        self._rounds.append(telling)

    def _run(self) -> None:
        until, wakes = perf_counter() + SLICE_SECONDS, WAKE
        while self._rounds:
            for woke in self._rounds[0]:
                wakes -= woke
                if not wakes or perf_counter() >= until:
                    self._rounds.rotate(-1)  # nobody waits for a job that has thousands of followers
                    asyncio.get_running_loop().call_soon(self._run)
                    return
            self._rounds.popleft()


class Audience:
    """Those who wait."""

    def __init__(self, rounds: Rounds, news: Callable[[Position], News | None]) -> None:
        """`news` tells what is new to one who is that far; None: its task must look."""
        self.version = 0  # counts changes
        self._rounds = rounds
        self._compose = news
        self._waiting: dict[Follower, None] = {}  # in the order of their coming
        self._telling = False
        self._news: tuple[int, Position, News | None] | None = None  # the last: version, position, news

    async def changed(self, follower: Follower) -> None:
        """Wait until there is something new that the follower does not take by the way."""
        follower.woken = asyncio.get_running_loop().create_future()
        self._waiting[follower] = None
        try:
            await follower.woken
        finally:
            self._waiting.pop(follower, None)

    def has_all(self, followers: int) -> bool:
        """Whether that many wait, each with everything that there is."""
        return len(self._waiting) == followers and not self._telling

    def wake(self) -> int:
        """Tell everybody, in a later turn of the event loop, that there may be something new; the version that has
        it.
        """
        self.version += 1
        if self._waiting and not self._telling:
            self._telling = True
            self._rounds.begin(self._round())
        return self.version

    def _round(self) -> Iterator[bool]:
        told = -1
        while told != self.version:
            told = self.version
            for follower in list(self._waiting):
                if follower in self._waiting:
                    yield self._tell(follower)
        self._telling = False

    def _tell(self, follower: Follower) -> bool:
        news = self._news_at(follower.at)
        if news is not None and (not news.events or _taken(follower, news.events)):
            follower.at = news.then
            return False
        del self._waiting[follower]
        if follower.woken is not None and not follower.woken.done():
            follower.woken.set_result(None)
        return True

    def _news_at(self, position: Position) -> News | None:
        known = self._news
        if known is None or known[0] != self.version or known[1] != position:
            known = self._news = (self.version, position, self._compose(position))
        return known[2]


def _taken(follower: Follower, events: Sequence[Event]) -> bool:
    try:
        return follower.push(events)
    except Exception:  # noqa: BLE001 - the others must be told; its own task will meet it again
        return False
