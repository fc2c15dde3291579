"""Renewing the claims of a process: all that fall due together in two statements. FLOOR 2, part of the store.

A thousand jobs renew once a second. What asks while the writer is busy joins the batch that is already in line, ahead
of whatever its job writes later, so an older document never replaces a newer one.
"""

import asyncio
from typing import Any

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.core.errors import Fenced
from service.core.job import Claim, Job, Status, to_json
from service.store.prepared import Prepared
from service.store.schema import jobs, now_ms
from service.store.writer import Writer

_RENEW = Prepared(
    update(jobs)
    .where(jobs.c.id == bindparam("of"), jobs.c.epoch == bindparam("by"), jobs.c.status == Status.PROCESSING)
    .values(
        lease_until_ms=now_ms() + bindparam("lease_ms"),
        doc=func.coalesce(bindparam("news", type_=jobs.c.doc.type), jobs.c.doc),
    )
)
_HELD = select(jobs.c.id, jobs.c.epoch, jobs.c.cancel_requested).where(
    jobs.c.id.in_(bindparam("ids", expanding=True)), jobs.c.status == Status.PROCESSING
)

Held = dict[tuple[str, int], bool]


class _Batch:
    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.open = True
        self.done: asyncio.Future[Held]

    async def run(self, connection: AsyncConnection) -> Held:
        """Which of the claims are still held, and whether their cancel was requested."""
        self.open = False
        if not self.rows:
            return {}  # all who asked have left
        ids = sorted(self.rows)
        await _RENEW.run_each(connection, [self.rows[job_id] for job_id in ids])
        found = await connection.execute(_HELD, {"ids": ids})
        return {(job_id, epoch): canceled for job_id, epoch, canceled in found}


class Renewals:
    """The claims of this process."""

    def __init__(self, writer: Writer) -> None:
        """Written by the one who writes everything."""
        self._writer = writer
        self._batch: _Batch | None = None

    async def renew(self, claim: Claim, *, lease_s: float, job: Job | None) -> bool:
        """See `Store.renew`."""
        batch = self._batch
        if batch is None or not batch.open or batch.done.done() or claim.job.id in batch.rows:
            batch = self._batch = _Batch()
            batch.done = self._writer.submit("", batch.run)  # first in its group: before what these jobs write next
        batch.rows[claim.job.id] = {
            "of": claim.job.id,
            "by": claim.epoch,
            "lease_ms": int(lease_s * 1000),
            "news": None if job is None else to_json(job),
        }
        try:
            held = await asyncio.shield(batch.done)
        except asyncio.CancelledError:
            batch.rows.pop(claim.job.id, None)  # a lease that was given up must not be extended later
            raise
        if (claim.job.id, claim.epoch) not in held:
            raise Fenced
        return held[claim.job.id, claim.epoch]
