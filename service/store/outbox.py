"""What a transaction has promised to the world outside the database: webhooks to send, audio to remove. FLOOR 2.

Invariants: a promise is written in the transaction of what causes it (`promise_webhook`, `doom`) and outlives the
process; a webhook is attempted by one worker at a time, whose lease and epoch fence what it writes down; its id is
made of the job and the event that it tells, so it is the same in every attempt. What is due is judged on the
database's clock, which all workers share.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
from sqlalchemy import and_, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.core.job import TERMINAL_EVENTS, Event, Job, rfc3339, to_json
from service.store.schema import doomed_audio, events, jobs, now_ms, peaks, webhooks
from service.store.writer import Writer

LEASE_SECONDS = 30.0  # longer than an attempt and the writing down of what came of it
MAX_LOG = 50  # attempts remembered per delivery

PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try to deliver a webhook: the status it was answered with, or why there was no answer."""

    at: str
    status_code: int | None
    error: str | None
    duration_ms: int


class Delivery(msgspec.Struct, kw_only=True):
    """A webhook with its attempts, newest last. `id` is its `webhook-id`; `status`: pending, delivered or failed."""

    id: str
    type: str
    url: str
    status: str
    next_attempt_at: str | None
    attempts: list[Attempt]


_attempts = msgspec.json.Decoder(list[Attempt]).decode


@dataclass(frozen=True, slots=True)
class Due:
    """A webhook that may be attempted now."""

    id: str
    job_id: str
    epoch: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class Sending:
    """The right to attempt a webhook. `event` is the JSON of the event that it tells; `tries` went before."""

    id: str
    job_id: str
    epoch: int
    url: str
    tries: int
    attempts: list[Attempt]
    event: bytes


# --- in the transaction of the cause ---------------------------------------------------------------------------------


async def promise_webhook(
    connection: AsyncConnection, insert_ignoring: Callable[..., Any], job: Job, made: Sequence[Event]
) -> None:
    """Of the events just made for `job`, promise to tell those that its webhook asks for."""
    url = job.options.get("webhook_url")
    wanted = job.options.get("webhook_events", TERMINAL_EVENTS)
    for event in made:
        if url is not None and event.type in wanted:
            row = {
                "id": f"msg_{job.id}_{event.seq}", "job_id": job.id, "seq": event.seq, "type": event.type, "url": url,
                "endpoint": urlsplit(url).netloc.lower(), "status": PENDING, "tries": 0, "due_ms": now_ms(),
                "lease_until_ms": 0, "epoch": 0, "log": b"[]",
            }  # fmt: skip
            await connection.execute(insert_ignoring(webhooks).values(row).on_conflict_do_nothing())


async def doom(connection: AsyncConnection, insert_ignoring: Callable[..., Any], job_id: str) -> None:
    """Promise that the audio of a job will go."""
    await connection.execute(insert_ignoring(doomed_audio).on_conflict_do_nothing(), {"job_id": job_id})


# --- afterwards ------------------------------------------------------------------------------------------------------

Rows = Callable[[Any], Awaitable[Sequence[Any]]]


