"""How much may be asked at once: requests per second and event streams of one caller, uploads of all. FLOOR 5.

A caller is the name of a key, a token's job, or else an address. The bounds are wide: they stop what has gone wild
and slow nobody who is at work, a thousand streams that all come back at once included.
"""

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.errors import CallerError
from service.web.problems import problem

PER_SECOND, BURST = 200.0, 4000.0
MAX_STREAMS = 4000
MAX_UPLOADS = 128  # each may hold 2 MiB
FREE_BYTES = 64 * 1024
LONG_ROUND, LONGEST_REST = 0.004, 0.05  # seconds
MAX_CALLERS = 10_000  # remembered; who is forgotten begins anew


class Limits:
    """What each caller has used."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._streams: Counter[str] = Counter()

    def wait_for(self, caller: str) -> int:
        """Count a request; 0, or the seconds after which it may be made."""
        now = time.monotonic()
        left, at = self._left.pop(caller, (BURST, now))
        left = min(BURST, left + (now - at) * PER_SECOND)
        allowed = left >= 1
        self._left[caller] = (left - 1 if allowed else left, now)
        if len(self._left) > MAX_CALLERS:
            self._left.popitem(last=False)
        return 0 if allowed else math.ceil((1 - left) / PER_SECOND)

    def streaming(self, caller: str, app: ASGIApp) -> ASGIApp:
        """`app`, counted among the caller's streams while it runs."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if self._streams[caller] >= MAX_STREAMS:
                refusal = problem("rate_limited", f"{MAX_STREAMS} event streams are open already; close some.")
                await refusal(scope, receive, send)
                return
            self._streams[caller] += 1
            try:
                await app(scope, receive, send)
            finally:
                self._streams[caller] -= 1
                if self._streams[caller] == 0:
                    del self._streams[caller]

        return counted


class Uploads:
    """The uploads being received: how many hold memory, and whose turn it is.

    One counts once it has brought `FREE_BYTES`: if every beginning counted, a few that never go on would keep out
    everybody else.
    """

    def __init__(self) -> None:
        """None yet."""
        self._taken = 0
        self._next = asyncio.Lock()

    async def turn(self) -> None:
        """Wait to be the one upload that goes on in this round of the event loop.

        After a long round all uploads rest for as long: there is more to do than time, and running streams come first.
        """
        async with self._next:
            loop = asyncio.get_running_loop()
            began = loop.time()
            await asyncio.sleep(0)
            if (took := loop.time() - began) > LONG_ROUND:
                await asyncio.sleep(min(took, LONGEST_REST))

    @contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """An upload, while the context lasts: to be told how many bytes have come. That raises `CallerError`."""
        counted = False

        def received(size: int) -> None:
            nonlocal counted
            if counted or size <= FREE_BYTES:
                return
            if self._taken >= MAX_UPLOADS:
                told = f"{MAX_UPLOADS} uploads are being received already. Try again in a moment."
                raise CallerError("rate_limited", told)
            self._taken += 1
            counted = True

        try:
            yield received
        finally:
            self._taken -= counted
