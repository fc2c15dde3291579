"""Claims renewed together, on both databases: each is told of its own, whatever becomes of the others."""

import asyncio
from datetime import UTC, datetime

from service.store import Renewal, Store
from service.telemetry import metrics
from tests.contracts.test_store import claim, the_record, write
from tests.contracts.test_store import database as database  # noqa: PLC0414  a fixture
from tests.doubles import add_job, an_event, renew


async def test_many_are_one_write_and_each_is_told_of_its_own(store: Store) -> None:
    """Lost, canceled and plain ones in one batch."""
    held = []
    for n in range(60):
        await add_job(store, f"j{n:02}")
        held.append(await claim(store, f"j{n:02}", lease_s=-1 if n == 7 else 60))
    await claim(store, "j07")  # somebody else's by now
    await store.request_cancel("j09")
    before = metrics.commit_seconds.count
    told = await store.renew([Renewal(one, 60, one.job) for one in held])
    assert metrics.commit_seconds.count == before + 1
    assert told == [False] * 7 + [None, False, True] + [False] * 50


async def test_a_renewal_never_takes_back_what_its_job_wrote_after_it(store: Store) -> None:
    """Asked for in this order in one breath: the newer document stays."""
    await add_job(store)
    held = await claim(store)
    for after in range(2, 22):
        renewing = asyncio.create_task(renew(store, held, lease_s=60, job=held.job))
        await asyncio.sleep(0)
        held.job.started_at = datetime.now(UTC).isoformat()
        await asyncio.gather(renewing, write(store, held, an_event("j1", after + 1), after=after))
        assert (await the_record(store)).job.started_at == held.job.started_at


async def test_whoever_gives_up_waiting_leaves_the_others_alone(store: Store) -> None:
    """And is not renewed."""
    await add_job(store)
    await add_job(store, "j2")
    renewals = [Renewal(await claim(store, job_id, lease_s=-1), 60, None) for job_id in ("j1", "j2")]
    renewing = asyncio.create_task(store.renew(renewals))
    await asyncio.sleep(0)
    renewals[0].given_up = True
    assert (await renewing)[1] is False
    assert await store.stranded() == [("j1", 1)]
    renewals[1].given_up = True
    await store.renew(renewals)
