"""The worker: what it answers its queue, and what it does where the database answers some questions and not others."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.backends.memory import MemoryQueue
from service.core.errors import Unavailable
from service.core.job import Claim
from service.core.pacing import Schedule
from service.intake import Intake
from service.pacer import Pacer
from service.ports import Clock, Delivery
from service.runtime import database_url
from service.sandbox import faults as f
from service.store import Store, open_store
from service.transcription import Heartbeat
from service.worker import Worker, start_worker
from tests.doubles import start
from tests.kit import Kit, check, eventually, running, spoken
from tests.marked import marked_wav, words
from tests.test_faults import plan

# --- workers beside each other ---------------------------------------------------------------------------------------


class Noted:
    """A delivery, and what was answered to it."""

    def __init__(self, inner: Delivery) -> None:
        self.job_id = inner.job_id
        self.answers: list[str] = []
        self.extended = 0
        self._inner = inner

    async def extend(self) -> None:
        self.extended += 1
        await self._inner.extend()

    async def done(self) -> None:
        self.answers.append("done")
        await self._inner.done()

    async def give_back(self, delay_s: float = 0) -> None:
        self.answers.append("at once" if not delay_s else "later")
        await self._inner.give_back(delay_s)


class NotedQueue(MemoryQueue):
    """Keeps its deliveries; raises the first `failures` times it is asked."""

    failures = 0

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.deliveries: list[Noted] = []

    async def next(self) -> Delivery:
        if self.failures:
            self.failures -= 1
            raise Unavailable
        delivery = Noted(await super().next())
        self.deliveries.append(delivery)
        return delivery


@dataclass
class Node:
    """A worker with a connection and a queue of its own."""

    worker: Worker
    queue: NotedQueue
    store: Store


@asynccontextmanager
async def node(kit: Kit, failures: int = 0, **transcriber: Any) -> AsyncIterator[Node]:
    """Another worker on the database of `kit`; fields of its transcriber may be named."""
    runtime = kit.runtime
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(database_url(runtime.settings)))
        queue = NotedQueue(runtime.clock)
        queue.failures = failures
        own: dict[str, Any] = {
            "store": store,
            "pacer": Pacer(runtime.clock),
            "heartbeat": Heartbeat(store, runtime.clock),
        }
        changed = replace(runtime.transcriber, **own, **transcriber)
        worker = await start_worker(replace(runtime, store=store, queue=queue, transcriber=changed), stack)
        yield Node(worker, queue, store)


@asynccontextmanager
async def idle(tmp_path: Path, **options: Any) -> AsyncIterator[Kit]:
    """A kit whose own worker takes nothing."""
    async with running(tmp_path, **options) as kit:
        await kit.worker.drain()
        yield kit


# --- what the queue is answered --------------------------------------------------------------------------------------


async def test_a_delivery_is_done_when_its_job_is_over_though_the_queue_was_away(tmp_path: Path) -> None:
    async with idle(tmp_path) as kit, node(kit, failures=2) as worker:
        _, events = await kit.run(marked_wav(1600))
        assert spoken(events) == words(8)
        await eventually(lambda: worker.queue.deliveries[0].answers == ["done"])


async def test_a_job_that_finds_no_capacity_is_given_back_for_later(tmp_path: Path) -> None:
    faults = plan(f.ErrorFrame(name="too_many", on="open"))
    async with idle(tmp_path, faults=faults) as kit, node(kit) as worker:
        job = await kit.submit(marked_wav(400))
        await eventually(lambda: bool(kit.sandbox.knocks))
        await eventually(lambda: worker.queue.deliveries[0].answers == ["later"])
        assert worker.queue.deliveries[0].job_id == job.id


async def test_a_drain_gives_back_what_runs_and_what_comes(tmp_path: Path) -> None:
    async with idle(tmp_path) as kit, node(kit) as worker:
        job = await kit.submit(marked_wav(6000))
        await kit.follow(job.id, until="turn.final")
        await worker.worker.drain()
        assert worker.queue.deliveries[0].answers == ["at once"]
        await eventually(lambda: len(worker.queue.deliveries) == 2)
        await eventually(lambda: worker.queue.deliveries[1].answers == ["at once"])


async def test_a_drain_that_ran_out_of_time_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the signal and again when the process closes; a claim may wait for its database all the time."""

    async def claim(*_: Any, **__: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async with idle(tmp_path) as kit, node(kit) as worker:
        monkeypatch.setattr(Store, "claim", claim)
        await kit.submit(marked_wav(400))
        await eventually(lambda: worker.queue.deliveries)
        with capture_logs() as said:
            await worker.worker.drain()
            await worker.worker.drain()
        assert [entry["event"] for entry in said].count("jobs left behind") == 1


async def test_a_worker_that_lost_its_job_answers_nothing(tmp_path: Path) -> None:
    """The message it was given is the new owner's by now."""
    async with idle(tmp_path) as kit, node(kit) as worker:
        job = await kit.submit(marked_wav(20_000))
        await kit.follow(job.id, until="turn.final")
        await kit.runtime.store.expire_leases()
        assert isinstance(await kit.runtime.store.claim(job.id, lease_s=60, begin=start), Claim)
        await eventually(lambda: not worker.worker._running)
        assert worker.queue.deliveries[0].answers == []
        assert worker.queue.deliveries[0].job_id == job.id


async def test_the_queue_is_told_now_and_then_that_the_work_goes_on(tmp_path: Path) -> None:
    async with idle(tmp_path) as kit, node(kit) as worker:
        began = kit.runtime.clock.now()
        await kit.run(marked_wav(12_000))
        assert 1 <= worker.queue.deliveries[0].extended <= (kit.runtime.clock.now() - began) / 5


# --- the lease -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
async def test_a_worker_cut_off_from_the_database_drops_its_job_before_another_takes_it(
    tmp_path: Path, silent: bool
) -> None:
    """What it heard meanwhile waits in line to be written, and is refused: the other has said it all."""
    async with idle(tmp_path) as kit, node(kit, alone=False, lease_s=1.5) as first:
        job = await kit.submit(marked_wav(30_000))
        await kit.follow(job.id, until="turn.final")
        commit, back = first.store._writer._commit, asyncio.Event()

        async def cut_off(group: list[Any]) -> None:
            if not silent and not back.is_set():
                raise ConnectionError
            await back.wait()
            await commit(group)

        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            patch.setattr(first.store._writer, "_commit", cut_off)
            stack.callback(back.set)
            async with node(kit, alone=False, lease_s=1.5) as second:
                await eventually(lambda: not first.worker._running)
                assert first.queue.deliveries[0].answers == []
                left = kit.sandbox.sessions[0]
                await eventually(lambda: left.closed_at is not None)
                events = await kit.follow(job.id)
                await eventually(lambda: ["done"] in [delivery.answers for delivery in second.queue.deliveries])
        await eventually(lambda: not first.store._writer._waiting)
        record = await kit.runtime.store.get(job.id)
        assert record is not None
        check(events, await kit.runtime.store.events_after(job.id, 0, 10_000), record.job)
        assert spoken(events) == words(150)
        assert record.epoch >= 2


async def test_a_worker_that_wakes_from_a_long_sleep_sends_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next chunk is due before it has time to learn anything."""
    sent, padded = 0, Schedule.padded

    def counted(schedule: Schedule, chunk: bytes) -> bytes:
        nonlocal sent
        sent += 1
        return padded(schedule, chunk)

    monkeypatch.setattr(Schedule, "padded", counted)
    async with idle(tmp_path) as kit, node(kit, alone=False, lease_s=1.0) as worker:
        job = await kit.submit(marked_wav(20_000))
        await kit.follow(job.id, until="turn.final")
        assert sent
        time.sleep(1.2)  # noqa: ASYNC251 - the nearest that a process can come to stopping itself
        before = sent
        await eventually(lambda: not worker.worker._running)
        assert sent == before
        assert worker.queue.deliveries[0].answers == []
        assert spoken(await kit.follow(job.id)) == words(100)


async def test_no_audio_is_sent_before_the_lease_is_known_to_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def renew(*_: object, **__: object) -> bool:
        raise Unavailable

    async with idle(tmp_path) as kit:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "renew", renew)
            async with node(kit, alone=False, lease_s=1.0) as worker:
                await kit.submit(marked_wav(2000))
                await eventually(lambda: bool(kit.sandbox.sessions))
                await eventually(lambda: not worker.worker._running)
                assert kit.sandbox.sessions[0].audio_ms == 0
                assert worker.queue.deliveries[0].answers == []


async def test_a_worker_never_takes_a_job_from_itself(tmp_path: Path) -> None:
    """Alone with a database that was away, its own lease has run out."""
    async with running(tmp_path) as kit:
        job = await kit.submit(marked_wav(6000))
        await kit.follow(job.id, until="turn.final")
        await kit.runtime.store.expire_leases()
        await kit.runtime.queue.announce(job.id, 1)
        events = await kit.follow(job.id)
        assert spoken(events) == words(30)
        assert events[-1]["job"]["attempt"] == 1


# --- a database that answers some questions --------------------------------------------------------------------------


async def test_a_claim_that_cannot_be_told_of_is_worked_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tell_newest(_: Intake, __: str) -> None:
        raise Unavailable

    monkeypatch.setattr(Intake, "tell_newest", tell_newest)
    async with running(tmp_path) as kit:
        job, events = await kit.run(marked_wav(1600))
        assert (job.status, job.attempt) == ("completed", 1)
        assert spoken(events) == words(8)
