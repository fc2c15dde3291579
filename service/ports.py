"""Every seam on one page: what a backend must do, with the contract in each docstring. FLOOR 1.

A seam stands here only where two real implementations exist (JobQueue, Bus, BlobStore) or where tests replace the
outside world (Clock, Upstream). The store has none: one implementation serves both databases. Queue and bus are
doorbells: what they lose costs latency only.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from service.core.job import Event
from service.core.protocol import Message


class Clock(Protocol):
    """Time as the service sees it. Tests run it faster than the wall; nothing outside reads `time` or sleeps by
    itself.
    """

    def now(self) -> float:
        """Monotonic seconds."""

    def utc_ms(self) -> int:
        """Wall-clock time, Unix milliseconds."""

    async def sleep(self, seconds: float) -> None:
        """Suspend for `seconds` of this clock."""

    def real(self, seconds: float) -> float:
        """The event loop's seconds for `seconds` of this clock, for `asyncio.timeout` and `call_later`."""


class UpstreamSession(Protocol):
    """One live websocket to the transcription service.

    Enter and leave it in one task (its context holds a task group). `send` and `finish` only buffer; they never
    block, and after `failed` they drop what they are given: the reason arrives through `receive`.
    """

    @property
    def ready(self) -> bool:
        """False while the peer takes less than it is sent, and once `failed`."""

    @property
    def failed(self) -> bool:
        """True once nothing more can be sent."""

    def send(self, frame: bytes) -> None:
        """Queue one binary audio message."""

    def finish(self) -> None:
        """Queue Terminate behind the audio. Turns, Termination and the close still arrive through `receive`."""

    async def receive(self) -> Message:
        """The next message, in order of arrival. Raises `SessionEnded` once, at the end, with the Error frame's or
        close frame's code.
        """


class Upstream(Protocol):
    """The transcription service."""

    def connect(self, query: str) -> AbstractAsyncContextManager[UpstreamSession]:
        """Open a websocket with this query string; raises `SessionEnded` when refused or unreachable (connect 5 s,
        handshake 10 s).

        Leaving the context closes the socket within 5 s, whatever the peer does, and swallows nothing.
        """


class BlobStore(Protocol):
    """Audio by key. Keys are job ids."""

    read_seconds: float
    """How much audio to read at once, and to have ahead: more where a read may take its time, or costs money."""

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Store all or nothing, durable on return; the size in bytes. An exception of `chunks` passes through and
        leaves nothing behind.

        Raises `StorageFull` or `Unavailable`.
        """

    async def read(self, key: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`; fewer only at the end. Raises `AudioMissing`."""

    async def delete(self, key: str) -> None:
        """Remove it; a missing key is fine."""

    async def keys(self) -> list[str]:
        """What is stored, in no order; parts of uploads may be among them. Raises `Unavailable`."""

    async def sweep(self) -> int:
        """Remove what interrupted uploads left behind; how many."""

    async def check(self) -> str:
        """A short detail for `/readyz`; raises `OurError` when writing would fail."""


class Delivery(Protocol):
    """One announcement of a job. It may be doubled, late or lost; the claim in the database decides."""

    job_id: str

    async def extend(self) -> None:
        """Still being worked on."""

    async def done(self) -> None:
        """Only after a fenced end of the work, or when there is nothing to do."""

    async def give_back(self, delay_s: float = 0) -> None:
        """Deliver it again, here or elsewhere."""


class JobQueue(Protocol):
    """Delivery of job ids to workers: at least once, may duplicate, may lose (the reconciler rings again)."""

    async def announce(self, job_id: str, epoch: int) -> None:
        """Ring for a job that is `queued`. Never raises for a broken queue: the row is the truth."""

    async def next(self) -> Delivery:
        """Wait for the next delivery."""

    async def check(self) -> str:
        """A short detail for `/readyz`; raises `OurError` when the queue cannot be reached."""


class Bus(Protocol):
    """Lossy, unordered fan-out of hints. `Event`s of a job go to topic `events.<job id>`, control events to
    `control.<job id>`.
    """

    def publish(self, topic: str, event: Event) -> None:
        """Tell whoever listens now. Never raises for a broken bus."""

    def subscribe(self, topic: str, hear: Callable[[Event], None]) -> AbstractAsyncContextManager[None]:
        """Call `hear` with each event until the context is left. Entered means: everything published from now on is
        heard, or lost like on any bus.

        It may be called inside `publish`: it must not raise, and leaves what takes time to a task.
        """
