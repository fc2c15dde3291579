"""What is due for removal: audio and jobs that have been kept long enough, and audio that nothing refers to. FLOOR 3.

Invariants: a job that has not ended is never touched, nor one that is retried while it is being looked at; audio is
first given up in the database and only then removed, so that a removal that fails, or that a crash cuts off, is made
up for by the next sweep. Whatever deletes a job, its audio is gone within a sweep or two.
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import structlog

from service.core.errors import OurError
from service.ports import BlobStore, Clock
from service.store import Store
from service.telemetry import metrics

SWEEP_SECONDS = 20.0
ORPHAN_SWEEP_SECONDS = 3600.0  # it looks at every file
ORPHAN_AGE_SECONDS = 3600.0  # an upload is waited for 15 minutes at most; the rest is for slow disks
PAGE = 500

log = structlog.get_logger(__name__)


# --- what is due (pure) ----------------------------------------------------------------------------------------------


class Due(NamedTuple):
    """Moments, Unix ms: jobs that ended by then are removed, or lose their audio; blobs made by then need a job."""

    jobs_ended_by: int
    audio_ended_by: int
    orphans_made_by: int


def due(now_ms: int, *, retain_jobs_s: float, retain_audio_s: float) -> Due:
    """What is due at `now_ms`."""
    seconds = (retain_jobs_s, retain_audio_s, ORPHAN_AGE_SECONDS)
    return Due(*(now_ms - int(kept * 1000) for kept in seconds))


def made_ms(key: str) -> int | None:
    """When a blob was begun, by its key, a UUIDv7; None for what is none of ours."""
    try:
        job_id = uuid.UUID(key)
    except ValueError:
        return None
    return job_id.int >> 80 if job_id.version == 7 and str(job_id) == key else None


def suspects(keys: Iterable[str], made_by: int) -> list[str]:
    """Blobs old enough to need a job."""
    return sorted(key for key in keys if (made := made_ms(key)) is not None and made <= made_by)


def pages(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """As many as one query may name."""
    return (keys[at : at + PAGE] for at in range(0, len(keys), PAGE))


# --- the sweeper -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sweeper:
    """Removes what is due."""

    store: Store
    blobs: BlobStore
    clock: Clock
    retain_jobs_s: float
    retain_audio_s: float
    _orphans_at: float = field(default=float("-inf"), init=False)

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await self.sweep()
            except (OurError, OSError):
                log.warning("the sweep stopped half way; the next goes on")
            except Exception:
                log.exception("the sweep failed")
            await self.clock.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Remove what is due now."""
        now = due(self.clock.utc_ms(), retain_jobs_s=self.retain_jobs_s, retain_audio_s=self.retain_audio_s)
        outbox = self.store.outbox
        for job_id in await outbox.ended_by(now.jobs_ended_by, with_audio=False):
            if await self.store.delete(job_id, ended_by_ms=now.jobs_ended_by):
                metrics.retention_removals.labels(kind="job").inc()
        for job_id in await outbox.ended_by(now.audio_ended_by, with_audio=True):
            if await outbox.drop_audio(job_id, ended_by_ms=now.audio_ended_by):
                metrics.retention_removals.labels(kind="audio").inc()
        for job_id in await outbox.doomed():
            if await _remove(self.blobs, job_id):
                await outbox.removed(job_id)
        if self.clock.now() >= self._orphans_at + ORPHAN_SWEEP_SECONDS:
            await remove_orphans(self.store, self.blobs, now.orphans_made_by)
            self._orphans_at = self.clock.now()


async def remove_orphans(store: Store, blobs: BlobStore, made_by: int) -> None:
    """Remove what uploads left behind that a crash cut off between their audio and their job.

    No upload begun by `made_by` may still be under way.
    """
    for page in pages(suspects(await blobs.keys(), made_by)):
        for job_id in await store.outbox.without_job(page):
            if await _remove(blobs, job_id):
                metrics.retention_removals.labels(kind="orphan").inc()


async def _remove(blobs: BlobStore, job_id: str) -> bool:
    """One that cannot be removed must not keep the others."""
    try:
        await blobs.delete(job_id)
    except (OurError, OSError) as exc:
        log.warning("audio could not be removed; tried again later", job_id=job_id, error=exc)
        return False
    return True
