"""The contract of a JobQueue: every announced job is delivered at least once, to somebody, and again when given back.

Runs on every kind of `QUEUES`; another is added by naming it there and opening it in the fixture `queue`.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from service.backends.memory import MemoryQueue
from service.backends.nats import NatsBroker
from service.ports import JobQueue
from service.runtime import SystemClock
from tests.engines.nats import Nats

QUEUES = ["memory", "nats"]
FAST = SystemClock(100)


@pytest.fixture(params=QUEUES)
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[JobQueue]:
    """An empty queue of each kind; the one that lets its clock be chosen on one a hundred times as fast."""
    if request.param == "memory":
        yield MemoryQueue(FAST)
    else:
        server: Nats = request.getfixturevalue("nats_server")
        async with NatsBroker(server.url, prefix=f"t{uuid.uuid4().hex}") as broker:
            yield broker.queue


async def taken(queue: JobQueue, count: int) -> list[str]:
    async with asyncio.timeout(5):
        return [(await queue.next()).job_id for _ in range(count)]


async def empty(queue: JobQueue) -> bool:
    try:
        async with asyncio.timeout(0.05):
            await queue.next()
    except TimeoutError:
        return True
    return False


async def test_jobs_come_in_the_order_of_their_announcement(queue: JobQueue) -> None:
    for n in range(50):
        await queue.announce(f"j{n:02}", 0)
    assert await taken(queue, 50) == [f"j{n:02}" for n in range(50)]
    assert await empty(queue)


async def test_ringing_twice_for_a_waiting_job_delivers_it_once(queue: JobQueue) -> None:
    for _ in range(3):
        await queue.announce("j1", 0)
        await queue.announce("j2", 0)
    assert await taken(queue, 2) == ["j1", "j2"]
    assert await empty(queue)


async def test_a_job_that_was_taken_can_be_announced_again(queue: JobQueue) -> None:
    await queue.announce("j1", 0)
    delivery = await queue.next()
    await queue.announce("j1", 1)
    assert await taken(queue, 1) == ["j1"]
    await delivery.extend()
    await delivery.done()
    assert await empty(queue)


async def test_what_is_given_back_comes_again(queue: JobQueue) -> None:
    await queue.announce("j1", 0)
    for _ in range(3):
        async with asyncio.timeout(5):
            delivery = await queue.next()
        await delivery.give_back()
    assert await taken(queue, 1) == ["j1"]


async def test_what_is_given_back_for_later_comes_later_and_holds_up_nobody(queue: JobQueue) -> None:
    await queue.announce("j1", 0)
    delivery = await queue.next()
    began = FAST.now()
    await delivery.give_back(2.0)
    await queue.announce("j2", 0)
    assert await taken(queue, 2) == ["j2", "j1"]
    assert FAST.now() - began >= 2.0


async def test_every_job_goes_to_one_of_those_who_wait(queue: JobQueue) -> None:
    waiting = [asyncio.create_task(taken(queue, 5)) for _ in range(10)]
    await asyncio.sleep(0)
    for n in range(50):
        await queue.announce(f"j{n}", 0)
        if n % 7 == 0:
            await asyncio.sleep(0)
    got = [job_id for one in await asyncio.gather(*waiting) for job_id in one]
    assert sorted(got) == sorted(f"j{n}" for n in range(50))


async def test_who_stops_waiting_takes_nothing_along(queue: JobQueue) -> None:
    assert await empty(queue)
    await queue.announce("j1", 0)
    assert await taken(queue, 1) == ["j1"]


async def test_a_queue_that_can_be_reached_says_so(queue: JobQueue) -> None:
    assert await queue.check()
