"""What callers do to jobs: an upload is there whole or not at all; cancel, retry and delete mean what they answer."""

import asyncio
import contextlib
import hashlib
import sqlite3
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.backends.local import LocalBlobs
from service.backends.memory import MemoryBus, MemoryQueue
from service.core.errors import AudioMissing, CallerError, InvalidAudio, Unavailable
from service.core.job import CANCEL, DELETED, TERMINAL, Claim, Event, Gap, Job, Status
from service.intake import Intake, begin_claim, new_id
from service.runtime import SystemClock
from service.store import MAX_STRIKES, Record, Store, Write
from tests import wavs
from tests.doubles import a_job, a_session, a_turn, add_job, an_event, listening, renew, until

CLOCK = SystemClock()
GOOD = wavs.wav_bytes(frames=16_000)


@dataclass
class Upload:
    """An upload that counts what was read of it."""

    data: bytes
    fields: list[tuple[str, str]] = field(default_factory=list)
    filename: str | None = "talk.wav"
    read: int = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self.data), 1000):
            self.read += 1000
            yield self.data[at : at + 1000]
            await asyncio.sleep(0)


@dataclass
class Office:
    """An intake with real parts."""

    intake: Intake
    store: Store
    queue: MemoryQueue
    bus: MemoryBus
    audio: Path

    async def accept(self, data: bytes = GOOD, *, query: Sequence[tuple[str, str]] = (), **fields: str) -> Job:
        return await self.intake.accept(Upload(data, list(fields.items())), owner="me", query=query, raw_length=None)

    def stored(self) -> list[str]:
        return sorted(path.name for path in self.audio.iterdir())

    async def nothing_left(self) -> bool:
        return not self.stored() and not await self.store.list(owner=None, limit=10) and not self.queue._waiting

    async def events(self, job_id: str) -> list[dict[str, Any]]:
        return [msgspec.json.decode(event.json) for event in await self.store.events_after(job_id, 0, 1000)]

    async def claim(self, job_id: str, lease_s: float = 60) -> Claim:
        held = await self.store.claim(
            job_id, lease_s=lease_s, begin=lambda record, strikes: begin_claim(CLOCK, record, strikes)
        )
        assert isinstance(held, Claim)
        return held

    async def end(self, job_id: str, status: Status, **changes: Any) -> None:
        """As a worker would, with a turn."""
        held = await self.claim(job_id)
        held.job.status, held.job.stage, held.job.turn_count = status, None, 1
        held.job.sessions = [a_session("s1", sent_ms=1000)]
        for name, value in changes.items():
            setattr(held.job, name, value)
        made = [an_event(job_id, held.event_seq + n, kind) for n, kind in enumerate(["turn.final", f"job.{status}"], 1)]
        await self.store.write(held, Write(held.job, events=made, turns=[a_turn()]), after_seq=held.event_seq)


@pytest.fixture
def office(store: Store, tmp_path: Path) -> Office:
    queue, bus = MemoryQueue(CLOCK), MemoryBus()
    intake = Intake(
        store=store, blobs=LocalBlobs(tmp_path / "audio"), queue=queue, bus=bus, clock=CLOCK, default_model="u3-rt-pro",
        max_audio_s=3600, max_queue=5, webhooks_enabled=False,
    )  # fmt: skip
    return Office(intake, store, queue, bus, tmp_path / "audio")


async def heard(queue: asyncio.Queue[Event]) -> Event:
    async with asyncio.timeout(5):
        return await queue.get()


# --- accepting -------------------------------------------------------------------------------------------------------


async def test_an_accepted_upload_is_all_there(office: Office) -> None:
    job = await office.accept(chunk_ms="200", metadata='{"case": 7}')
    assert office.stored() == [job.id]
    kept = (office.audio / job.id).read_bytes()
    assert hashlib.sha256(kept).hexdigest() == job.audio.sha256 == hashlib.sha256(GOOD).hexdigest()
    record = await office.store.get(job.id)
    assert record is not None
    assert record.owner == "me"
    assert msgspec.structs.replace(record.job, queue_position=None) == job
    assert (job.status, job.filename, job.metadata, job.attempt) == ("queued", "talk.wav", {"case": 7}, 0)
    assert (job.audio.bytes, job.audio.duration_ms, job.progress.total_ms) == (len(GOOD), 1000, 1000)
    assert job.options == {"speech_model": "u3-rt-pro", "chunk_ms": 200}
    (event,) = await office.events(job.id)
    assert (event["id"], event["type"], event["status"], event["stage"]) == (1, "job.status", "queued", None)
    assert (await office.queue.next()).job_id == job.id


