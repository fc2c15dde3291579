"""JobQueue and Bus inside one process. FLOOR 3.

The queue remembers which jobs were announced and not yet taken, so that ringing twice costs nothing. The bus hands
the very same `Event` to every subscriber: what was encoded once is never encoded again. A subscriber that falls
behind loses the oldest; whoever reads closes the gap from the store.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.core.job import Event
from service.ports import Clock, Delivery, Subscription

BACKLOG = 1000


class MemoryDelivery:
    """A job id taken from the queue."""

    def __init__(self, queue: "MemoryQueue", job_id: str, epoch: int) -> None:
        """Made by `MemoryQueue.next`."""
        self.job_id = job_id
        self._epoch = epoch
        self._queue = queue

    async def extend(self) -> None:
        """Nothing to extend: nobody else could take it."""

    async def done(self) -> None:
        """Nothing to acknowledge: it left the queue when it was taken."""

    async def give_back(self, delay_s: float = 0) -> None:
        """Announce it again after `delay_s`."""
        await self._queue.announce(self.job_id, self._epoch, delay_s=delay_s)


class MemoryQueue:
    """Job ids in order of announcement."""

    def __init__(self, clock: Clock) -> None:
        """`clock` delays what is given back."""
        self._clock = clock
        self._waiting: dict[str, int] = {}
        self._rung = asyncio.Event()

    async def announce(self, job_id: str, epoch: int, *, delay_s: float = 0) -> None:
        """Ring, now or later."""
        if delay_s > 0:
            asyncio.get_running_loop().call_later(self._clock.real(delay_s), self._ring, job_id, epoch)
        else:
            self._ring(job_id, epoch)

    def _ring(self, job_id: str, epoch: int) -> None:
        self._waiting[job_id] = epoch
        self._rung.set()

    async def next(self) -> Delivery:
        """The oldest announcement."""
        while not self._waiting:
            self._rung.clear()
            await self._rung.wait()
        job_id = next(iter(self._waiting))
        return MemoryDelivery(self, job_id, self._waiting.pop(job_id))

    async def check(self) -> str:
        """Always there."""
        return "in this process"


class MemorySubscription:
    """A bounded buffer; the oldest goes first when it is full."""

    def __init__(self) -> None:
        """Made by `MemoryBus.subscribe`."""
        self._events: deque[Event] = deque(maxlen=BACKLOG)
        self._filled: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Called by the bus."""
        self._events.append(event)
        if self._filled is not None and not self._filled.done():
            self._filled.set_result(None)

    async def next(self) -> Event:
        """The next event."""
        while not self._events:
            self._filled = asyncio.get_running_loop().create_future()
            await self._filled
        return self._events.popleft()


class MemoryBus:
    """Topics and who listens to them."""

    def __init__(self) -> None:
        """Nobody listens yet."""
        self._topics: dict[str, set[MemorySubscription]] = {}

    async def publish(self, topic: str, event: Event) -> None:
        """Hand `event` to everyone listening now."""
        for subscription in self._topics.get(topic, ()):
            subscription.put(event)

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[Subscription]:
        """Listen until the context ends."""
        subscription = MemorySubscription()
        self._topics.setdefault(topic, set()).add(subscription)
        try:
            yield subscription
        finally:
            listeners = self._topics[topic]
            listeners.discard(subscription)
            if not listeners:
                del self._topics[topic]
