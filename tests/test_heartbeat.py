"""Claims renewed together: as long as they are kept, and not a moment longer."""

import asyncio
from contextlib import ExitStack

from service.backends.memory import MemoryBus
from service.core.job import Claim, Stage
from service.runtime import SystemClock
from service.store import Store
from service.transcription.control import Control, Lease
from service.transcription.heartbeat import Heartbeat, Life
from service.transcription.recorder import Recorder
from tests.doubles import add_job, start, until

CLOCK = SystemClock(20)
LEASE_SECONDS = 15


async def life(store: Store, job_id: str, told: list[str]) -> Life:
    """A claim whose lease has run out as far as the database knows; what its queue is told goes to `told`."""
    await add_job(store, job_id)
    claim = await store.claim(job_id, lease_s=-1, begin=start)
    assert isinstance(claim, Claim)

    async def extend() -> None:
        told.append(job_id)
        raise OSError("the queue is away")

    lease = Lease(CLOCK, LEASE_SECONDS, alone=False)
    recorder = Recorder(claim, store, MemoryBus(), CLOCK)
    return Life(recorder, Control(drain_s=1), lease, LEASE_SECONDS, extend, extended=CLOCK.now())


async def test_claims_are_kept_until_they_leave(store: Store) -> None:
    told: list[str] = []
    lives = [await life(store, f"j{n:02}", told) for n in range(30)]
    assert len(await store.stranded()) == 30
    heartbeat = Heartbeat(store, CLOCK)
    with ExitStack() as stack:
        for one in lives:
            stack.enter_context(heartbeat.keep(one, at_once=False))
        async with asyncio.timeout(10):
            while await store.stranded():
                await asyncio.sleep(0)
        await until(lambda: all(one.lease.held(CLOCK.now()) for one in lives))
        await until(lambda: set(told) == {f"j{n:02}" for n in range(30)})
    await until(lambda: all(task.get_name() != "heartbeat" for task in asyncio.all_tasks()))


async def test_the_first_renewal_need_not_wait_for_the_others(store: Store) -> None:
    """Nothing may be sent before it."""
    slow = SystemClock(0.001)
    one = await life(store, "j1", [])
    with Heartbeat(store, slow).keep(one, at_once=True):
        await until(lambda: one.lease.held(CLOCK.now()))
    assert await store.stranded() == []


async def test_who_leaves_while_its_renewal_waits_is_not_renewed(store: Store) -> None:
    leaving, staying = await life(store, "j1", []), await life(store, "j2", [])
    heartbeat = Heartbeat(store, CLOCK)
    with heartbeat.keep(staying, at_once=False):
        with heartbeat.keep(leaving, at_once=False):
            renewing = asyncio.create_task(heartbeat._renew([leaving, staying]))
            await asyncio.sleep(0)
        await renewing
    assert await store.stranded() == [("j1", 1)]


async def test_one_that_fails_stops_no_heart(store: Store) -> None:
    broken, sound = await life(store, "j1", []), await life(store, "j2", [])
    await store.request_cancel("j1")

    def fail() -> None:
        raise RuntimeError

    broken.control.listeners.add(fail)
    heartbeat = Heartbeat(store, CLOCK)
    sound.recorder.job.stage = Stage.STREAMING
    heartbeat._groups[0] |= {broken, sound}
    task = asyncio.create_task(heartbeat._run(heartbeat._groups[0], 0))
    await until(lambda: broken.lease.held(CLOCK.now()) and sound.lease.held(CLOCK.now()))
    task.cancel()
    await asyncio.wait([task])