async def test_each_warning_of_the_upload_is_an_event(office: Office) -> None:
    data = wavs.plain(size=1_000_000)
    job = await office.accept(data, channels="mix")
    events = await office.events(job.id)
    assert [event["type"] for event in events] == ["job.status"] + ["job.warning"] * len(job.warnings)
    assert [(e["code"], e["message"]) for e in events[1:]] == [(w.code, w.message) for w in job.warnings]
    assert "truncated_data" in [notice.code for notice in job.warnings]


async def test_options_come_from_the_url_and_the_form_but_not_twice(office: Office) -> None:
    job = await office.accept(query=[("chunk_ms", "500")], filename="mine.wav")
    assert (job.options["chunk_ms"], job.filename) == (500, "mine.wav")
    with pytest.raises(CallerError) as caught:
        await office.accept(query=[("chunk_ms", "500")], chunk_ms="100")
    assert caught.value.code == "bad_option"


@pytest.mark.parametrize(
    ("data", "fields", "code"),
    [
        (b"GIF89a" + bytes(100_000), {}, "not_wav"),
        (wavs.wav_bytes(rate=4000), {}, "unsupported_rate"),
        (GOOD[:30], {}, "truncated_header"),
        (b"", {}, "empty_audio"),
        (wavs.wav_bytes(channels=2), {}, "unsupported_channels"),
        (GOOD, {"colour": "red"}, "unknown_option"),
        (GOOD, {"chunk_ms": "20"}, "bad_option"),
        (GOOD, {"webhook_url": "https://example.org/"}, "bad_option"),
    ],
)
async def test_a_refused_upload_leaves_nothing(office: Office, data: bytes, fields: dict[str, str], code: str) -> None:
    with pytest.raises(CallerError) as caught:
        await office.intake.accept(Upload(data, list(fields.items())), owner="me", query=[], raw_length=None)
    assert caught.value.code == code
    assert await office.nothing_left()


async def test_a_bad_file_is_refused_at_its_first_bytes(office: Office) -> None:
    upload = Upload(b"\x89PNG" + bytes(1_000_000))
    with pytest.raises(InvalidAudio):
        await office.intake.accept(upload, owner="me", query=[], raw_length=None)
    assert upload.read == 1000


async def test_audio_that_is_too_long_is_refused_at_once_where_the_length_proves_it(office: Office) -> None:
    upload = Upload(wavs.plain(data=bytes(100_000), size=3601 * 32_000))
    with pytest.raises(InvalidAudio) as caught:
        await office.intake.accept(upload, owner="me", query=[], raw_length=3601 * 32_000 + 44)
    assert (caught.value.code, upload.read) == ("too_long", 1000)
    assert await office.nothing_left()


async def test_several_channels_pass_where_the_option_allows_them(office: Office) -> None:
    job = await office.accept(wavs.wav_bytes(channels=2), channels="split")
    assert (job.audio.channels, job.options["channels"]) == (2, "split")


async def test_an_upload_that_breaks_off_leaves_nothing(office: Office) -> None:
    class Broken(Upload):
        async def chunks(self) -> AsyncIterator[bytes]:
            yield GOOD[:1000]
            raise CallerError("truncated_upload", "It broke off.")

    with pytest.raises(CallerError, match="broke off"):
        await office.intake.accept(Broken(b""), owner="me", query=[], raw_length=None)
    assert await office.nothing_left()


async def test_a_full_queue_refuses_before_reading(office: Office) -> None:
    for _ in range(5):
        await office.accept()
    upload = Upload(GOOD)
    with pytest.raises(CallerError) as caught:
        await office.intake.accept(upload, owner="me", query=[], raw_length=None)
    assert (caught.value.code, upload.read) == ("queue_full", 0)
    await office.claim((await office.queue.next()).job_id)
    await office.accept()


