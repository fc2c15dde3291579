"""JobQueue and Bus over NATS, on one connection a process. FLOOR 3.

Nothing here is truth. What cannot be sent now is dropped, never kept and never waited for: the reconciler rings again,
followers read the store. A process starts, serves and works with NATS away, from the start too.

The connection is made anew each time it is lost, by a new client, and with it every subscription, stream and consumer.
nats-py's own reconnection is not used: it keeps publishes while away, waits for a peer that has stopped reading, leaves
waiting pulls behind (nats.py #504) and gives up for good after some errors of the server.
"""

from typing import Self

from service.backends.nats.bus import NatsBus
from service.backends.nats.connection import Keeper
from service.backends.nats.queue import NatsQueue


class NatsBroker:
    """`queue` and `bus` of one connection. Enter it before use: it connects, or goes on trying in the background."""

    def __init__(self, url: str, *, prefix: str = "turnwire") -> None:
        """`url`: `nats://` or `tls://`, user and password or a token in it, several comma-separated. `prefix` begins
        the names of everything of this service on the server.
        """
        self._keeper = Keeper(url)
        self.queue = NatsQueue(self._keeper, prefix)
        self.bus = NatsBus(self._keeper, prefix)
        self._keeper.parts += [self.bus, self.queue]

    async def __aenter__(self) -> Self:
        await self._keeper.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._keeper.close()
