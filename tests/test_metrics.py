"""Every metric of the one list is moved by the service at work, and the status of a job is counted where it is true."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from prometheus_client import Gauge
from sqlalchemy.ext.asyncio import AsyncConnection

from service.core.job import Claim, Status
from service.sandbox import faults as f
from service.store import Store, Write
from service.store.writer import Writer
from service.telemetry import configure_logging, metrics
from tests.doubles import add_job, an_event, start
from tests.endpoint import endpoint
from tests.kit import eventually
from tests.test_telemetry import flush
from tests.web.served import serving, wav

ODD = f.FaultPlan({"1": [f.UnknownType(at_ms=400), f.Malformed(at_ms=800), f.Drop(at_ms=2000)]})
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
UNTOUCHED = -1.0


@pytest.fixture
def untouched() -> Iterator[None]:
    """Gauges at a value that none of them can have."""
    gauges = [metric for metric in vars(metrics).values() if isinstance(metric, Gauge)]
    values = [gauge._value.get() for gauge in gauges]
    for gauge in gauges:
        gauge.set(UNTOUCHED)
    yield
    for gauge, value in zip(gauges, values, strict=True):
        gauge.set(value)


def told() -> dict[str, float]:
    """Everything that is told now, by metric and labels; of histograms the count."""
    return {
        f"{family.name} {sample.labels or ''}": sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if not family.name.startswith("process_") and not sample.name.endswith(("_bucket", "_sum"))
    }


async def test_every_metric_moves(tmp_path: Path, untouched: None) -> None:
    before, moved = told(), set[str]()

    def look() -> set[str]:
        moved.update(name.partition(" ")[0] for name, value in told().items() if before.get(name, 0.0) != value)
        return moved

    async with serving(tmp_path / "waiting") as served:
        await served.upload()
        while "turnwire_queue_depth 1.0" not in (await served.http.get("/metrics")).text:
            await asyncio.sleep(0.1)  # a database too busy to answer leaves out what it was asked
        look()
    async with (
        endpoint() as hook,
        serving(
            tmp_path, work=True, faults=ODD, speed=10, webhook_secret=SECRET, webhook_allow="127.0.0.0/8"
        ) as served,
    ):
        job = await served.upload(wav(8), webhook_url=hook.url())
        async with served.http.stream("GET", f"/jobs/{job['id']}/events") as following:
            async for _ in following.aiter_lines():
                look()
        await eventually(lambda: "turnwire_webhook_deliveries" in look())
        await replace(served.runtime.sweeper, retain_jobs_s=0, retain_audio_s=0).sweep()
        refusing()
        look()
    every = {family.name for family in metrics.registry.collect() if not family.name.startswith("process_")}
    assert every - moved == set()


def refusing() -> None:
    """A line that nobody takes."""
    handlers = logging.getLogger().handlers[:]

    def fail(_line: bytes) -> None:
        raise BrokenPipeError

    configure_logging("json", "info", sink=fail)
    structlog.get_logger("service").info("line")
    flush()
    logging.getLogger().handlers[:] = handlers


# --- the status of a job ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def counted(**expected: int) -> AsyncIterator[None]:
    """The changes of status inside are these and no others."""
    before = {status: metrics.jobs.labels(status=status)._value.get() for status in Status}
    yield
    after = {status: metrics.jobs.labels(status=status)._value.get() for status in Status}
    assert {status: after[status] - before[status] for status in Status if after[status] != before[status]} == expected


async def test_a_status_is_counted_once(tmp_path: Path) -> None:
    dropped = f.FaultPlan({"1": [f.Drop(at_ms=500)]})
    async with (
        serving(tmp_path, work=True, faults=dropped) as served,
        counted(queued=1, processing=1, completed=1),
    ):
        await served.ended((await served.upload(wav(2)))["id"])
    async with serving(tmp_path) as served, counted(queued=2, canceled=1):
        job = await served.upload()
        for _ in range(2):
            await served.http.post(f"/jobs/{job['id']}/cancel")
        await served.http.post(f"/jobs/{job['id']}/retry")


async def test_a_write_that_is_tried_again_is_counted_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    transact, lost = Writer._transact, list[str]()

    async def losing(self: Writer, group: list[object]) -> None:
        """Commits, and the first time does not learn of it."""
        operation = group[0]
        run = operation.run  # type: ignore[attr-defined]

        async def told_late(connection: AsyncConnection) -> object:
            result = await run(connection)
            if not lost:
                await connection.commit()
                lost.append("answer")
                raise ConnectionResetError
            return result

        operation.run = told_late  # type: ignore[attr-defined]
        await transact(self, group)  # type: ignore[arg-type]

    await add_job(store)
    held = await store.claim("j1", lease_s=60, begin=start)
    assert isinstance(held, Claim)
    held.job.status = Status.COMPLETED
    monkeypatch.setattr(Writer, "_transact", losing)
    async with counted(completed=1):
        await store.write(held, Write(held.job, [an_event("j1", 3, "job.completed", job={})]), after_seq=2)
    assert lost == ["answer"]
