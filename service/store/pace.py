"""The pace of new upstream sessions, shared by all processes on a database. FLOOR 2, part of the store.

One row for each upstream says when its next session may begin, on the database's clock. Taking that place moves it on:
whoever takes it while others do waits behind them, and a process that dies has taken one place at most with it.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

from sqlalchemy import and_, case
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.schema import now_ms, session_pace
from service.store.writer import Writer

LAST = "~"  # behind all jobs of a group: whoever wants the row waits for the end of the transaction
QUEUE = 100  # places ahead, and a minute, at most: what is farther was left by a clock that has been set back


class Pace:
    """Places for new sessions."""

    def __init__(self, writer: Writer, insert: Callable[..., Any]) -> None:
        """Made by `open_store`."""
        self._writer = writer
        self._insert = insert

    async def reserve(self, upstream: str, interval_s: float) -> float:
        """Take the next place, `interval_s` before the one after it; seconds until it is due.

        Raises `Unavailable`, `StorageFull`. Whoever gives up waiting for the answer may have taken a place.
        """
        interval_ms = ceil(interval_s * 1000)
        place = session_pace.c.next_ms
        ahead = and_(place > now_ms(), place <= now_ms() + QUEUE * interval_ms + 60_000)
        reserve = (
            self._insert(session_pace)
            .values(upstream=upstream, next_ms=now_ms() + interval_ms)
            .on_conflict_do_update(
                index_elements=[session_pace.c.upstream],
                set_={"next_ms": case((ahead, place), else_=now_ms()) + interval_ms},
            )
            .returning(place - interval_ms - now_ms())
        )

        async def run(connection: AsyncConnection) -> int:
            wait_ms: int = (await connection.execute(reserve)).scalar_one()
            return wait_ms

        return max(0, await self._writer.write(LAST, run)) / 1000