class Outbox:
    """Keeping the promises."""

    def __init__(self, rows: Rows, writer: Writer, insert_ignoring: Callable[..., Any]) -> None:
        """Made by the store; `rows` runs a query."""
        self._rows = rows
        self._writer = writer
        self._insert_ignoring = insert_ignoring

    # --- webhooks -----------------------------------------------------------------------------------------------------

    async def due(self, limit: int, *, but_for: Collection[str]) -> list[Due]:
        """Webhooks to attempt now, longest due first; none for those endpoints."""
        query = (
            select(webhooks.c.id, webhooks.c.job_id, webhooks.c.epoch, webhooks.c.endpoint)
            .where(webhooks.c.due_ms <= now_ms(), webhooks.c.lease_until_ms <= now_ms())
            .where(webhooks.c.endpoint.not_in(but_for))
            .order_by(webhooks.c.due_ms, webhooks.c.id)
            .limit(limit)
        )
        return [Due(*row) for row in await self._rows(query)]

    async def claim(self, due: Due) -> Sending | None:
        """Take a webhook for one attempt; None when somebody else did, or when its job is gone."""
        free = and_(webhooks.c.epoch == due.epoch, webhooks.c.due_ms <= now_ms())
        lease = now_ms() + int(LEASE_SECONDS * 1000)

        async def run(connection: AsyncConnection) -> Sending | None:
            take = (
                update(webhooks)
                .where(webhooks.c.id == due.id, free)
                .values(lease_until_ms=lease, epoch=due.epoch + 1)
                .returning(webhooks.c.seq, webhooks.c.url, webhooks.c.tries, webhooks.c.log)
            )
            row = (await connection.execute(take)).first()
            if row is None:
                return None
            told = select(events.c.doc).where(events.c.job_id == due.job_id, events.c.seq == row.seq)
            event = (await connection.execute(told)).scalar_one()
            return Sending(due.id, due.job_id, due.epoch + 1, row.url, row.tries, _attempts(row.log), event)

        return await self._writer.write(due.job_id, run, patient=True)

    async def record(self, sending: Sending, attempt: Attempt, status: str, again_in_s: float | None) -> None:
        """Write down what an attempt came to, unless the lease ran out and somebody else took it."""
        values = {
            "status": status,
            "tries": sending.tries + 1,
            "due_ms": None if again_in_s is None else now_ms() + int(again_in_s * 1000),
            "lease_until_ms": 0,
            "log": to_json([*sending.attempts, attempt][-MAX_LOG:]),
        }
        mine = and_(webhooks.c.id == sending.id, webhooks.c.epoch == sending.epoch)

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(update(webhooks).where(mine).values(values))

        await self._writer.write(sending.job_id, run, patient=True)

    async def deliveries(self, job_id: str) -> list[Delivery]:
        """The webhooks of a job, oldest first."""
        query = select(webhooks).where(webhooks.c.job_id == job_id).order_by(webhooks.c.seq)
        return [_delivery(row) for row in await self._rows(query)]

    async def redeliver(self, job_id: str, webhook_id: str) -> Delivery | None:
        """Begin its schedule again, now; one that is being attempted stays as it is. None: there is none of that id."""
        mine = and_(webhooks.c.job_id == job_id, webhooks.c.id == webhook_id)
        again = {"status": PENDING, "tries": 0, "due_ms": now_ms()}

        async def run(connection: AsyncConnection) -> Delivery | None:
            idle = and_(mine, webhooks.c.lease_until_ms <= now_ms())
            await connection.execute(update(webhooks).where(idle).values(again))
            row = (await connection.execute(select(webhooks).where(mine))).first()
            return None if row is None else _delivery(row)

        return await self._writer.write(job_id, run)

    # --- retention ----------------------------------------------------------------------------------------------------

    async def ended_by(self, unix_ms: int, *, with_audio: bool, limit: int = 1000) -> list[str]:
        """Jobs that ended at that time or before, longest ago first; `with_audio`: only those whose audio is kept."""
        query = select(jobs.c.id).where(jobs.c.ended_ms <= unix_ms).order_by(jobs.c.ended_ms).limit(limit)
        if with_audio:
            query = query.where(jobs.c.audio_kept)
        return [job_id for (job_id,) in await self._rows(query)]

    async def drop_audio(self, job_id: str, *, ended_by_ms: int) -> bool:
        """Doom the audio of a job, unless it was retried meanwhile."""
        ended = and_(jobs.c.id == job_id, jobs.c.ended_ms <= ended_by_ms, jobs.c.audio_kept)

        async def run(connection: AsyncConnection) -> bool:
            if (await connection.execute(update(jobs).where(ended).values(audio_kept=False))).rowcount == 0:
                return False
            await connection.execute(delete(peaks).where(peaks.c.job_id == job_id))
            await doom(connection, self._insert_ignoring, job_id)
            return True

        return await self._writer.write(job_id, run)

    async def doomed(self) -> list[str]:
        """Jobs whose audio has to go."""
        return [job_id for (job_id,) in await self._rows(select(doomed_audio.c.job_id))]

    async def removed(self, job_id: str) -> None:
        """The audio of that job is gone."""

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(delete(doomed_audio).where(doomed_audio.c.job_id == job_id))

        await self._writer.write(job_id, run)

    async def without_job(self, job_ids: Sequence[str]) -> set[str]:
        """Which of these ids no job has."""
        known = await self._rows(select(jobs.c.id).where(jobs.c.id.in_(job_ids)))
        return set(job_ids).difference(job_id for (job_id,) in known)


def _delivery(row: Any) -> Delivery:  # noqa: ANN401 - a row
    return Delivery(
        id=row.id,
        type=row.type,
        url=row.url,
        status=row.status,
        next_attempt_at=None if row.due_ms is None else rfc3339(row.due_ms),
        attempts=_attempts(row.log),
    )
