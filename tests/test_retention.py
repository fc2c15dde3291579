"""Retention: what is due goes, what is not stays, and audio that was given up is removed whatever comes between."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from service.core.errors import Unavailable
from service.core.job import Claim, Status
from service.intake import new_id
from service.ports import BlobStore
from service.retention import ORPHAN_AGE_SECONDS, SWEEP_SECONDS, Sweeper, due, made_ms, pages, suspects
from service.runtime import SystemClock
from service.store import Store
from service.telemetry import metrics
from service.web.app import create_app
from tests.doubles import add_job, append, start
from tests.kit import Kit, eventually, running
from tests.marked import marked_wav

DAY = 86_400.0
NOW = 1_800_000_000_000


@pytest.fixture
def database(each_database: str) -> str:
    """Of each kind."""
    return each_database


# --- what is due, without I/O ----------------------------------------------------------------------------------------


def test_what_is_due() -> None:
    assert due(NOW, retain_jobs_s=30 * DAY, retain_audio_s=7 * DAY) == (
        NOW - 30 * 86_400_000, NOW - 7 * 86_400_000, NOW - 3_600_000,
    )  # fmt: skip
    assert due(NOW, retain_jobs_s=0, retain_audio_s=0.5)[:2] == (NOW, NOW - 500)
    assert 2 * SWEEP_SECONDS <= 60, "the audio of a deleted job is gone within a minute"


def test_a_key_tells_when_it_was_made_and_whether_it_is_ours() -> None:
    key = new_id(NOW)
    assert made_ms(key) == NOW
    strangers = [
        f"{key}.part",
        key.upper(),
        key.replace("-", ""),
        "lost+found",
        "",
        "00000000-0000-4000-8000-000000000000",
    ]
    assert [made_ms(stranger) for stranger in strangers] == [None] * 6
    old, new = new_id(NOW - 1), new_id(NOW + 1)
    assert suspects([new, key, *strangers, old], NOW) == [old, key]


def test_pages() -> None:
    keys = [str(n) for n in range(1201)]
    assert [len(page) for page in pages(keys)] == [500, 500, 201]
    assert [key for page in pages(keys) for key in page] == keys
    assert list(pages([])) == []


# --- the sweeper on a store ------------------------------------------------------------------------------------------


class Blobs:
    """Audio that may refuse to go."""

    def __init__(self) -> None:
        self.kept: set[str] = set()
        self.stuck: set[str] = set()

    async def delete(self, key: str) -> None:
        if key in self.stuck:
            raise Unavailable
        self.kept.discard(key)

    async def keys(self) -> list[str]:
        return list(self.kept)

    put: object = None  # the rest of a BlobStore, which a sweeper has no use for
    read: object = None
    sweep: object = None
    check: object = None


class Later(SystemClock):
    """The wall's time, and some more."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s

    def utc_ms(self) -> int:
        return super().utc_ms() + int(self.ahead_s * 1000)


class Room:
    """A sweeper with all that it sweeps."""

    def __init__(self, store: Store) -> None:
        self.store, self.blobs, self.clock = store, Blobs(), Later()
        blobs: BlobStore = self.blobs  # type: ignore[assignment]
        self.sweeper = Sweeper(store, blobs, self.clock, retain_jobs_s=30 * DAY, retain_audio_s=7 * DAY)

    async def job(self, status: Status) -> str:
        """A job in that state, with audio."""
        job_id = new_id(self.clock.utc_ms())
        await add_job(self.store, job_id)
        self.blobs.kept.add(job_id)
        if status == Status.PROCESSING:
            assert isinstance(await self.store.claim(job_id, lease_s=60, begin=start), Claim)
        elif status != Status.QUEUED:
            await append(self.store, job_id, (f"job.{status}", {"job": {}}), status=status)
        return job_id

    async def sweep(self, *, after_days: float = 0.0, seconds: float = 0.0) -> None:
        """Once, when so much more time has passed."""
        self.clock.ahead_s += after_days * DAY + seconds
        await self.sweeper.sweep()

    async def left(self) -> set[str]:
        """Jobs that are still there."""
        return {record.job.id for record in await self.store.list(owner=None, limit=100)}


@pytest.fixture
def room(store: Store) -> Room:
    """Nothing in it."""
    return Room(store)


def removals(kind: str) -> float:
    return metrics.registry.get_sample_value("turnwire_retention_removals_total", {"kind": kind}) or 0


async def test_audio_goes_first_and_then_the_job(room: Room) -> None:
    before = removals("audio"), removals("job")
    jobs = {await room.job(status) for status in (Status.COMPLETED, Status.FAILED, Status.CANCELED)}
    await room.sweep(after_days=6.9)
    assert (room.blobs.kept, await room.left()) == (jobs, jobs)
    await room.sweep(after_days=0.2)
    assert (room.blobs.kept, await room.left()) == (set(), jobs)
    await room.sweep(after_days=22.8)
    assert await room.left() == jobs
    await room.sweep(after_days=0.2)
    assert await room.left() == set()
    for job_id in jobs:
        assert await room.store.events_after(job_id, 0) == []
    assert (removals("audio") - before[0], removals("job") - before[1]) == (3, 3)


