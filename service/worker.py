"""Deliveries → slots → transcription; the reconciler; the drain. FLOOR 5.

A slot is one upstream stream; a job takes as many as it has streams. Nothing is taken from the queue without a free
slot, so that what waits waits in the database, where its place in the queue can be seen. The reconciler rings for
every job that waits and that nobody rang for: the doorbell may fail, the table does not. While the load guard is closed
nothing is taken either: running streams keep their pace, the others wait.
"""

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack

import structlog

from service.core.admission import GRAVE_SECONDS, LATE_SECONDS, LoadGuard, Second
from service.core.errors import TurnwireError
from service.core.job import Claim, channels
from service.intake import begin_claim
from service.ports import Delivery
from service.runtime import Runtime
from service.store import Busy
from service.telemetry import bind, metrics
from service.transcription import Control

RECONCILE_SECONDS = 5.0
RETRY_SECONDS = 1.0
CLAIM_SECONDS = 0.04  # between two claims: what a claim costs at its beginning must not look like lasting load
LAST_WORDS_SECONDS = 2.0  # of the drain, kept for writing down what came

log = structlog.get_logger(__name__)


class Worker:
    """Takes jobs and transcribes them until it is told to drain."""

    def __init__(self, runtime: Runtime, guard: LoadGuard | None = None) -> None:
        """Starts with `run`."""
        self._runtime = runtime
        self._guard = guard or LoadGuard()
        self._free = runtime.settings.max_streams
        self._freed = asyncio.Event()
        self._running: dict[asyncio.Task[None], Control] = {}
        self._starting = asyncio.Lock()
        self._draining = False

    async def run(self) -> None:
        """Work until cancelled by `drain`'s caller."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take(), name="worker-take")
            group.create_task(self._reconcile(), name="worker-reconcile")
            group.create_task(self._watch(), name="worker-load")
            group.create_task(self._runtime.sweeper.run(), name="worker-sweep")
            if self._runtime.webhooks is not None:
                group.create_task(self._runtime.webhooks.run(), name="worker-webhooks")

    async def drain(self) -> None:
        """Take nothing more, let every session end its turn, and hand the jobs back.

        What does not end in time, a database that is away above all, is left: it goes on at the next start. Asked once
        more, as at the end of a process that had a signal, it takes no further time.
        """
        if self._draining:
            return
        self._draining = True
        for control in self._running.values():
            control.ask("drain")
        try:
            async with asyncio.timeout(self._runtime.clock.real(self._runtime.settings.drain)):
                async with self._starting:  # a claim under way counts too
                    pass
                while self._running:
                    await asyncio.wait(self._running)
        except TimeoutError:
            log.warning("jobs left behind", jobs=len(self._running))
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running, timeout=1)

    async def _take(self) -> None:
        while True:
            while not self._has_room():
                self._freed.clear()
                await self._freed.wait()
            try:
                delivery = await self._runtime.queue.next()
            except Exception:
                log.exception("the queue brings nothing; trying again")
                await self._runtime.clock.sleep(RETRY_SECONDS)
                continue
            async with self._starting:
                try:
                    if self._draining:
                        return await delivery.give_back()
                    if self._has_room():
                        await self._start(delivery)
                    else:  # the guard has closed meanwhile
                        await delivery.give_back(RETRY_SECONDS)
                except Exception:
                    log.exception("job not begun; the reconciler will ring again", job_id=delivery.job_id)
            await self._runtime.clock.sleep(CLAIM_SECONDS)

    def _has_room(self) -> bool:
        return self._free > 0 and self._guard.admits(self._runtime.settings.max_streams - self._free)

    async def _watch(self) -> None:
        """Feed the guard once a second, and tell when it opens or closes."""
        clock = self._runtime.clock
        metrics.admission_open.set(self._guard.open)
        now, used, seen = clock.now(), time.thread_time(), _chunks(clock.real(1))
        while True:
            await clock.sleep(1 / clock.real(1))  # a second of the wall: load is the machine's, whatever a test's clock
            before, now, used_before, used = now, clock.now(), used, time.thread_time()
            seen_before, seen = seen, _chunks(clock.real(1))
            chunks, late, grave = (count - then for count, then in zip(seen, seen_before, strict=True))
            busy = (used - used_before) / max(0.001, clock.real(now - before))
            if self._guard.feed(Second(chunks, late, busy, grave)):
                metrics.admission_open.set(self._guard.open)
                verdict = "new streams are taken again" if self._guard.open else "too busy to take new streams"
                running = self._runtime.settings.max_streams - self._free
                log.warning(verdict, streams=running, busy=round(busy, 2), late=late, grave=grave)
            self._freed.set()

    async def _start(self, delivery: Delivery) -> None:
        runtime = self._runtime
        if any(task.get_name() == f"job-{delivery.job_id}" for task in self._running):
            # With the database away it looks stranded; a claim now would take it from ourselves.
            await delivery.give_back(RETRY_SECONDS)
            return
        claim = await runtime.store.claim(
            delivery.job_id,
            lease_s=runtime.transcriber.lease_s,
            begin=lambda record, strikes: begin_claim(runtime.clock, record, strikes),
        )
        with contextlib.suppress(TurnwireError):  # followers find it in the log; the claim must not be dropped for it
            await runtime.intake.tell_newest(delivery.job_id)
        if isinstance(claim, Busy):
            await delivery.give_back(claim.seconds + 0.5)
        elif claim is None:
            await delivery.done()
        else:
            slots = min(len(channels(claim.job)), runtime.settings.max_streams)
            self._free -= slots
            control = Control(drain_s=max(1.0, runtime.settings.drain - LAST_WORDS_SECONDS))
            if self._draining:
                control.ask("drain")
            task = asyncio.create_task(self._work(claim, delivery, control, slots), name=f"job-{claim.job.id}")
            self._running[task] = control

    async def _work(self, claim: Claim, delivery: Delivery, control: Control, slots: int) -> None:
        try:
            with bind(job_id=claim.job.id), metrics.streams.track_inprogress():
                end = await self._runtime.transcriber.transcribe(claim, control, delivery.extend)
            if end.kind == "over":
                await delivery.done()
            elif end.kind == "handed_back":
                await delivery.give_back(end.delay_s)
            # Dropped: what is delivered belongs to the new owner, who alone may answer for it.
        except Exception:
            log.exception("job dropped; its lease will run out", job_id=claim.job.id)
        finally:
            self._free += slots
            self._freed.set()
            task = asyncio.current_task()
            assert task is not None
            self._running.pop(task, None)

    async def _reconcile(self) -> None:
        while True:
            try:
                for job_id, epoch in await self._runtime.store.stranded():
                    await self._runtime.queue.announce(job_id, epoch)
            except Exception:
                log.exception("the queue could not be reconciled; trying again")
            await self._runtime.clock.sleep(RECONCILE_SECONDS)


def _chunks(real: float) -> tuple[int, int, int]:
    """Chunks sent so far, and those that were late and gravely so; `real` as of `Clock.real(1)`."""
    lateness = metrics.chunk_lateness
    return lateness.count, lateness.over(LATE_SECONDS / real), lateness.over(GRAVE_SECONDS / real)


async def start_worker(runtime: Runtime, stack: AsyncExitStack) -> Worker:
    """A worker running in the background until `stack` ends."""
    worker = Worker(runtime)
    task = asyncio.create_task(worker.run(), name="worker")

    async def stop() -> None:
        await worker.drain()
        task.cancel()
        await asyncio.wait([task])

    stack.push_async_callback(stop)
    return worker
