"""Bus over core NATS. FLOOR 3.

One subscription of the server per topic and process, however many listen to it; an event is decoded once for all of
them, and heard as it is read from the socket.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import msgspec

from service.backends.nats.connection import Connection, Keeper
from service.core.job import BEHIND, Event, hint

SUBSCRIBE_SECONDS = 2.0


class _Wire(msgspec.Struct, array_like=True, gc=False):
    """An event between processes. Fields may be added at the end: old and new run side by side during an upgrade."""

    job_id: str
    seq: int | None
    type: str
    json: bytes
    after_seq: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Wire).decode


class NatsBus:
    """One subscription of the server per topic and process, however many listen to it."""

    def __init__(self, keeper: Keeper, prefix: str) -> None:
        """Made by `NatsBroker`."""
        self._keeper = keeper
        self._prefix = prefix
        self._topics: dict[str, _Topic] = {}

    def publish(self, topic: str, event: Event) -> None:
        """Send, or drop. Of an event too large to send its followers are told that there is something to read."""
        connection = self._keeper.connection
        if connection is None:
            return
        data = _encode((event.job_id, event.seq, event.type, event.json, event.after_seq))
        if len(data) > connection.max_payload:
            if event.seq is not None:
                self.publish(topic, hint(event.job_id, BEHIND))
            return
        connection.send(f"{self._prefix}.{topic}", data)

    @asynccontextmanager
    async def subscribe(self, topic: str, hear: Callable[[Event], None]) -> AsyncIterator[None]:
        """Listen until the context ends; with the broker away entered all the same, and heard from its return on."""
        listened = self._topics.get(topic)
        if listened is None:
            listened = self._topics[topic] = _Topic()
            if self._keeper.connection is not None:
                self._listen(self._keeper.connection, topic, listened)
        listened.listeners.append(hear)
        try:
            if self._keeper.connection is not None:
                with suppress(TimeoutError):
                    await self._keeper.connection.round_trip(SUBSCRIBE_SECONDS)
            yield
        finally:
            listened.listeners.remove(hear)
            if not listened.listeners:
                del self._topics[topic]
                if self._keeper.connection is not None:
                    self._keeper.connection.leave(listened.sid)

    def restore(self, connection: Connection) -> None:
        """Listen on a new connection."""
        for topic, listened in self._topics.items():
            self._listen(connection, topic, listened)

    def disconnected(self) -> None:
        """Everybody goes on listening: the next connection has it all again."""

    async def keep(self, connection: Connection) -> None:
        """Nothing to keep."""

    def _listen(self, connection: Connection, topic: str, listened: "_Topic") -> None:
        listened.sid = connection.listen(f"{self._prefix}.{topic}", listened.arrived)


class _Topic:
    def __init__(self) -> None:
        self.sid = 0
        self.listeners: list[Callable[[Event], None]] = []

    def arrived(self, _subject: str, _reply: str, data: bytes, _headers: bytes | None) -> None:
        try:
            wire = _decode(data)
        except msgspec.DecodeError:  # ValidationError is one
            return  # none of ours; it must not end the subscription
        event = Event(wire.job_id, wire.seq, wire.type, wire.json, wire.after_seq)
        for hear in self.listeners:
            hear(event)