async def test_without_a_database_nothing_of_the_upload_is_left(office: Office, tmp_path: Path) -> None:
    lock = sqlite3.connect(tmp_path / "turnwire.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable):
        await office.accept()
    lock.close()
    assert await office.nothing_left()


async def test_an_upload_cancelled_at_any_moment_is_there_whole_or_not_at_all(office: Office) -> None:
    for n in range(60):
        accepting = asyncio.create_task(office.accept())
        if n % 2:  # the audio is kept, the row is on its way
            await until(lambda: any("." not in name for name in office.stored()))
        for _ in range(n * 5):
            await asyncio.sleep(0)
        accepting.cancel()
        await asyncio.wait([accepting])
        await add_job(office.store, "barrier")  # whatever was being committed is through now
        await office.store.delete("barrier")
        rows = [record.job.id for record in await office.store.list(owner="me", limit=10)]
        assert rows == office.stored()
        for job_id in rows:
            await office.intake.delete(job_id)


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_a_queued_job_is_canceled_in_the_answer_and_again(office: Office) -> None:
    job = await office.accept()
    async with listening(office.bus, f"events.{job.id}") as events:
        for _ in range(2):
            record = await office.intake.cancel(job.id)
            assert record is not None
            assert (record.job.status, record.event_seq) == ("canceled", 2)
        assert (await heard(events)).type == "job.canceled"
    assert record is not None
    assert record.job.finished_at is not None
    assert record.job.coverage is not None
    assert record.job.coverage.gaps == [Gap(0, 1000)]
    assert (await office.events(job.id))[-1]["job"]["status"] == "canceled"
    assert await office.store.claim(job.id, lease_s=1, begin=lambda *_: pytest.fail("it is over")) is None


async def test_a_running_job_is_asked_over_the_bus_and_in_the_database(office: Office) -> None:
    job = await office.accept()
    held = await office.claim(job.id)
    async with listening(office.bus, f"control.{job.id}") as control:
        record = await office.intake.cancel(job.id)
        assert (await heard(control)).type == CANCEL
    assert record is not None
    assert record.job.status == "processing"
    assert await renew(office.store, held, lease_s=60, job=None)


async def test_a_cancel_is_never_lost_to_a_job_being_handed_back(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await office.accept()
    held = await office.claim(job.id)
    amend = office.store.amend

    async def amend_then_hand_back(job_id: str, change: Any) -> Record | None:
        record = await amend(job_id, change)
        if record is not None and record.job.status == Status.PROCESSING:
            held.job.status, held.job.stage = Status.QUEUED, None
            await office.store.write(held, Write(held.job, events=[an_event(job.id, 3)]), after_seq=2)
        return record

    monkeypatch.setattr(office.store, "amend", amend_then_hand_back)
    await office.intake.cancel(job.id)
    record = await office.store.get(job.id)
    assert record is not None
    assert record.job.status == Status.CANCELED or record.cancel_requested


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED])
async def test_what_has_ended_otherwise_cannot_be_canceled(office: Office, status: Status) -> None:
    job = await office.accept()
    await office.end(job.id, status)
    with pytest.raises(CallerError) as caught:
        await office.intake.cancel(job.id)
    assert caught.value.code == "not_cancelable"


# --- retrying --------------------------------------------------------------------------------------------------------


async def failed(office: Office) -> Job:
    job = await office.accept()
    await office.end(job.id, Status.FAILED)
    await office.queue.next()
    return job


async def test_a_retry_goes_on_after_the_last_final(office: Office) -> None:
    job = await failed(office)
    record = await office.intake.retry(job.id, from_start=False)
    assert record is not None
    assert (record.job.status, record.job.error, record.job.finished_at, record.job.coverage) == (
        "queued",
        None,
        None,
        None,
    )
    assert (record.job.turn_count, len(record.job.sessions)) == (1, 1)
    restarted, status = (await office.events(job.id))[-2:]
    assert (restarted["type"], restarted["from_turn"]) == ("job.restarted", 1)
    assert (status["type"], status["status"], status["stage"]) == ("job.status", "queued", None)
    assert len(await office.store.turns(job.id)) == 1
    assert (await office.queue.next()).job_id == job.id
    assert (await office.claim(job.id)).finalized == {"s1": 1000}


async def test_a_retry_from_the_start_withdraws_every_turn(office: Office) -> None:
    job = await failed(office)
    record = await office.intake.retry(job.id, from_start=True)
    assert record is not None
    assert (record.job.turn_count, record.job.sessions, record.job.progress.sent_ms) == (0, [], 0)
    assert (await office.events(job.id))[-2]["from_turn"] == 0
    assert await office.store.turns(job.id) == []
    assert (await office.claim(job.id)).finalized == {}


async def test_a_retry_gives_the_job_all_its_attempts_again(office: Office) -> None:
    job = await office.accept()
    for _ in range(MAX_STRIKES):
        await office.claim(job.id, lease_s=-1)
    dead = await office.store.claim(job.id, lease_s=1, begin=lambda r, strikes: begin_claim(CLOCK, r, strikes))
    assert dead is None
    ended = (await office.events(job.id))[-1]
    assert (ended["type"], ended["job"]["error"]["code"], ended["job"]["error"]["retryable"]) == (
        "job.failed", "too_many_attempts", True,
    )  # fmt: skip
    assert ended["job"]["attempt"] == MAX_STRIKES
    assert ended["job"]["coverage"]["complete"] is False
    await office.intake.retry(job.id, from_start=False)
    for _ in range(MAX_STRIKES):
        await office.claim(job.id, lease_s=-1)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("complete", [True, False])
