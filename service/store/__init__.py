"""Every truth and every fence, in SQLAlchemy Core, one implementation for SQLite and PostgreSQL. FLOOR 2.

Invariants: a write of a claim carries its epoch and the event number it follows, and is refused (`Fenced`) when
either has moved on; a write whose answer was lost is recognised when it is tried again; an event is in the log before
anyone is told of it; event numbers have no gaps. Writes go through `writer.Writer`; reads have connections of their
own and hold none while idle.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Select, and_, delete, event, func, or_, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from service.core.errors import Fenced, Unavailable
from service.core.job import Claim, Event, Job, Status, Turn, job_from_json, to_json, turn_from_json
from service.store import outbox, schema
from service.store.schema import events, jobs, now_ms, turns, webhooks
from service.store.writer import Writer

MAX_STRIKES = 3
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


@dataclass(slots=True)
class Write:
    """What one step of a job changes: the job as it is afterwards, the events of the step, and turns new or revised.

    `not_before_s` delays the next claim of a job handed back to the queue.
    """

    job: Job
    events: list[Event] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    revised: list[Turn] = field(default_factory=list)
    withdraw_from: int | None = None
    not_before_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody else's lease is still good, or the job may not start yet; ask again in `seconds`."""

    seconds: float


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator["Store"]:
    """Connect, and write until the end of the context."""
    sqlite = url.startswith("sqlite")
    write_engine = _engine(url, writing=True)
    read_engine = _engine(url, writing=False) if sqlite else write_engine
    writer = Writer(write_engine)
    task = asyncio.create_task(writer.run(), name="store-writer")
    store = Store(read_engine, writer, insert_ignoring=sqlite_insert if sqlite else pg_insert)
    try:
        yield store
    finally:
        await store.settle()
        writer.close()
        await task
        for engine in {read_engine, write_engine}:
            await engine.dispose()


def _engine(url: str, *, writing: bool) -> AsyncEngine:
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_size=5, max_overflow=10, pool_pre_ping=True)
    if writing:
        engine = create_async_engine(url, poolclass=StaticPool)
    else:
        engine = create_async_engine(url, pool_size=4, max_overflow=0)

    @event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver's connection
        connection.isolation_level = None  # transactions are begun below, not by the driver
        cursor = connection.cursor()
        # FULL: a commit survives power loss. The short timeout: the writer itself waits and retries, and must notice
        # uploads giving up.
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            f"busy_timeout={200 if writing else 5000}",
            f"query_only={int(not writing)}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:  # noqa: ANN401
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


