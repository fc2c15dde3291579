"""Renewing the claims of a process: those that fall due together in two statements. FLOOR 2, part of the store.

A renewal is first in its group: before what its job writes later, so an older document never replaces a newer one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

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


@dataclass(eq=False, slots=True)
class Renewal:
    """A claim to extend by `lease_s`, with its job's progress to be kept unless it holds what is not yet committed."""

    claim: Claim
    lease_s: float
    job: Job | None
    given_up: bool = False  # by its holder, while it waits: it must not be extended any more


async def renew(writer: Writer, renewals: Sequence[Renewal]) -> list[bool | None]:
    """See `Store.renew`."""
    asked: list[tuple[Renewal, dict[str, Any]]] = []
    for one in sorted(renewals, key=lambda renewal: renewal.claim.job.id):
        news = None if one.job is None else to_json(one.job)
        row = {"of": one.claim.job.id, "by": one.claim.epoch, "lease_ms": int(one.lease_s * 1000), "news": news}
        asked.append((one, row))

    async def run(connection: AsyncConnection) -> dict[tuple[str, int], bool]:
        rows = [row for renewal, row in asked if not renewal.given_up]
        if not rows:
            return {}
        await _RENEW.run_each(connection, rows)
        found = await connection.execute(_HELD, {"ids": [row["of"] for row in rows]})
        return {(job_id, epoch): canceled for job_id, epoch, canceled in found}

    held = await writer.write("", run)
    return [held.get((renewal.claim.job.id, renewal.claim.epoch)) for renewal in renewals]
