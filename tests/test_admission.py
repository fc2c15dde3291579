"""A worker whose load guard is closed: what runs goes on, what comes waits, and it opens by itself."""

import asyncio
from pathlib import Path

import pytest

from service.core import admission
from service.core.admission import BUSY_SECONDS, Second
from service.core.job import Status
from service.telemetry import metrics
from tests import marked
from tests.kit import running


async def test_a_closed_guard_leaves_jobs_in_the_queue_until_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is not lost, not failed and not begun; it runs when the load is gone, with nobody's help."""
    monkeypatch.setattr(admission, "ALWAYS", 0)
    async with running(tmp_path) as kit, asyncio.timeout(60):
        guard = kit.worker._guard
        for _ in range(BUSY_SECONDS):
            guard.feed(Second(chunks=100, late=0, busy=1.0))
        assert not guard.admits(0)
        job = await kit.submit(marked.marked_wav(1000))
        while len(guard._seconds) < 2 and not guard.open:  # real seconds, in which it could have been taken
            await asyncio.sleep(0.05)
        record = await kit.runtime.store.get(job.id)
        assert record is not None
        assert record.job.status == Status.QUEUED
        assert not kit.sandbox.sessions
        events = await kit.follow(job.id)
        assert events[-1]["type"] == "job.completed"
        assert guard.open
        assert metrics.registry.get_sample_value("turnwire_admission_open") == 1
