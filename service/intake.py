"""What callers do to jobs: upload, cancel, retry, delete. FLOOR 3.

`accept`: bytes → hash, WAV parser and blob store in one pass → one transaction with the job row and its first events
→ doorbell. When it returns, audio and row survive a SIGKILL; when it raises, nothing of the upload is left. An upload
whose idempotency key has a job already is only read, to be compared. The worker that holds a job is told over the bus,
and finds the same word in the database should the bus lose it.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import structlog

from service.core.coverage import coverage
from service.core.errors import CallerError, OurError, Unavailable
from service.core.job import (
    CANCEL,
    DELETED,
    Audio,
    Closed,
    Event,
    Failure,
    Job,
    Notice,
    Progress,
    Session,
    Stage,
    Status,
    channels,
    hint,
    links,
    make_event,
    may_become,
    rfc3339,
    to_json,
)
from service.core.options import Options, clean_filename, parse_options
from service.core.wav import WavInfo, WavParser, check_channels, warnings_for
from service.ports import BlobStore, Bus, Clock, JobQueue
from service.store import MAX_STRIKES, Record, Store, Use, Write

log = structlog.get_logger(__name__)

WORKER_GONE = "the worker of this job was gone"


class Upload(Protocol):
    """An upload being received. `fields` and `filename` are whole once `chunks` has ended."""

    fields: list[tuple[str, str]]
    filename: str | None

    def chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes as they arrive; raises `CallerError` for what is wrong with the body."""


