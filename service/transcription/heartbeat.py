"""The heartbeats of all claims of a process. Part of FLOOR 3.

A thousand claims are renewed once a second. They beat in a few groups, each of them one timer and one write: the same
moment for all of a group, not the same for all.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import structlog

from service.core.errors import StorageFull, Unavailable
from service.ports import Clock
from service.store import Renewal, Store
from service.transcription.control import Control, Lease
from service.transcription.recorder import Recorder

RENEW_SECONDS = 1.0
GROUPS = 8
EXTEND_SECONDS = 5.0

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class Life:
    """A claim at work. `extend` tells the queue now and then that the work goes on."""

    recorder: Recorder
    control: Control
    lease: Lease
    lease_s: float
    extend: Callable[[], Awaitable[None]]
    extended: float  # when it was told
    renewal: Renewal | None = None  # under way


class Heartbeat:
    """Keeps claims alive."""

    def __init__(self, store: Store, clock: Clock) -> None:
        """Beats while there are claims."""
        self._store = store
        self._clock = clock
        self._groups: list[set[Life]] = [set() for _ in range(GROUPS)]
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @contextmanager
    def keep(self, life: Life, *, at_once: bool) -> Iterator[None]:
        """Renew this claim until the end of the context, the first time at once or when its group does."""
        number = crc32(life.recorder.job.id.encode()) % GROUPS
        group = self._groups[number]
        group.add(life)
        if number not in self._tasks:
            self._tasks[number] = _start(self._run(group, number * RENEW_SECONDS / GROUPS))
        first = _start(self._beat([life])) if at_once else None
        try:
            yield
        finally:
            group.remove(life)
            if life.renewal is not None:
                life.renewal.given_up = True
            if first is not None:
                first.cancel()
            if not group:
                self._tasks.pop(number).cancel()

    async def _run(self, group: set[Life], phase: float) -> None:
        while True:
            await self._clock.sleep(RENEW_SECONDS - (self._clock.now() - phase) % RENEW_SECONDS)
            await self._beat([life for life in group if life.renewal is None])

    async def _beat(self, lives: Sequence[Life]) -> None:
        """Renew these. Whatever goes wrong with one, the next beat is for all."""
        try:
            await self._renew(lives)
        except (Unavailable, StorageFull):
            pass  # asked again at the next beat
        except Exception:
            log.exception("claims could not be renewed", claims=len(lives))

    async def _renew(self, lives: Sequence[Life]) -> None:
        now = self._clock.now()
        renewals = [life.recorder.renewal(life.lease_s) for life in lives]
        for life, renewal in zip(lives, renewals, strict=True):
            life.renewal = renewal
        reached = [life.recorder.job.progress.sent_ms for life in lives]
        try:
            answers = await self._store.renew(renewals)
        finally:
            for life in lives:
                life.renewal = None
        due: list[Life] = []
        for life, renewal, sent_ms, cancel in zip(lives, renewals, reached, answers, strict=True):
            recorder = life.recorder
            if renewal.given_up:
                continue
            if cancel is None:
                recorder.fence()
                continue
            if cancel:
                life.control.ask("cancel")
            life.lease.renewed(now)
            if renewal.job is not None:
                recorder.tell_progress(sent_ms)
            if now - life.extended >= EXTEND_SECONDS:
                life.extended = now
                due.append(life)
        await asyncio.gather(*(self._extend(life) for life in due))

    async def _extend(self, life: Life) -> None:
        """The queue may be away: then it delivers the job a second time, and the claim sends that away."""
        try:
            async with asyncio.timeout(self._clock.real(RENEW_SECONDS)):
                await life.extend()
        except Exception as exc:  # noqa: BLE001 - the job does not depend on it
            job_id = life.recorder.job.id
            log.warning("the queue could not be told that a job goes on", job_id=job_id, error=str(exc))


def _start(beating: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """In no job's context: it would lend its id to what is logged of others."""
    return asyncio.create_task(beating, name="heartbeat", context=Context())
