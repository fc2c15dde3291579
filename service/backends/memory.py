"""JobQueue and Bus inside one process. FLOOR 3.

The queue remembers which jobs were announced and not yet taken, so that ringing twice costs nothing. The bus hands
the very same `Event` to every listener, there and then: what was encoded once is never encoded again, and no task is
woken for it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from service.core.job import Event
from service.ports import Clock, Delivery


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


class MemoryBus:
    """Topics and who listens to them."""

    def __init__(self) -> None:
        """Nobody listens yet."""
        self._topics: dict[str, list[Callable[[Event], None]]] = {}

    def publish(self, topic: str, event: Event) -> None:
        """Hand `event` to everyone listening now."""
        for hear in self._topics.get(topic, ()):
            hear(event)

    @asynccontextmanager
    async def subscribe(self, topic: str, hear: Callable[[Event], None]) -> AsyncIterator[None]:
        """Listen until the context ends."""
        self._topics.setdefault(topic, []).append(hear)
        try:
            yield
        finally:
            listeners = self._topics[topic]
            listeners.remove(hear)
            if not listeners:
                del self._topics[topic]
