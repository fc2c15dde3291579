"""Every truth and every fence, in SQLAlchemy Core, one implementation for SQLite and PostgreSQL. FLOOR 2.

Invariants: a write of a claim carries its epoch and the event number it follows, and is refused (`Fenced`) when
either has moved on; a write whose answer was lost is recognised when it is tried again; an event is in the log before
anyone is told of it; event numbers have no gaps. Writes are here and go through `writer.Writer`; reads are in
`reading.Reader`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, bindparam, delete, func, make_url, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.core.errors import Fenced
from service.core.job import Claim, Event, Job, Status, Turn, to_json
from service.core.words import searchable
from service.store import idempotency, keys, outbox, pace, renewal, schema
from service.store.engines import open_engine, open_writer
from service.store.idempotency import Use
from service.store.migration import migrate, schema_is_current, schema_of
from service.store.prepared import Prepared, Row
from service.store.reading import Reader, Record, record_of
from service.store.renewal import Renewal
from service.store.schema import events, jobs, now_ms, said, turns, webhooks
from service.store.writer import Writer
from service.telemetry import metrics

__all__ = [
    "MAX_STRIKES", "Busy", "Record", "Renewal", "Store", "Use", "Write", "migrate", "open_store", "schema_is_current",
    "schema_of",
]  # fmt: skip

MAX_STRIKES = 3

_STEP = Prepared(
    update(jobs)
    .where(
        jobs.c.id == bindparam("of"),
        jobs.c.epoch == bindparam("by"),
        jobs.c.status == Status.PROCESSING,
        jobs.c.event_seq == bindparam("after"),
    )
    .values(
        event_seq=bindparam("new_seq"),
        doc=bindparam("doc"),
        strikes=func.coalesce(bindparam("strikes", type_=jobs.c.strikes.type), jobs.c.strikes),
    )
)
_REVISE = Prepared(
    update(turns)
    .where(turns.c.job_id == bindparam("job_id"), turns.c.idx == bindparam("idx"))
    .values(doc=bindparam("doc"), end_ms=bindparam("end_ms"))
)
_SAY_AGAIN = Prepared(
    update(said)
    .where(said.c.job_id == bindparam("job_id"), said.c.idx == bindparam("idx"))
    .values(words=bindparam("words"))
)


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
    sqlite = make_url(url).get_backend_name() == "sqlite"
    write_engine, read_engine = open_writer(url), open_engine(url, writing=False)
    writer = Writer(write_engine)
    task = asyncio.create_task(writer.run(), name="store-writer")
    store = Store(read_engine, writer, insert_ignoring=sqlite_insert if sqlite else pg_insert)
    try:
        yield store
    finally:
        await store.settle()
        writer.close()
        await task
        for engine in (read_engine, write_engine):
            await engine.dispose()


class Store(Reader):
    """Jobs, turns and events."""

    def __init__(self, readers: AsyncEngine, writer: Writer, insert_ignoring: Callable[..., Any]) -> None:
        """Made by `open_store`."""
        super().__init__(readers)
        self._writer = writer
        self._insert_ignoring = insert_ignoring
        self._insert = {
            table: Prepared(insert_ignoring(table).on_conflict_do_nothing(), *table.columns.keys())
            for table in (events, turns, said)
        }
        self.outbox = outbox.Outbox(self._rows, writer, insert_ignoring)
        self.keys = keys.Keys(self._rows, writer, insert_ignoring)
        self.pace = pace.Pace(writer, insert_ignoring)

    # --- by callers ---------------------------------------------------------------------------------------------------

    async def create(
        self, job: Job, made: Sequence[Event], *, owner: str, created_ms: int, key: str = "", fingerprint: str = ""
    ) -> Use | None:
        """Commit a new job and its first events, unless its idempotency key is in use: then nothing, but for what."""
        use = Use(job.id, fingerprint)

        async def run(connection: AsyncConnection) -> Use | None:
            other = key and await idempotency.take(connection, self._insert_ignoring, owner, key, use)
            if other:
                return other
            row = {
                "id": job.id, "owner": owner, "status": job.status, "created_ms": created_ms, "doc": to_json(job),
                "epoch": 0, "lease_until_ms": 0, "not_before_ms": 0, "strikes": 0, "cancel_requested": False,
                "event_seq": len(made),
            }  # fmt: skip
            await connection.execute(self._insert_ignoring(jobs).on_conflict_do_nothing(), row)
            name = {"job_id": job.id, "idx": -1, "words": searchable(job.filename)}
            await self._insert[said].run(connection, name)
            await self._append(connection, job, made)
            return None

        other = await self._writer.write(job.id, run)
        if other is None:
            _count(Status.QUEUED)
        return other

    async def amend(self, job_id: str, change: Callable[[Record], Write | None]) -> Record | None:
        """Change a job nobody holds a claim on: `change` looks at it and says what to write, or None to leave it.

        What `change` raises passes through. Returns the job as it is afterwards, None if there is no such job.
        """

        became: list[Status] = []

        async def run(connection: AsyncConnection) -> Record | None:
            became.clear()  # a group that fails is written again
            row = (
                (await connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update())).mappings().first()
            )
            if row is None:
                return None
            record = record_of(row, await self._finalized(connection, job_id))
            write = change(record)
            if write is None:
                return record
            became.extend({write.job.status} - {row["status"]})
            if write.withdraw_from is not None:
                for table in (turns, said):
                    withdrawn = and_(table.c.job_id == job_id, table.c.idx >= write.withdraw_from)
                    await connection.execute(delete(table).where(withdrawn))
            await self._append(connection, write.job, write.events)
            seq = record.event_seq + len(write.events)
            values = {"status": write.job.status, "event_seq": seq, "doc": to_json(write.job), "strikes": 0,
                      "not_before_ms": 0, "cancel_requested": False, "ended_ms": _ended_ms(write.job)}  # fmt: skip
            await connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
            return Record(write.job, record.owner, record.epoch, seq, False, record.created_ms)

        record = await self._writer.write(job_id, run)
        _count(*became)
        return record

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
            for table in (events, turns, said, webhooks, schema.idempotency, schema.peaks):
                await connection.execute(delete(table).where(table.c.job_id == job_id))
            await outbox.doom(connection, self._insert_ignoring, job_id)
            return True

        return await self._writer.write(job_id, run)

    async def keep_peaks(self, job_id: str, doc: bytes) -> None:
        """Keep the peaks of a job's audio, as long as that is kept."""
        kept = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.audio_kept).with_for_update()

        async def run(connection: AsyncConnection) -> None:
            if (await connection.execute(kept)).first() is not None:
                row = {"job_id": job_id, "doc": doc}
                await connection.execute(self._insert_ignoring(schema.peaks).on_conflict_do_nothing(), row)

        await self._writer.write(job_id, run)

    # --- by workers: every write fenced -------------------------------------------------------------------------------

    async def claim(
        self, job_id: str, *, lease_s: float, begin: Callable[[Record, int], tuple[Job, list[Event]]]
    ) -> Claim | Busy | None:
        """Take a queued job, or one whose worker is gone. None: there is nothing to do.

        `begin(record, strikes)` says what the job becomes, where strikes are the claims that died without a new
        final; if it becomes terminal (too many of them) there is no claim.
        """

        became: list[Status] = []
        tried: list[tuple[int, int]] = []  # epochs and leases that may have been committed without an answer

        async def run(connection: AsyncConnection) -> Claim | Busy | None:
            became.clear()  # as in `amend`
            row = (
                (await connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update())).mappings().first()
            )
            clock = (await connection.execute(select(now_ms()))).scalar_one()  # now that the row is ours
            if row is None or row["status"] not in (Status.QUEUED, Status.PROCESSING):
                return None
            wait_ms = row["lease_until_ms"] if row["status"] == Status.PROCESSING else row["not_before_ms"]
            ours = (row["epoch"], row["lease_until_ms"]) in tried
            if wait_ms > clock and not ours:
                return Busy((wait_ms - clock) / 1000)
            record = record_of(row, await self._finalized(connection, job_id))
            strikes = row["strikes"] - ours  # that claim has not died
            job, made = begin(record, strikes)
            await self._append(connection, job, made)
            seq = record.event_seq + len(made)
            epoch, until = record.epoch + 1, clock + int(lease_s * 1000)
            tried.append((epoch, until))
            values = {
                "status": job.status, "epoch": epoch, "lease_until_ms": until, "strikes": strikes + 1,
                "event_seq": seq, "doc": to_json(job), "ended_ms": _ended_ms(job),
            }  # fmt: skip
            await connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
            became.extend({job.status} - {row["status"]})
            if job.terminal:
                return None
            return Claim(job=job, owner=record.owner, epoch=epoch, event_seq=seq, finalized=record.finalized)

        claim = await self._writer.write(job_id, run, patient=True)
        _count(*became)
        return claim

    async def write(self, claim: Claim, write: Write, *, after_seq: int) -> None:
        """Commit one step of a claimed job. Waits while the database is away. Raises `Fenced`.

        `after_seq` is the event number the step follows. A status other than processing ends the claim.
        """
        new_seq = after_seq + len(write.events)
        job, end = write.job, _end(write)  # as it is now: the job goes on changing while this waits
        step = {
            "of": job.id, "by": claim.epoch, "after": after_seq, "new_seq": new_seq, "doc": to_json(job),
            "strikes": 0 if write.turns or job.status == Status.QUEUED else None,
        }  # fmt: skip

        async def run(connection: AsyncConnection) -> None:
            if await _STEP.run(connection, step) == 0:
                # Either somebody else's job by now, or this very commit went through and only its answer was lost.
                mine = and_(jobs.c.id == job.id, jobs.c.epoch == claim.epoch)
                if (
                    await connection.execute(select(jobs.c.event_seq).where(mine))
                ).scalar() == new_seq and write.events:
                    return
                raise Fenced
            if end:
                await connection.execute(update(jobs).where(jobs.c.id == job.id).values(end))
            if write.revised:
                rows = [_row(job, turn) for turn in write.revised]
                await _REVISE.run_each(connection, rows)
                await _SAY_AGAIN.run_each(connection, rows)
            if write.turns:
                rows = [_row(job, turn) for turn in write.turns]
                await self._insert[turns].run_each(connection, rows)
                await self._insert[said].run_each(connection, rows)
            await self._append(connection, job, write.events)

        await self._writer.write(job.id, run, patient=True)
        if end:
            _count(end["status"])

    async def renew(self, renewals: Sequence[Renewal]) -> list[bool | None]:
        """Extend claims. For each: whether a cancel was requested, None if it is not held any more.

        Raises `Unavailable`: a renewal that waits in line could extend a lease that its holder has given up.
        """
        return await renewal.renew(self._writer, renewals)

    async def expire_leases(self) -> None:
        """Every attempt at a job or a webhook is dead. Only true where one process holds the database, at its start."""

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(update(jobs).where(jobs.c.status == Status.PROCESSING).values(lease_until_ms=0))
            await connection.execute(update(webhooks).where(webhooks.c.lease_until_ms > 0).values(lease_until_ms=0))

        await self._writer.write("", run, patient=True)

    # --- shared -------------------------------------------------------------------------------------------------------

    async def _append(self, connection: AsyncConnection, job: Job, made: Sequence[Event]) -> None:
        """Log the events just made for `job`, and promise to tell its webhook those that it asks for."""
        if made:
            rows = [{"job_id": e.job_id, "seq": e.seq, "type": e.type, "doc": e.json} for e in made]
            await self._insert[events].run_each(connection, rows)
            await outbox.promise_webhook(connection, self._insert_ignoring, job, made)

    async def _finalized(self, connection: AsyncConnection, job_id: str) -> dict[str, int]:
        query = (
            select(turns.c.session_id, func.max(turns.c.end_ms))
            .where(turns.c.job_id == job_id)
            .group_by(turns.c.session_id)
        )
        return dict((await connection.execute(query)).all())


def _count(*became: Status) -> None:
    """Changes of a status, once they are committed."""
    for status in became:
        metrics.jobs.labels(status=status).inc()


def _row(job: Job, turn: Turn) -> Row:
    """A turn as `turns` and `said` keep it."""
    return {
        "job_id": job.id, "idx": turn.index, "session_id": turn.session_id, "turn_order": turn.turn_order,
        "end_ms": turn.end_ms, "doc": to_json(turn), "words": searchable(turn.transcript),
    }  # fmt: skip


def _end(write: Write) -> dict[str, Any]:
    """What a step that ends its claim changes besides; nothing if the claim goes on."""
    if write.job.status == Status.PROCESSING:
        return {}
    end = {
        "status": write.job.status, "lease_until_ms": 0, "not_before_ms": now_ms() + int(write.not_before_s * 1000),
        "ended_ms": _ended_ms(write.job),
    }  # fmt: skip
    # A cancel that came while the job was handed back is for whoever takes it next.
    return end | {"cancel_requested": False} if write.job.terminal else end


def _ended_ms(job: Job) -> now_ms | None:
    return now_ms() if job.terminal else None
