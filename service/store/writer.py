"""Group commit: all writes of a process go through one task, many to a transaction. FLOOR 2, part of the store.

One writer means that no write is ever cancelled half way and that SQLite never says "locked" to itself; a group means
that a thousand jobs share one fsync. Operations of one group are taken in job-id order, so that two processes never
lock rows crosswise. A group that fails is tried again operation by operation. While the database is away, patient
operations (those of running jobs) wait; impatient ones (uploads, requests) fail with `Unavailable` or `StorageFull`
at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.core.errors import StorageFull, Unavailable
from service.telemetry import metrics

T = TypeVar("T")
Statement = Callable[[AsyncConnection], Awaitable[Any]]

GROUP = 256
RETRY_SECONDS = 0.25
IMPATIENCE_SECONDS = 1.0


class _Operation:
    __slots__ = ("deadline", "done", "job_id", "run")

    def __init__(self, job_id: str, run: Statement, patient: bool) -> None:
        self.job_id = job_id
        self.run = run
        self.deadline = None if patient else time.monotonic() + IMPATIENCE_SECONDS
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Writer:
    """The one task that writes."""

    def __init__(self, engine: AsyncEngine) -> None:
        """`engine` must begin its transactions with a write lock."""
        self._engine = engine
        self._waiting: deque[_Operation] = deque()
        self._wake = asyncio.Event()
        self._closing = False

    async def write(self, job_id: str, run: Callable[[AsyncConnection], Awaitable[T]], *, patient: bool = False) -> T:
        """Run `run` in the next group and return its result once it is committed.

        Cancelling the caller of a patient write does not take it back. Raises what `run` raises, `Unavailable`,
        `StorageFull`.
        """
        operation = _Operation(job_id, run, patient)
        self._waiting.append(operation)
        self._wake.set()
        if patient:
            result: T = await asyncio.shield(operation.done)
        else:
            result = await operation.done
        return result

    async def run(self) -> None:
        """Write until `close` and until nothing is waiting."""
        while True:
            if not self._waiting:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            group = [self._waiting.popleft() for _ in range(min(GROUP, len(self._waiting)))]
            group.sort(key=lambda operation: operation.job_id)  # stable: one job's writes keep their order
            await self._commit(group)

    def close(self) -> None:
        """Let `run` return when all is written."""
        self._closing = True
        self._wake.set()

    async def _commit(self, group: list[_Operation]) -> None:
        while group := [operation for operation in group if not operation.done.done()]:
            try:
                await self._transact(group)
                return
            except Exception as exc:  # noqa: BLE001 - sorted out below, and handed to whom it concerns
                if len(group) > 1:
                    for operation in group:
                        await self._commit([operation])
                    return
                if not self._wait_out(group[0], exc):
                    return
            await asyncio.sleep(RETRY_SECONDS)

    async def _transact(self, group: list[_Operation]) -> None:
        began = time.perf_counter()
        results = []
        async with self._engine.begin() as connection:
            for operation in group:
                results.append(await operation.run(connection))  # noqa: PERF401 - an await each
        metrics.commit_seconds.observe(time.perf_counter() - began)
        for operation, result in zip(group, results, strict=True):
            if not operation.done.done():
                operation.done.set_result(result)

    def _wait_out(self, operation: _Operation, exc: Exception) -> bool:
        """Whether to try again; otherwise the operation has been told."""
        if isinstance(exc, OperationalError | InterfaceError) or (
            isinstance(exc, DBAPIError) and exc.connection_invalidated
        ):
            if operation.deadline is None:
                return True
            full = "disk is full" in str(exc) or "disk full" in str(exc)
            if not full and time.monotonic() < operation.deadline:
                return True
            exc = StorageFull() if full else Unavailable()
        if not operation.done.done():
            operation.done.set_exception(exc)
        return False