@dataclass(slots=True)
class _Received:
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    size: int = 0
    options: Options | None = None
    info: WavInfo | None = None

    def fingerprint(self) -> str:
        """Of the file's bytes and the options, whatever order these came in; a part's own file name is no option."""
        options = msgspec.structs.replace(self.options, given=sorted(self.options.given)) if self.options else None
        return hashlib.sha256(self.digest.digest() + to_json(options)).hexdigest()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The job of an upload; `replayed`: one that the idempotency key had made before."""

    job: Job
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Intake:
    """Takes jobs in and changes them."""

    store: Store
    blobs: BlobStore
    queue: JobQueue
    bus: Bus
    clock: Clock
    default_model: str
    max_audio_s: float
    max_queue: int
    webhooks_enabled: bool
    # Idempotency keys, with their owners, of uploads that this process is receiving.
    receiving: set[tuple[str, str]] = field(default_factory=set)

    async def accept(
        self, upload: Upload, *, owner: str, query: Sequence[tuple[str, str]], raw_length: int | None
    ) -> Job:
        """Receive one upload. `query` are options from the URL; `raw_length` the length of a raw body, if known.

        Raises `CallerError`, `StorageFull`, `Unavailable`.
        """
        return (await self._receive(upload, owner, query, raw_length, "")).job

    async def accept_once(
        self, upload: Upload, *, owner: str, query: Sequence[tuple[str, str]], raw_length: int | None, key: str
    ) -> Accepted:
        """Receive one upload, unless its idempotency key has a job already."""
        use = await self.store.used(owner, key)
        if use is not None:
            received = _Received()
            async for _ in self._checked(upload, query, received, raw_length):
                pass
            return await self._replay(use, received)
        if (owner, key) in self.receiving:
            raise CallerError(
                "idempotency_in_progress",
                "An upload with this Idempotency-Key is still being received; send this one again when it is over.",
            )
        self.receiving.add((owner, key))
        try:
            return await self._receive(upload, owner, query, raw_length, key)
        finally:
            self.receiving.discard((owner, key))

    async def _receive(
        self, upload: Upload, owner: str, query: Sequence[tuple[str, str]], raw_length: int | None, key: str
    ) -> Accepted:
        await self._check_queue()
        job_id = new_id(self.clock.utc_ms())
        received = _Received()
        await self.blobs.put(job_id, self._checked(upload, query, received, raw_length))
        # A client that leaves from here on has a job all the same: its row may be on the disk already.
        return await asyncio.shield(asyncio.create_task(self._keep(job_id, upload, owner, received, key)))

    async def _keep(self, job_id: str, upload: Upload, owner: str, received: _Received, key: str) -> Accepted:
        try:
            job, made, created_ms = self._make(job_id, upload, received)
            use = await self.store.create(
                job, made, owner=owner, created_ms=created_ms, key=key, fingerprint=received.fingerprint()
            )
        except BaseException:
            await self.blobs.delete(job_id)
            raise
        if use is not None:  # it was sent to another process too, which was first
            await self.blobs.delete(job_id)
            return await self._replay(use, received)
        await self.queue.announce(job_id, 0)
        return Accepted(job)

    async def _replay(self, use: Use, received: _Received) -> Accepted:
        if use.fingerprint != received.fingerprint():
            raise CallerError(
                "idempotency_mismatch",
                "This Idempotency-Key came with another file or other options before; use another key for this one.",
            )
        record = await self.store.get(use.job_id)
        if record is None:
            raise Unavailable("The job of this Idempotency-Key was deleted just now. Send the upload again.")
        return Accepted(record.job, replayed=True)

    async def _check_queue(self) -> None:
        depth, _ = await self.store.queue()
        if depth >= self.max_queue:
            raise CallerError("queue_full", f"{depth} jobs are waiting already. Try again later.")

    async def _checked(
        self, upload: Upload, query: Sequence[tuple[str, str]], received: _Received, raw_length: int | None
    ) -> AsyncIterator[bytes]:
        """The upload's bytes, judged as they pass: a fault anywhere keeps the blob from being stored."""
        parser = WavParser(max_duration_s=self.max_audio_s, total_bytes=raw_length)
        async for chunk in upload.chunks():
            parser.feed(chunk)
            received.digest.update(chunk)
            received.size += len(chunk)
            yield chunk
        received.options = parse_options(
            [*query, *upload.fields], default_model=self.default_model, webhooks_enabled=self.webhooks_enabled
        )
        if parser.format is not None:
            check_channels(parser.format, received.options.channels)
        received.info = parser.finish()

    def _make(self, job_id: str, upload: Upload, received: _Received) -> tuple[Job, list[Event], int]:
        info, options = received.info, received.options
        assert info is not None
        assert options is not None
        now = self.clock.utc_ms()
        job = Job(
            id=job_id,
            status=Status.QUEUED,
            created_at=rfc3339(now),
            filename=options.filename or clean_filename(upload.filename or ""),
            audio=Audio(
                bytes=received.size,
                sha256=received.digest.hexdigest(),
                duration_ms=info.duration_ms,
                sample_rate=info.format.sample_rate,
                channels=info.format.channels,
                encoding=info.format.encoding,
                converted=info.format.converted,
            ),
            options=options.public(),
            progress=Progress(0, info.duration_ms),
            warnings=[Notice(warning.code, warning.message) for warning in warnings_for(info, options.channels)],
            metadata=options.metadata,
            links=links(job_id),
        )
        made = [make_event(job_id, 1, "job.status", now, {"status": Status.QUEUED, "stage": None})]
        made += [
            make_event(job_id, seq, "job.warning", now, {"code": notice.code, "message": notice.message})
            for seq, notice in enumerate(job.warnings, 2)
        ]
        return job, made, now

    # --- changes ------------------------------------------------------------------------------------------------------

    async def cancel(self, job_id: str) -> Record | None:
        """A queued job is canceled in the answer; a running one is asked to. Raises `CallerError` when it has ended
        otherwise.
        """
        now = self.clock.utc_ms()

        def change(record: Record) -> Write | None:
            job = record.job
            if job.status in (Status.COMPLETED, Status.FAILED):
                raise CallerError(
                    "not_cancelable", f"The job has {job.status} already; only a queued or running job can be canceled."
                )
            if job.status != Status.QUEUED:
                return None
            _end(record, Status.CANCELED, now)
            return Write(job, events=[make_event(job.id, record.event_seq + 1, "job.canceled", now, {"job": job})])

        record = await self._amend(job_id, change)
        if record is not None and record.job.status == Status.PROCESSING:
            if not await self.store.request_cancel(job_id):
                return await self.cancel(job_id)  # it was handed back, or it ended, a moment ago
            self.bus.publish(f"control.{job_id}", hint(job_id, CANCEL))
        return record

    async def retry(self, job_id: str, *, from_start: bool) -> Record | None:
        """Queue an ended job again, from its last final turn or from the start. Raises `CallerError`."""
        now = self.clock.utc_ms()

        def change(record: Record) -> Write:
            job = record.job
            incomplete = job.coverage is not None and not job.coverage.complete
            if not (job.status in (Status.FAILED, Status.CANCELED) or (job.status == Status.COMPLETED and incomplete)):
                raise CallerError(
                    "not_retryable",
                    "Only a failed or canceled job, or a completed one with gaps in its coverage, can be retried.",
                )
            if from_start:
                job.turn_count = 0
                job.sessions = []
                job.progress.sent_ms = 0
            assert may_become(job.status, Status.QUEUED)
            job.status = Status.QUEUED
            job.finished_at = job.coverage = job.error = None
            seq = record.event_seq
            made = [
                make_event(job_id, seq + 1, "job.restarted", now, {"from_turn": job.turn_count}),
                make_event(job_id, seq + 2, "job.status", now, {"status": Status.QUEUED, "stage": None}),
            ]
            return Write(job, events=made, withdraw_from=0 if from_start else None)

        record = await self._amend(job_id, change)
        if record is not None:
            await self.queue.announce(job_id, record.epoch)
        return record

    async def _amend(self, job_id: str, change: "Change") -> Record | None:
        record = await self.store.amend(job_id, change)
        await self.tell_newest(job_id)
        return record

    async def tell_newest(self, job_id: str) -> None:
        """Tell followers of the newest event; whoever misses the one before it finds it in the log."""
        newest = await self.store.newest_seq(job_id)
        if newest is not None:
            for event in await self.store.events_after(job_id, newest - 1):
                self.bus.publish(f"events.{job_id}", event)

    async def delete(self, job_id: str) -> bool:
        """Remove a job, running or not, with its audio; whether there was one. The rows doom audio that will not go."""
        if not await self.store.delete(job_id):
            return False
        self.bus.publish(f"control.{job_id}", hint(job_id, CANCEL))
        self.bus.publish(f"events.{job_id}", hint(job_id, DELETED))
        try:
            await self.blobs.delete(job_id)
        except OurError as exc:
            log.warning("audio could not be removed; the sweeper will", job_id=job_id, error=exc)
        return True