async def test_a_job_that_has_not_ended_is_kept_for_ever(room: Room) -> None:
    jobs = {await room.job(Status.QUEUED), await room.job(Status.PROCESSING)}
    await room.sweep(after_days=1000)
    assert (room.blobs.kept, await room.left()) == (jobs, jobs)


async def test_a_retry_begins_the_time_again(room: Room) -> None:
    job_id = await room.job(Status.FAILED)
    await append(room.store, job_id, ("job.status", {}), status=Status.QUEUED)
    await room.sweep(after_days=100)
    assert (room.blobs.kept, await room.left()) == ({job_id}, {job_id})


async def test_a_job_retried_while_it_is_looked_at_is_left_alone(room: Room) -> None:
    job_id = await room.job(Status.FAILED)
    at = room.clock.utc_ms() + 1000
    assert await room.store.outbox.ended_by(at, with_audio=True) == [job_id]
    await append(room.store, job_id, ("job.status", {}), status=Status.QUEUED)
    assert not await room.store.outbox.drop_audio(job_id, ended_by_ms=at)
    assert not await room.store.delete(job_id, ended_by_ms=at)
    assert await room.left() == {job_id}
    assert await room.store.outbox.doomed() == []


async def test_audio_that_cannot_be_removed_is_tried_again_and_keeps_no_other(room: Room) -> None:
    stuck, other = [await room.job(Status.COMPLETED) for _ in range(2)]
    room.blobs.stuck = {stuck}
    for job_id in (stuck, other):
        await room.store.delete(job_id)  # as a user does, and then the process dies before it removes the audio
    await room.sweep()
    assert room.blobs.kept == {stuck}
    room.blobs.stuck = set()
    await room.sweep(seconds=20)
    assert room.blobs.kept == set()
    assert await room.store.outbox.doomed() == []


async def test_audio_without_a_job_goes_once_no_upload_can_still_bring_one(room: Room) -> None:
    kept = await room.job(Status.QUEUED)
    orphan = new_id(room.clock.utc_ms())
    room.blobs.kept |= {orphan, "notes.txt", f"{new_id(0)}.part"}
    others = room.blobs.kept - {orphan}
    await room.sweep()
    assert orphan in room.blobs.kept
    await room.sweep(seconds=ORPHAN_AGE_SECONDS + 1)
    assert room.blobs.kept == others
    assert kept in others


# --- the whole service -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def kept_for(tmp_path: Path, *, audio: str, jobs: str) -> AsyncIterator[Kit]:
    """On a clock whose sweeps come twenty times a second."""
    async with running(tmp_path, speed=400, retain_audio=audio, retain_jobs=jobs) as kit:
        yield kit


async def test_audio_is_gone_and_the_job_says_so(tmp_path: Path) -> None:
    async with kept_for(tmp_path, audio="0", jobs="1h") as kit:
        job = await kit.submit(marked_wav(400))
        path = tmp_path / "data" / "audio" / job.id
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert (await kit.follow(job.id))[-1]["type"] == "job.completed"
        await eventually(lambda: not path.exists())
        transport = httpx.ASGITransport(app=create_app(kit.runtime))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            assert (await http.get(f"/jobs/{job.id}")).json()["status"] == "completed"
            assert (await http.get(f"/jobs/{job.id}/transcript.txt")).status_code == 200
            gone = await http.get(f"/jobs/{job.id}/audio")
            assert (gone.status_code, gone.json()["code"]) == (410, "audio_gone")


async def test_a_job_is_gone_with_everything(tmp_path: Path) -> None:
    async with kept_for(tmp_path, audio="1h", jobs="0") as kit:
        job = await kit.submit(marked_wav(400))
        async with asyncio.timeout(10):
            while await kit.runtime.store.get(job.id) is not None:
                await asyncio.sleep(0.01)
        await eventually(lambda: not list((tmp_path / "data" / "audio").iterdir()))


async def test_audio_whose_job_a_crash_prevented_goes_at_the_start(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        job = await kit.submit(marked_wav(400))
    audio = tmp_path / "data" / "audio"
    (audio / new_id(kit.runtime.clock.utc_ms())).write_bytes(b"RIFF")
    async with running(tmp_path):
        assert [path.name for path in audio.iterdir()] == [job.id]


async def test_a_deletion_that_a_crash_cut_off_is_finished_by_the_next_process(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        job, _ = await kit.run(marked_wav(400))
        await kit.runtime.store.delete(job.id)
    path = tmp_path / "data" / "audio" / job.id
    assert path.exists()
    async with running(tmp_path):
        await eventually(lambda: not path.exists())
