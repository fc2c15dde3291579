"""What is read of jobs, turns and events. FLOOR 2, part of the store.

Reads have connections of their own and hold none while idle; each runs in a task of its own, so that a caller who is
cancelled tears no connection.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Select, and_, func, or_, select, tuple_
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.core.errors import Unavailable
from service.core.job import Event, Job, Status, Turn, job_from_json, turn_from_json
from service.core.words import words
from service.store.failures import Failure, failure
from service.store.idempotency import Use, lookup
from service.store.schema import events, jobs, now_ms, peaks, said, turns

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    """A job as stored: the public form and what only the service looks at."""

    job: Job
    owner: str
    epoch: int
    event_seq: int
    cancel_requested: bool
    created_ms: int
    # Only where the job is about to be changed: session → end of its last final.
    finalized: dict[str, int] = field(default_factory=dict)


class Reader:
    """The reading half of the store."""

    def __init__(self, engine: AsyncEngine) -> None:
        """`engine` may be shared with writers."""
        self._readers = engine
        self._reading: set[asyncio.Task[Any]] = set()

    async def get(self, job_id: str) -> Record | None:
        """The job, with its place in the queue."""

        async def run(connection: AsyncConnection) -> Record | None:
            row = (await connection.execute(select(jobs).where(jobs.c.id == job_id))).mappings().first()
            return None if row is None else await self._placed(connection, record_of(row))

        return await self._read(run)

    async def list(
        self,
        *,
        owner: str | None,
        limit: int,
        statuses: Sequence[str] = (),
        before: tuple[int, str] | None = None,
        created_after_ms: int | None = None,
        created_before_ms: int | None = None,
        q: str = "",
    ) -> Sequence[Record]:
        """Whole jobs, newest first, ties by id; `before` is the (created_ms, id) of the last one seen.

        With `q` only those that have each of its words in a final or in the file's name.
        """
        if q and not q.isspace() and not words(q):
            return []  # nothing but punctuation is in no job
        query = select(jobs).order_by(jobs.c.created_ms.desc(), jobs.c.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        if statuses:
            query = query.where(jobs.c.status.in_(statuses))
        if before is not None:
            query = query.where(tuple_(jobs.c.created_ms, jobs.c.id) < tuple_(*before))
        if created_after_ms is not None:
            query = query.where(jobs.c.created_ms >= created_after_ms)
        if created_before_ms is not None:
            query = query.where(jobs.c.created_ms < created_before_ms)
        for word in sorted(set(words(q)), key=len, reverse=True):  # the longest are the rarest
            with_word = select(said.c.job_id).where(said.c.job_id == jobs.c.id, said.c.words.contains(f" {word} "))
            query = query.where(with_word.exists())

        async def run(connection: AsyncConnection) -> Sequence[Record]:
            rows = (await connection.execute(query)).mappings().all()
            return [await self._placed(connection, record_of(row)) for row in rows]

        return await self._read(run)

    async def used(self, owner: str, key: str) -> Use | None:
        """What an idempotency key stands for, if anything."""
        rows = await self._rows(lookup(owner, key))
        return Use(*rows[0]) if rows else None

    async def peaks(self, job_id: str) -> bytes | None:
        """The peaks of its audio, if they are kept."""
        rows = await self._rows(select(peaks.c.doc).where(peaks.c.job_id == job_id))
        return rows[0][0] if rows else None

    async def events_after(self, job_id: str, seq: int, limit: int = 100) -> Sequence[Event]:
        """The log of a job after `seq`, at most `limit` of it."""
        query = (
            select(events.c.seq, events.c.type, events.c.doc)
            .where(events.c.job_id == job_id, events.c.seq > seq)
            .order_by(events.c.seq)
            .limit(limit)
        )
        return [Event(job_id, seq, kind, doc) for seq, kind, doc in await self._rows(query)]

    async def newest_seq(self, job_id: str) -> int | None:
        """The newest event number; None if there is no such job."""
        rows = await self._rows(select(jobs.c.event_seq).where(jobs.c.id == job_id))
        return rows[0][0] if rows else None

    async def turns(self, job_id: str, *, after: int = -1, limit: int | None = None) -> Sequence[Turn]:
        """Final turns with an index above `after`, in order."""
        query = (
            select(turns.c.doc).where(turns.c.job_id == job_id, turns.c.idx > after).order_by(turns.c.idx).limit(limit)
        )
        return [turn_from_json(doc) for (doc,) in await self._rows(query)]

    async def stranded(self, limit: int = 1000) -> Sequence[tuple[str, int]]:
        """Jobs that wait for a worker, oldest first, with their epochs: what the reconciler rings for."""
        waiting = or_(
            and_(jobs.c.status == Status.QUEUED, jobs.c.not_before_ms <= now_ms()),
            and_(jobs.c.status == Status.PROCESSING, jobs.c.lease_until_ms <= now_ms()),
        )
        query = select(jobs.c.id, jobs.c.epoch).where(waiting).order_by(jobs.c.created_ms, jobs.c.id).limit(limit)
        return [(job_id, epoch) for job_id, epoch in await self._rows(query)]

    async def queue(self) -> tuple[int, int | None]:
        """How many jobs are queued, and since when the oldest (Unix ms)."""
        query = select(func.count(), func.min(jobs.c.created_ms)).where(jobs.c.status == Status.QUEUED)
        depth, oldest = (await self._rows(query))[0]
        return depth, oldest

    async def check(self) -> str:
        """Raises when the database does not answer."""
        await self._rows(select(now_ms()))
        return "answers"

    async def _rows(self, query: Select[*tuple[Any, ...]]) -> Sequence[Any]:
        async def run(connection: AsyncConnection) -> Sequence[Any]:
            return (await connection.execute(query)).all()

        return await self._read(run)

    async def _read(self, run: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Raises `Unavailable`."""

        async def read(again: bool = True) -> T:
            try:
                async with self._readers.connect() as connection:
                    try:
                        return await run(connection)
                    except TimeoutError:  # whatever is on that connection, nobody waits for it any more
                        await connection.invalidate()
                        raise
            except Exception as exc:
                if again and isinstance(exc, DBAPIError) and exc.connection_invalidated:
                    return await read(again=False)  # it had died in the pool; by now all that are as old are dropped
                if failure(exc) is Failure.WRONG:
                    raise
                raise Unavailable from exc

        task = asyncio.create_task(read())
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait for reads whose callers have left."""
        await asyncio.gather(*self._reading, return_exceptions=True)

    async def _placed(self, connection: AsyncConnection, record: Record) -> Record:
        if record.job.status == Status.QUEUED:
            earlier = and_(
                jobs.c.status == Status.QUEUED,
                tuple_(jobs.c.created_ms, jobs.c.id) < tuple_(record.created_ms, record.job.id),
            )
            record.job.queue_position = (
                await connection.execute(select(func.count()).select_from(jobs).where(earlier))
            ).scalar_one() + 1
        return record


def record_of(row: Any, finalized: dict[str, int] | None = None) -> Record:  # noqa: ANN401 - a row mapping
    """A row of `jobs` as a record."""
    return Record(
        job_from_json(row["doc"]),
        row["owner"],
        row["epoch"],
        row["event_seq"],
        row["cancel_requested"],
        row["created_ms"],
        finalized or {},
    )