async def test_what_may_be_retried(office: Office, status: Status, complete: bool) -> None:
    job = await office.accept()
    if status == Status.PROCESSING:
        await office.claim(job.id)
    elif status in TERMINAL:
        record = await office.intake.cancel(job.id) if status == Status.CANCELED else None
        if record is None:
            account = msgspec.structs.replace(await _account(office), complete=complete)
            await office.end(job.id, status, coverage=account)
    fine = status in (Status.FAILED, Status.CANCELED) or (status == Status.COMPLETED and not complete)
    if fine:
        again = await office.intake.retry(job.id, from_start=False)
        assert again is not None
        assert again.job.status == "queued"
    else:
        with pytest.raises(CallerError) as caught:
            await office.intake.retry(job.id, from_start=False)
        assert caught.value.code == "not_retryable"


async def _account(office: Office) -> Any:
    other = await office.accept()
    record = await office.intake.cancel(other.id)
    assert record is not None
    return record.job.coverage


# --- deleting, and jobs that are not there ---------------------------------------------------------------------------


async def test_a_deleted_job_is_gone_with_its_audio_and_everyone_is_told(office: Office) -> None:
    job = await office.accept()
    held = await office.claim(job.id)
    async with (
        listening(office.bus, f"control.{job.id}") as control,
        listening(office.bus, f"events.{job.id}") as events,
    ):
        assert await office.intake.delete(job.id)
        assert (await heard(control)).type == CANCEL
        assert (await heard(events)).type == DELETED
    assert await office.store.get(job.id) is None
    assert office.stored() == []
    with pytest.raises(AudioMissing):
        await office.intake.blobs.read(job.id, 0, 1)
    assert not await office.intake.delete(job.id)
    assert held.job.id == job.id


async def test_a_deletion_whose_audio_will_not_go_is_a_deletion(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise Unavailable

    job = await office.accept()
    monkeypatch.setattr(LocalBlobs, "delete", fail)
    assert await office.intake.delete(job.id)
    assert await office.store.get(job.id) is None
    assert await office.store.outbox.doomed() == [job.id], "what the sweeper removes"


async def test_nobody_has_no_job(office: Office) -> None:
    assert await office.intake.cancel("nobody") is None
    assert await office.intake.retry("nobody", from_start=False) is None
    assert not await office.intake.delete("nobody")
    assert not office.queue._waiting


# --- claims and names ------------------------------------------------------------------------------------------------


def record_of(job: Job) -> Record:
    return Record(job, "me", 0, 7, False, 0)


def test_a_claim_counts_the_attempt_and_dates_the_first() -> None:
    job, (event,) = begin_claim(CLOCK, record_of(a_job()), 0)
    assert (job.status, job.stage, job.attempt) == ("processing", "validating", 1)
    first = job.started_at
    assert first is not None
    assert (event.seq, event.type) == (8, "job.status")
    again, _ = begin_claim(CLOCK, record_of(job), 1)
    assert (again.attempt, again.started_at) == (2, first)


@pytest.mark.parametrize("strikes", range(6))
def test_the_attempts_are_bounded(strikes: int) -> None:
    job, (event,) = begin_claim(CLOCK, record_of(a_job(attempt=strikes)), strikes)
    assert (job.status == "failed") == (strikes >= MAX_STRIKES)
    assert (event.type == "job.failed") == (strikes >= MAX_STRIKES)


def test_ids_are_uuids_of_version_7_that_sort_by_time() -> None:
    now = CLOCK.utc_ms()
    ids = [new_id(now + n // 3) for n in range(300)]
    for n, text in enumerate(ids):
        parsed = uuid.UUID(text)
        assert (parsed.version, parsed.variant, str(parsed)) == (7, uuid.RFC_4122, text)
        assert parsed.int >> 80 == now + n // 3
    assert [sorted(ids)[n][:13] for n in range(300)] == [text[:13] for text in ids]
    assert len({text[14:] for text in ids}) == 300
    noise = [uuid.UUID(new_id(now)).int & ~(0xF000_C000 << 48) & (2**80 - 1) for _ in range(200)]
    assert all(any(n >> bit & 1 for n in noise) for bit in (0, 30, 61, 64, 75)), "random from end to end"


async def test_the_upload_is_read_no_faster_than_it_is_kept(office: Office) -> None:
    """What is not yet on disk is bounded, however fast the client is."""
    upload = Upload(wavs.plain(data=bytes(12_000_000)))
    accepting = asyncio.create_task(office.intake.accept(upload, owner="me", query=[], raw_length=None))
    ahead, kept = 0, [0]

    def look() -> bool:
        nonlocal ahead
        with contextlib.suppress(FileNotFoundError):  # just being given its name
            kept[0] = sum(path.stat().st_size for path in office.audio.iterdir())
        ahead = max(ahead, upload.read - kept[0])
        return accepting.done()

    await until(look, 30)
    assert (await accepting).audio.bytes == len(upload.data)
    assert ahead < 3 * (1 << 20)
