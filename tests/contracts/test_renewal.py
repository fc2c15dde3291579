"""Claims renewed together, on both databases: each is told of its own, whatever becomes of the others."""

import asyncio
from datetime import UTC, datetime

import pytest

from service.core.errors import Fenced
from service.store import Store
from service.telemetry import metrics
from tests.contracts.test_store import claim, the_record, write
from tests.contracts.test_store import database as database  # noqa: PLC0414  a fixture
from tests.doubles import add_job, an_event


async def test_many_are_one_write_and_each_is_told_of_its_own(store: Store) -> None:
    """Lost, canceled and plain ones in one batch."""
    held = []
    for n in range(60):
        await add_job(store, f"j{n:02}")
        held.append(await claim(store, f"j{n:02}", lease_s=-1 if n == 7 else 60))
    await claim(store, "j07")  # somebody else's by now
    await store.request_cancel("j09")
    before = metrics.commit_seconds.count
    told = await asyncio.gather(*(store.renew(one, lease_s=60, job=one.job) for one in held), return_exceptions=True)
    assert metrics.commit_seconds.count == before + 1
    assert isinstance(told.pop(7), Fenced)
    assert told == [False] * 8 + [True] + [False] * 50


async def test_a_renewal_never_takes_back_what_its_job_wrote_after_it(store: Store) -> None:
    """Asked for in this order in one breath: the newer document stays."""
    await add_job(store)
    held = await claim(store)
    for after in range(2, 22):
        renewing = asyncio.create_task(store.renew(held, lease_s=60, job=held.job))
        await asyncio.sleep(0)
        held.job.started_at = datetime.now(UTC).isoformat()
        await asyncio.gather(renewing, write(store, held, an_event("j1", after + 1), after=after))
        assert (await the_record(store)).job.started_at == held.job.started_at


async def test_whoever_gives_up_waiting_leaves_the_others_alone(store: Store) -> None:
    """The one who began the batch is cancelled."""
    await add_job(store)
    await add_job(store, "j2")
    first, second = await claim(store), await claim(store, "j2")
    leaving = asyncio.create_task(store.renew(first, lease_s=60, job=None))
    staying = asyncio.create_task(store.renew(second, lease_s=60, job=None))
    await asyncio.sleep(0)
    leaving.cancel()
    assert not await staying
    with pytest.raises(asyncio.CancelledError):
        await leaving