async def migrate(url: str) -> None:
    """Bring the schema up to date."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    engine = _engine(url, writing=True)
    try:
        async with engine.begin() as connection:

            def upgrade(sync_connection: object) -> None:
                config.attributes["connection"] = sync_connection
                command.upgrade(config, "head")

            await connection.run_sync(upgrade)
    finally:
        await engine.dispose()


class Store:
    """Jobs, turns and events."""

    def __init__(self, readers: AsyncEngine, writer: Writer, insert_ignoring: Callable[..., Any]) -> None:
        """Made by `open_store`."""
        self._readers = readers
        self._writer = writer
        self._insert_ignoring = insert_ignoring
        self._reading: set[asyncio.Task[Any]] = set()
        self.outbox = outbox.Outbox(self._rows, writer, insert_ignoring)

    # --- by callers ---------------------------------------------------------------------------------------------------

    async def create(self, job: Job, made: Sequence[Event], *, owner: str, created_ms: int) -> None:
        """Commit a new job and its first events."""

        async def run(connection: AsyncConnection) -> None:
            row = {
                "id": job.id, "owner": owner, "status": job.status, "created_ms": created_ms, "doc": to_json(job),
                "epoch": 0, "lease_until_ms": 0, "not_before_ms": 0, "strikes": 0, "cancel_requested": False,
                "event_seq": len(made),
            }  # fmt: skip
            await connection.execute(self._insert_ignoring(jobs).on_conflict_do_nothing(), row)
            await self._append(connection, job, made)

        await self._writer.write(job.id, run)

    async def amend(self, job_id: str, change: Callable[[Record], Write | None]) -> Record | None:
        """Change a job nobody holds a claim on: `change` looks at it and says what to write, or None to leave it.

        What `change` raises passes through. Returns the job as it is afterwards, None if there is no such job.
        """

        async def run(connection: AsyncConnection) -> Record | None:
            row = (
                (await connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update())).mappings().first()
            )
            if row is None:
                return None
            record = _record(row, await self._finalized(connection, job_id))
            write = change(record)
            if write is None:
                return record
            if write.withdraw_from is not None:
                await connection.execute(
                    delete(turns).where(turns.c.job_id == job_id, turns.c.idx >= write.withdraw_from)
                )
            await self._append(connection, write.job, write.events)
            seq = record.event_seq + len(write.events)
            values = {"status": write.job.status, "event_seq": seq, "doc": to_json(write.job), "strikes": 0,
                      "not_before_ms": 0, "cancel_requested": False, "ended_ms": _ended_ms(write.job)}  # fmt: skip
            await connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
            return Record(write.job, record.owner, record.epoch, seq, False, record.created_ms)

        return await self._writer.write(job_id, run)

    async def request_cancel(self, job_id: str) -> bool:
        """Leave word for the worker that holds the job; its next renewal finds it if nothing else tells it.

        False: nobody holds it (any more).
        """

        async def run(connection: AsyncConnection) -> bool:
            held = and_(jobs.c.id == job_id, jobs.c.status == Status.PROCESSING)
            return (await connection.execute(update(jobs).where(held).values(cancel_requested=True))).rowcount > 0

        return await self._writer.write(job_id, run)

    async def delete(self, job_id: str, *, ended_by_ms: int | None = None) -> bool:
        """Remove every row of a job and doom its audio; whether there was one (that ended at that time or before)."""
        wanted = jobs.c.id == job_id
        if ended_by_ms is not None:
            wanted = and_(wanted, jobs.c.ended_ms <= ended_by_ms)

        async def run(connection: AsyncConnection) -> bool:
            if (await connection.execute(delete(jobs).where(wanted))).rowcount == 0:
                return False
            for table in (events, turns, webhooks):
                await connection.execute(delete(table).where(table.c.job_id == job_id))
            await outbox.doom(connection, self._insert_ignoring, job_id)
            return True

        return await self._writer.write(job_id, run)

    # --- by workers: every write fenced -------------------------------------------------------------------------------

    async def claim(
        self, job_id: str, *, lease_s: float, begin: Callable[[Record, int], tuple[Job, list[Event]]]
    ) -> Claim | Busy | None:
        """Take a queued job, or one whose worker is gone. None: there is nothing to do.

        `begin(record, strikes)` says what the job becomes, where strikes are the claims that died without a new
        final; if it becomes terminal (too many of them) there is no claim.
        """

        async def run(connection: AsyncConnection) -> Claim | Busy | None:
            clock = (await connection.execute(select(now_ms()))).scalar_one()
            row = (
                (await connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update())).mappings().first()
            )
            if row is None or row["status"] not in (Status.QUEUED, Status.PROCESSING):
                return None
            wait_ms = row["lease_until_ms"] if row["status"] == Status.PROCESSING else row["not_before_ms"]
            if wait_ms > clock:
                return Busy((wait_ms - clock) / 1000)
            record = _record(row, await self._finalized(connection, job_id))
            job, made = begin(record, row["strikes"])
            await self._append(connection, job, made)
            seq = record.event_seq + len(made)
            epoch = record.epoch + 1
            values = {
                "status": job.status, "epoch": epoch, "lease_until_ms": clock + int(lease_s * 1000),
                "strikes": row["strikes"] + 1, "event_seq": seq, "doc": to_json(job), "ended_ms": _ended_ms(job),
            }  # fmt: skip
            await connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
            if job.terminal:
                return None
            return Claim(job=job, owner=record.owner, epoch=epoch, event_seq=seq, finalized=record.finalized)

        return await self._writer.write(job_id, run, patient=True)

    async def write(self, claim: Claim, write: Write, *, after_seq: int) -> None:
        """Commit one step of a claimed job. Waits while the database is away. Raises `Fenced`.

        `after_seq` is the event number the step follows. A status other than processing ends the claim.
        """
        new_seq = after_seq + len(write.events)
        job, doc = write.job, to_json(write.job)
        values: dict[str, Any] = {"status": job.status, "event_seq": new_seq, "doc": doc, "ended_ms": _ended_ms(job)}
        if write.turns or job.status == Status.QUEUED:
            values["strikes"] = 0
        if job.status != Status.PROCESSING:
            values |= {"lease_until_ms": 0, "not_before_ms": now_ms() + int(write.not_before_s * 1000)}
        if job.terminal:  # a cancel that came while the job was handed back is for whoever takes it next
            values["cancel_requested"] = False
        mine = and_(jobs.c.id == job.id, jobs.c.epoch == claim.epoch)

        async def run(connection: AsyncConnection) -> None:
            fence = and_(mine, jobs.c.status == Status.PROCESSING, jobs.c.event_seq == after_seq)
            if (await connection.execute(update(jobs).where(fence).values(values))).rowcount == 0:
                # Either somebody else's job by now, or this very commit went through and only its answer was lost.
                if (
                    await connection.execute(select(jobs.c.event_seq).where(mine))
                ).scalar() == new_seq and write.events:
                    return
                raise Fenced
            for turn in write.revised:
                row = {"doc": to_json(turn), "end_ms": turn.end_ms}
                await connection.execute(
                    update(turns).where(turns.c.job_id == job.id, turns.c.idx == turn.index).values(row)
                )
            if write.turns:
                rows = [
                    {"job_id": job.id, "idx": turn.index, "session_id": turn.session_id, "turn_order": turn.turn_order,
                     "end_ms": turn.end_ms, "doc": to_json(turn)}
                    for turn in write.turns
                ]  # fmt: skip
                await connection.execute(self._insert_ignoring(turns).on_conflict_do_nothing(), rows)
            await self._append(connection, job, write.events)

        await self._writer.write(job.id, run, patient=True)

    async def renew(self, claim: Claim, *, lease_s: float, job: Job | None) -> bool:
        """Extend the lease, and note the progress in `job` unless it holds something not yet committed (None).

        True: a cancel was requested. Raises `Fenced`.
        """
        values: dict[str, Any] = {"lease_until_ms": now_ms() + int(lease_s * 1000)}
        if job is not None:
            values["doc"] = to_json(job)
        mine = and_(jobs.c.id == claim.job.id, jobs.c.epoch == claim.epoch, jobs.c.status == Status.PROCESSING)

        async def run(connection: AsyncConnection) -> bool:
            row = (
                await connection.execute(update(jobs).where(mine).values(values).returning(jobs.c.cancel_requested))
            ).first()
            if row is None:
                raise Fenced
            return bool(row[0])

        return await self._writer.write(claim.job.id, run, patient=True)

    async def expire_leases(self) -> None:
        """Every attempt at a job or a webhook is dead. Only true where one process holds the database, at its start."""

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(update(jobs).where(jobs.c.status == Status.PROCESSING).values(lease_until_ms=0))
            await connection.execute(update(webhooks).where(webhooks.c.lease_until_ms > 0).values(lease_until_ms=0))

        await self._writer.write("", run, patient=True)

    # --- reads --------------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> Record | None:
        """The job, with its place in the queue."""

        async def run(connection: AsyncConnection) -> Record | None:
            row = (await connection.execute(select(jobs).where(jobs.c.id == job_id))).mappings().first()
            return None if row is None else await self._placed(connection, _record(row))

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
        name_contains: str = "",
    ) -> Sequence[Record]:
        """Whole jobs, newest first, ties by id; `before` is the (created_ms, id) of the last one seen."""
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
        if name_contains:
            query = query.where(schema.filename().icontains(name_contains, autoescape=True))

        async def run(connection: AsyncConnection) -> Sequence[Record]:
            rows = (await connection.execute(query)).mappings().all()
            return [await self._placed(connection, _record(row)) for row in rows]

        return await self._read(run)

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
        """Read in a task of its own: a caller that is cancelled half way must not tear the connection. Raises
        `Unavailable`.
        """

        async def read() -> T:
            try:
                async with self._readers.connect() as connection:
                    return await run(connection)
            except (OperationalError, InterfaceError, PoolTimeout) as exc:
                raise Unavailable from exc

        task = asyncio.create_task(read())
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait for reads whose callers have left."""
        await asyncio.gather(*self._reading, return_exceptions=True)

    # --- shared -------------------------------------------------------------------------------------------------------

    async def _append(self, connection: AsyncConnection, job: Job, made: Sequence[Event]) -> None:
        """Log the events just made for `job`, and promise to tell its webhook those that it asks for."""
        if made:
            rows = [{"job_id": e.job_id, "seq": e.seq, "type": e.type, "doc": e.json} for e in made]
            await connection.execute(self._insert_ignoring(events).on_conflict_do_nothing(), rows)
            await outbox.promise_webhook(connection, self._insert_ignoring, job, made)

    async def _finalized(self, connection: AsyncConnection, job_id: str) -> dict[str, int]:
        query = (
            select(turns.c.session_id, func.max(turns.c.end_ms))
            .where(turns.c.job_id == job_id)
            .group_by(turns.c.session_id)
        )
        return dict((await connection.execute(query)).all())

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


def _ended_ms(job: Job) -> now_ms | None:
    return now_ms() if job.terminal else None


def _record(row: Any, finalized: dict[str, int] | None = None) -> Record:  # noqa: ANN401 - a row mapping
    return Record(
        job_from_json(row["doc"]),
        row["owner"],
        row["epoch"],
        row["event_seq"],
        row["cancel_requested"],
        row["created_ms"],
        finalized or {},
    )