class Change(Protocol):
    """Decides what to write for a job as it is now."""

    def __call__(self, record: Record) -> Write | None:
        """None leaves it as it is."""


def begin_claim(clock: Clock, record: Record, strikes: int) -> tuple[Job, list[Event]]:
    """What a claim makes of a job: processing, or canceled if that was asked of the worker before, or failed when too
    many claims died on it.
    """
    job, now, seq = record.job, clock.utc_ms(), record.event_seq
    if record.cancel_requested:
        _bury(job)
        _end(record, Status.CANCELED, now)
        return job, [make_event(job.id, seq + 1, "job.canceled", now, {"job": job})]
    if strikes >= MAX_STRIKES:
        lost = [
            make_event(job.id, seq + n, "session.lost", now,
                       {"session_id": session.id, "code": None, "reason": WORKER_GONE, "retry_in_ms": None})
            for n, session in enumerate(_bury(job), 1)
        ]  # fmt: skip
        _end(record, Status.FAILED, now)
        job.error = Failure(
            "too_many_attempts",
            f"{strikes} attempts in a row ended with the worker gone and no new turn. Retry the job to try again.",
            True,
        )
        return job, [*lost, make_event(job.id, seq + len(lost) + 1, "job.failed", now, {"job": job})]
    job.attempt += 1
    job.started_at = job.started_at or rfc3339(now)
    job.status, job.stage = Status.PROCESSING, Stage.VALIDATING
    return job, [make_event(job.id, seq + 1, "job.status", now, {"status": job.status, "stage": job.stage})]


def _bury(job: Job) -> list[Session]:
    """The sessions that dead workers left open, closed now."""
    left = [session for session in job.sessions if session.closed is None]
    for session in left:
        session.closed = Closed(None, WORKER_GONE)
    return left


def _end(record: Record, status: Status, now: int) -> None:
    """End a job that nobody holds."""
    job = record.job
    assert may_become(job.status, status)
    job.status, job.stage, job.finished_at = status, None, rfc3339(now)
    job.coverage = coverage(
        file_ms=job.audio.duration_ms, sessions=job.sessions, finalized=record.finalized, channels=channels(job)
    )


def new_id(utc_ms: int) -> str:
    """A UUIDv7: sortable by time, 74 random bits. https://www.rfc-editor.org/rfc/rfc9562#section-5.7"""
    value = (utc_ms & (2**48 - 1)) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
