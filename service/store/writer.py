"""Group commit: all writes of a process go through one task, many to a transaction. FLOOR 2, part of the store.

One writer means that no write is ever cancelled half way and that SQLite never says "locked" to itself; a group means
that a thousand jobs share one fsync. Operations of one group are taken in job-id order, so that two processes never
lock rows crosswise. A refusal (an error of ours, raised before anything was written) concerns its operation alone; any
other failure rolls the group back, and it is tried again operation by operation, so that a faulty one is told to its
caller and one that met a lock does not hold up the others. While the database is away everything waits in line in its
order: patient operations (those of running jobs) until it is back, impatient ones (uploads, requests) until they fail
with `Unavailable`, or at once with `StorageFull`. A commit whose answer was lost is tried again until it is known what
became of it: each operation must recognise its own work.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.core.errors import StorageFull, TurnwireError, Unavailable
from service.store.engines import SqliteWriter
from service.store.failures import Failure, failure
from service.telemetry import metrics

T = TypeVar("T")
Statement = Callable[[AsyncConnection], Awaitable[Any]]

GROUP = 256
RETRY_SECONDS = 0.25
IMPATIENCE_SECONDS = 0.5
SLOW_SECONDS = 2.0


class _Operation:
    __slots__ = ("deadline", "done", "job_id", "run")

    def __init__(self, job_id: str, run: Statement, patient: bool) -> None:
        self.job_id = job_id
        self.run = run
        self.deadline = float("inf") if patient else time.monotonic() + IMPATIENCE_SECONDS
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def tell(self, result: object) -> None:
        if self.done.done():  # its caller has left
            return
        if isinstance(result, Exception):
            self.done.set_exception(result)
            self.done.exception()  # whoever waits gets it; when nobody does any more, it is no news
        else:
            self.done.set_result(result)


class Writer:
    """The one task that writes."""

    def __init__(self, engine: AsyncEngine | SqliteWriter) -> None:
        """`engine` must begin its transactions with a write lock."""
        self._engine = engine
        self._waiting: deque[_Operation] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._watching: asyncio.TimerHandle

    async def write(self, job_id: str, run: Callable[[AsyncConnection], Awaitable[T]], *, patient: bool = False) -> T:
        """Run `run` in the next group and return its result once it is committed.

        Cancelling the caller of a patient write does not take it back. Raises what `run` raises, `Unavailable`,
        `StorageFull`. A `TurnwireError` may be raised by `run` only before it writes.
        """
        done = self._enter(_Operation(job_id, run, patient))
        result: T = await (asyncio.shield(done) if patient else done)
        return result

    def _enter(self, operation: _Operation) -> "asyncio.Future[Any]":
        if self._closing:
            raise Unavailable
        self._waiting.append(operation)
        self._wake.set()
        return operation.done

    async def run(self) -> None:
        """Write until `close`, and then what is waiting, if the database is there."""
        try:
            while self._waiting or not self._closing:
                if not self._waiting:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                group = [self._waiting.popleft() for _ in range(min(GROUP, len(self._waiting)))]
                group.sort(key=lambda operation: operation.job_id)  # stable: one job's writes keep their order
                try:
                    left, full = await self._commit_watched(group), False
                except Exception as exc:  # noqa: BLE001 - the database is away
                    left, full = group, failure(exc) is Failure.FULL
                if left:
                    self._waiting.extendleft(reversed(left))
                    self._give_up(full=full)
                    await asyncio.sleep(RETRY_SECONDS)  # real time: it does not run on a test's clock
        finally:
            self._closing = True
            self._give_up(full=False)

    def close(self) -> None:
        """Let `run` return when all is written."""
        self._closing = True
        self._wake.set()

    async def _commit_watched(self, group: list[_Operation]) -> list[_Operation]:
        """As `_commit`; while the database takes long to answer, the impatient behind this group give up."""
        self._watch()
        try:
            return await self._commit(group)
        finally:
            self._watching.cancel()

    def _watch(self) -> None:
        self._watching = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._grow_impatient)

    def _grow_impatient(self) -> None:
        self._give_up(full=False)
        self._watch()

    async def _commit(self, group: list[_Operation]) -> list[_Operation]:
        """Commit together or, where that fails, one by one; returns those that somebody else was in the way of.

        Raises only what says that the database is away.
        """
        group = [operation for operation in group if not operation.done.done()]
        if not group:
            return []
        try:
            await self._transact(group)
        except Exception as exc:
            what = failure(exc)
            if what in (Failure.AWAY, Failure.FULL):
                raise
            if len(group) > 1:
                return await self._commit_one_by_one(group)
            if what is Failure.CONTENDED:
                return group
            group[0].tell(exc)
        return []

    async def _commit_one_by_one(self, group: list[_Operation]) -> list[_Operation]:
        left: list[_Operation] = []
        for operation in group:
            if any(operation.job_id == before.job_id for before in left):  # writes of one job keep their order
                left.append(operation)
            else:
                left += await self._commit([operation])
        return left

    async def _transact(self, group: list[_Operation]) -> None:
        began = time.perf_counter()
        results: list[object] = []
        async with self._engine.connect() as connection:
            try:
                for operation in group:
                    try:
                        results.append(await operation.run(connection))
                    except TurnwireError as refusal:
                        results.append(refusal)
                await self._end(connection, group)
            except TimeoutError:  # whatever is on that connection, nobody waits for it any more
                await connection.invalidate()
                raise
        metrics.commit_seconds.observe(time.perf_counter() - began)
        for operation, result in zip(group, results, strict=True):
            operation.tell(result)

    @staticmethod
    async def _end(connection: AsyncConnection, group: list[_Operation]) -> None:
        try:
            await connection.commit()
        except Exception as exc:
            if isinstance(exc, OSError) or (isinstance(exc, DBAPIError) and exc.connection_invalidated):
                # It may have gone through. Who was told "unavailable" now would undo what is there.
                for operation in group:
                    operation.deadline = float("inf")
            raise

    def _give_up(self, *, full: bool) -> None:
        """Tell those who cannot wait any longer; keep the others in line."""
        now = time.monotonic()
        for operation in self._waiting:
            if self._closing or now >= operation.deadline or (full and operation.deadline < float("inf")):
                operation.tell(StorageFull() if full else Unavailable())
        self._waiting = deque(operation for operation in self._waiting if not operation.done.done())
