"""Transcribing one claimed job: validate the stored audio, pace it out, take the turns in, keep and tell them,
finish. FLOOR 3.

`transcribe` returns when the claim is over and says how: the job is completed, failed or canceled, or back in the queue
(drain, no capacity), or somebody else has it or may soon (`Fenced`; the lease could not be renewed): then everything is
dropped without a word. Whatever else goes wrong ends the job as `internal`, with what was kept.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import structlog

from service.core.coverage import coverage
from service.core.errors import AudioCorrupt, Fenced, InvalidAudio, OurError, TurnwireError, Unavailable
from service.core.job import CANCEL, LISTENING, Claim, Closed, Event, Failure, Job, Stage, Status, channels
from service.core.wav import WavInfo, WavParser
from service.pacer import Pacer
from service.ports import BlobStore, Bus, Clock, Upstream
from service.store import Store
from service.transcription.control import Control, End, Lease, Outcome, SessionGate, StartLine, Work
from service.transcription.heartbeat import Heartbeat, Life
from service.transcription.recorder import Recorder
from service.transcription.sender import read
from service.transcription.stream import ChannelStream

__all__ = ["Control", "Heartbeat", "SessionGate", "Transcriber"]

LEASE_SECONDS = 15.0
HEAR_SECONDS = 1.0  # until the bus is tried again
READ = 1 << 20

log = structlog.get_logger(__name__)


class Stopped(Exception):
    """Asked to stop while validating."""


@dataclass(frozen=True, slots=True)
class Transcriber:
    """What transcribing needs, the same for every job of a process."""

    store: Store
    bus: Bus
    blobs: BlobStore
    upstream: Upstream
    pacer: Pacer
    clock: Clock
    gate: SessionGate
    heartbeat: Heartbeat
    patience_s: float
    alone: bool = True  # with its database: nobody else could take a job over
    lease_s: float = LEASE_SECONDS

    async def transcribe(self, claim: Claim, control: Control, extend: Callable[[], Awaitable[None]]) -> End:
        """Work on `claim` until it is over; `extend` tells the queue now and then that the work goes on."""
        lease = Lease(self.clock, self.lease_s, alone=self.alone)
        recorder = Recorder(claim, self.store, self.bus, self.clock)
        life = Life(recorder, control, lease, self.lease_s, extend, extended=self.clock.now())
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(recorder.run(), name="recorder")
                beside = [group.create_task(self._hear(recorder, control), name="control")]
                if not self.alone:
                    beside.append(group.create_task(lease.over(), name="lease"))
                with self.heartbeat.keep(life, at_once=not self.alone):
                    end = await self._work(recorder, control, lease)
                    recorder.close()
                    await writing
                for task in beside:
                    task.cancel()
        except* Fenced:
            log.info("claim lost", job_id=claim.job.id, epoch=claim.epoch)
            end = End("dropped")
        return end

    async def _hear(self, recorder: Recorder, control: Control) -> None:
        def hear(event: Event) -> None:
            if event.type == CANCEL:
                control.ask("cancel")
            elif event.type == LISTENING:
                recorder.tell_again()

        while True:
            with suppress(Unavailable):  # the job goes on without the bus; the renewal brings word of a cancel
                async with self.bus.subscribe(f"control.{recorder.job.id}", hear):
                    await asyncio.get_running_loop().create_future()
            await self.clock.sleep(HEAR_SECONDS)

    async def _work(self, recorder: Recorder, control: Control, lease: Lease) -> End:
        job = recorder.job
        self._mourn(recorder)
        streams: list[int | None] = channels(job)
        try:
            recorder.stage(Stage.VALIDATING)
            info = await self._validate(job, control)
            work = Work(
                recorder, control, lease, info, self.clock, self.pacer, self.blobs, self.upstream, self.gate,
                self.patience_s, StartLine(len(streams)),
            )  # fmt: skip
            outcomes = await self._stream(work, streams)
        except Stopped:
            outcomes = [Outcome("stopped")]
        except TurnwireError as exc:
            outcomes = [_failed(job, exc)]
        except Exception:
            log.exception("job failed unexpectedly", job_id=job.id)
            failure = Failure(
                "internal", "The service failed on this job; what was transcribed is kept. Retry it.", True
            )
            outcomes = [Outcome("failed", failure)]
        return self._conclude(recorder, control, outcomes)

    def _mourn(self, recorder: Recorder) -> None:
        """Sessions that a dead worker left open are lost; say so once."""
        for session in recorder.job.sessions:
            if session.closed is None:
                recorder.session_lost(session, Closed(None, "the worker of this job was gone"), retry_in_s=0)

    def _patience(self, control: Control) -> float:
        return 0 if control.stop else self.patience_s

    async def _validate(self, job: Job, control: Control) -> WavInfo:
        """The stored bytes must be those that were accepted. Raises `AudioMissing`, `AudioCorrupt`."""
        parser, digest, at = WavParser(max_duration_s=float("inf")), hashlib.sha256(), 0
        try:
            while block := await read(self.blobs, job.id, at, READ, self.clock, lambda: self._patience(control)):
                parser.feed(block)
                await asyncio.to_thread(digest.update, block)
                at += len(block)
                if control.stop:
                    raise Stopped
            info = parser.finish()
        except Unavailable:
            if control.stop:
                raise Stopped from None
            raise
        except InvalidAudio as exc:
            raise AudioCorrupt from exc
        if digest.hexdigest() != job.audio.sha256:
            raise AudioCorrupt
        return info

    async def _stream(self, work: Work, streams: Sequence[int | None]) -> list[Outcome]:
        option = work.recorder.job.options.get("channels")

        async def one(channel: int | None) -> Outcome:
            pick: int | Literal["mix"] = "mix" if option == "mix" else channel or 0
            try:
                outcome = await ChannelStream(work, channel, pick).run()
            except TurnwireError as exc:  # here: a task group would wrap it
                outcome = _failed(work.recorder.job, exc)
            if outcome.kind in ("failed", "no_capacity"):
                work.control.ask("failed")  # the other channels end their turns; what they say is kept
            return outcome

        if len(streams) == 1:
            return [await one(streams[0])]  # most jobs: a task and a group of tasks less
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(channel), name=f"channel-{channel}") for channel in streams]
        return [task.result() for task in tasks]

    def _conclude(self, recorder: Recorder, control: Control, outcomes: list[Outcome]) -> End:
        job = recorder.job
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        waits = [outcome.delay_s for outcome in outcomes if outcome.kind == "no_capacity"]
        if control.stop == "cancel":
            status, error = Status.CANCELED, None
        elif failures:
            status, error = Status.FAILED, failures[0]
        elif waits:
            recorder.release(not_before_s=self.clock.real(max(waits)))  # on the database's clock
            return End("handed_back", max(waits))
        elif control.stop:
            recorder.release(not_before_s=0)
            return End("handed_back")
        else:
            status, error = Status.COMPLETED, None
        recorder.finish(
            status,
            error=error,
            coverage=coverage(
                file_ms=job.audio.duration_ms,
                sessions=job.sessions,
                finalized=recorder.finalized,
                channels=channels(job),
            ),
        )
        return End("over")


def _failed(job: Job, exc: TurnwireError) -> Outcome:
    if isinstance(exc, Fenced):
        raise exc
    log.error("job failed", job_id=job.id, code=exc.code, detail=exc.detail)
    return Outcome("failed", Failure(exc.code, exc.detail, isinstance(exc, OurError)))
