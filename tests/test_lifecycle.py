"""A job through all that can happen to it on our side: cancel, retry, delete, drain, crash, a stalled database, split."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from service.backends.memory import MemoryBus
from service.core.errors import AudioMissing, CallerError, Unavailable
from service.core.job import Event, Job
from service.ports import BlobStore
from service.runtime import SystemClock, open_runtime
from service.sandbox import faults as f
from service.worker import start_worker
from tests.kit import BytesUpload, Kit, eventually, running, spoken, statuses
from tests.marked import WORD_MS, blocks, marked_pcm, marked_wav, words
from tests.test_faults import plan
from tests.wavs import chunk, fmt, riff

DURATION_MS = 6000


async def job_of(kit: Kit, job_id: str) -> Job:
    record = await kit.runtime.store.get(job_id)
    assert record is not None
    return record.job


# --- cancel ----------------------------------------------------------------------------------------------------------


async def test_a_queued_job_is_canceled_in_the_answer(tmp_path: Path) -> None:
    async with running(tmp_path, max_streams=1) as kit:
        first = await kit.submit(marked_wav(DURATION_MS))
        await kit.follow(first.id, until="session.begin")
        second = await kit.submit(marked_wav(DURATION_MS))
        record = await kit.runtime.store.get(second.id)
        assert record is not None
        assert record.job.queue_position == 1
        canceled = await kit.runtime.intake.cancel(second.id)
        assert canceled is not None
        assert canceled.job.status == "canceled"
        assert [e["type"] for e in await kit.follow(second.id)] == ["job.status", "job.canceled"]
        again = await kit.runtime.intake.cancel(second.id)
        assert again is not None
        assert again.job.status == "canceled"
        assert (await kit.follow(first.id))[-1]["type"] == "job.completed"
        assert len(kit.sandbox.sessions) == 1


async def test_a_running_job_gets_terminate_and_keeps_its_last_words(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        job = await kit.submit(marked_wav(DURATION_MS))
        await kit.follow(job.id, until="turn.final")
        await eventually(lambda: kit.sandbox.sessions[0].audio_ms > 1300)
        await kit.runtime.intake.cancel(job.id)
        events = await kit.follow(job.id)
        assert events[-1]["type"] == "job.canceled"
        said = spoken(events)
        assert len(said) >= 6
        assert said == words(len(said))
        assert kit.sandbox.sessions[0].ended_by == "terminated"
        assert not any(event["type"] == "session.lost" for event in events)
        ended = await job_of(kit, job.id)
        assert ended.coverage is not None
        assert not ended.coverage.complete
        with pytest.raises(CallerError) as refused:
            await kit.runtime.intake.cancel((await kit.run(marked_wav(400)))[0].id)
        assert refused.value.code == "not_cancelable"


@pytest.mark.parametrize(
    "fault",
    [
        f.HangUpgrade(seconds=60),
        f.NoBegin(),
        f.Refuse(status=503),
        f.NoTermination(then="hang"),
        f.StopReading(at_ms=500),
        f.Silent(at_ms=500),
    ],
    ids=["connecting", "no Begin", "reconnecting", "finalizing", "stalled", "silent"],
)
async def test_a_cancel_takes_effect_in_any_stage(tmp_path: Path, fault: f.Step) -> None:
    async with running(tmp_path, faults=plan(fault, session="*")) as kit:
        job = await kit.submit(marked_wav(1000))
        await eventually(lambda: kit.sandbox.knocks > 0)
        if isinstance(fault, f.NoTermination):
            await eventually(lambda: kit.sandbox.sessions[0].terminate_at is not None)
        async with asyncio.timeout(8):
            await kit.runtime.intake.cancel(job.id)
            events = await kit.follow(job.id)
        assert events[-1]["type"] == "job.canceled"


async def test_a_cancel_the_bus_lost_is_found_in_the_database(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        job = await kit.submit(marked_wav(20_000))
        await kit.follow(job.id, until="turn.final")
        await kit.runtime.store.request_cancel(job.id)
        assert (await kit.follow(job.id))[-1]["type"] == "job.canceled"


# --- retry and delete ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_start", [False, True])
async def test_retry_goes_on_or_begins_again(tmp_path: Path, from_start: bool) -> None:
    async with running(tmp_path, faults=plan(f.ErrorFrame(at_ms=2500, name="bad_key"))) as kit:
        job, events = await kit.run(marked_wav(DURATION_MS))
        assert (job.status, job.turn_count) == ("failed", 3)
        await kit.runtime.intake.retry(job.id, from_start=from_start)
        events += await kit.follow(job.id, after=events[-1]["id"])
        assert spoken(events) == words(30)
        assert [e["id"] for e in events if e["id"]] == list(range(1, events[-1]["id"] + 1))
        restarted = next(e for e in events if e["type"] == "job.restarted")
        assert restarted["from_turn"] == (0 if from_start else 3)
        done = await job_of(kit, job.id)
        assert (done.status, done.error, done.attempt) == ("completed", None, 2)
        assert done.coverage is not None
        assert done.coverage.complete
        turns = await kit.runtime.store.turns(job.id)
        assert [turn.index for turn in turns] == list(range(8))
        assert kit.sandbox.sessions[1].audio_ms == pytest.approx(DURATION_MS if from_start else DURATION_MS - 2400)
        with pytest.raises(CallerError) as refused:
            await kit.runtime.intake.retry(job.id, from_start=True)
        assert refused.value.code == "not_retryable"


async def test_deleting_a_running_job_stops_it_and_ends_its_followers(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        job = await kit.submit(marked_wav(20_000))
        following = asyncio.create_task(kit.follow(job.id))
        await kit.follow(job.id, until="turn.final")
        assert await kit.runtime.intake.delete(job.id)
        events = await following
        assert events[-1]["type"] not in ("job.completed", "job.failed")
        assert await kit.runtime.store.get(job.id) is None
        assert not (tmp_path / "data" / "audio" / job.id).exists()
        await eventually(lambda: kit.sandbox.sessions[0].closed_at is not None)
        assert not await kit.runtime.intake.delete(job.id)
        assert (await kit.run(marked_wav(400)))[0].status == "completed"


# --- stopping and dying ----------------------------------------------------------------------------------------------


async def test_a_drain_hands_the_job_back_and_the_next_process_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        job = await kit.submit(marked_wav(DURATION_MS))
        await kit.follow(job.id, until="turn.final")
        await eventually(lambda: kit.sandbox.sessions[0].audio_ms > 1300)
        await kit.worker.drain()
        left = await job_of(kit, job.id)
        assert (left.status, left.stage) == ("queued", None)
        assert kit.sandbox.sessions[0].ended_by == "terminated"
    async with running(tmp_path) as kit:
        events = await kit.follow(job.id)
        assert spoken(events) == words(30)
        assert not any(event["type"] == "session.lost" for event in events)
        assert (await job_of(kit, job.id)).attempt == 2


async def crash(stack: AsyncExitStack, kit: Kit) -> None:
    """What SIGKILL leaves behind, in this process: nothing is drained, nothing written, the lock is free."""
    for task in asyncio.all_tasks():
        if task.get_name().startswith(("job-", "worker")):
            task.cancel()
    await stack.aclose()


async def test_a_job_whose_worker_died_goes_on_from_its_last_final(tmp_path: Path) -> None:
    stack = AsyncExitStack()
    kit = await stack.enter_async_context(running(tmp_path))
    job = await kit.submit(marked_wav(DURATION_MS))
    await kit.follow(job.id, until="turn.final")
    await crash(stack, kit)
    async with running(tmp_path) as kit:
        events = await kit.follow(job.id)
        assert spoken(events) == words(30)
        lost = [event for event in events if event["type"] == "session.lost"]
        assert [event["reason"] for event in lost] == ["the worker of this job was gone"]
        assert (await job_of(kit, job.id)).attempt == 2


async def test_a_cancel_outlives_the_worker_it_was_asked_of(tmp_path: Path) -> None:
    stack = AsyncExitStack()
    kit = await stack.enter_async_context(running(tmp_path))
    job = await kit.submit(marked_wav(DURATION_MS))
    await kit.follow(job.id, until="turn.final")
    for task in asyncio.all_tasks():
        if task.get_name() == "heartbeat":
            task.cancel()
    assert await kit.runtime.store.request_cancel(job.id)
    await crash(stack, kit)
    async with running(tmp_path) as kit:
        events = await kit.follow(job.id)
        assert events[-1]["type"] == "job.canceled"
        assert kit.sandbox.sessions == []


async def begun(kit: Kit, job_id: str, times: int) -> None:
    """Wait until a job has begun that many sessions."""
    async with aclosing(kit.runtime.feed.follow(job_id)) as events:
        async for event in events:
            times -= event.type == "session.begin"
            if not times:
                return


async def test_a_job_that_kills_its_worker_again_and_again_fails(tmp_path: Path) -> None:
    job_id = ""
    for attempt in range(3):
        stack = AsyncExitStack()
        kit = await stack.enter_async_context(running(tmp_path))
        if not job_id:
            job_id = (await kit.submit(marked_wav(DURATION_MS))).id
        await begun(kit, job_id, attempt + 1)
        await crash(stack, kit)
    async with running(tmp_path) as kit:
        events = await kit.follow(job_id)
        assert events[-1]["type"] == "job.failed"
        assert events[-1]["job"]["error"]["code"] == "too_many_attempts"
        lost = [event for event in events if event["type"] == "session.lost"]
        begun_ids = [event["session_id"] for event in events if event["type"] == "session.begin"]
        assert [event["session_id"] for event in lost] == begun_ids
        assert [event["retry_in_ms"] for event in lost] == [0, 0, None]
        assert all(session["closed"] for session in events[-1]["job"]["sessions"])
        await kit.runtime.intake.retry(job_id, from_start=False)
        assert (await kit.follow(job_id))[-1]["type"] == "job.completed"


async def test_a_retry_sends_again_what_upstream_denies_to_have_heard(tmp_path: Path) -> None:
    """The first session ends properly, but counts two of the six seconds it was sent."""
    count = '{"type": "Termination", "audio_duration_seconds": 2, "session_duration_seconds": 6}'
    async with running(tmp_path, faults=f.FaultPlan({"1": [f.Send(text=count, on="terminate")]})) as kit:
        job, events = await kit.run(marked_wav(DURATION_MS))
        assert job.status == "completed"
        assert job.coverage is not None
        assert (job.coverage.complete, job.coverage.gaps, len(job.sessions)) == (False, [], 1)
        kept = spoken(events)
        await kit.runtime.intake.retry(job.id, from_start=False)
        events = await kit.follow(job.id)
        ended = events[-1]["job"]
        assert (ended["status"], ended["coverage"]["complete"], len(ended["sessions"])) == ("completed", True, 2)
        again = [event for event in events if event["type"] == "session.begin"][1]
        assert again["offset_ms"] == len(kept) * WORD_MS, "from the last final turn"
        assert spoken(events) == words(30), "every word once"


async def test_two_processes_never_share_a_data_directory(tmp_path: Path) -> None:
    from service.settings import SettingsError

    async with running(tmp_path):
        with pytest.raises(SettingsError, match="another Turnwire process"):
            async with running(tmp_path):
                pass


def lock_out_writers(path: Path) -> sqlite3.Connection:
    """Holds the write lock until `close`. Waits for it, so not on the event loop that the present holder needs."""
    lock = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=20)
    lock.execute("BEGIN EXCLUSIVE")
    return lock


# --- slow ------------------------------------------------------------------------------------------------------------


async def test_a_stalled_database_costs_no_session_and_no_turn(tmp_path: Path) -> None:
    """A9, B5: the writer is locked out, the audio goes on, and what was said is written later."""
    async with running(tmp_path, speed=20) as kit:
        job = await kit.submit(marked_wav(40_000))
        await kit.follow(job.id, until="turn.final")
        lock = await asyncio.to_thread(lock_out_writers, tmp_path / "data" / "turnwire.db")
        before = kit.sandbox.sessions[0].audio_ms
        with pytest.raises(Exception, match="database"):
            await kit.submit(marked_wav(400))
        await eventually(lambda: kit.sandbox.sessions[0].audio_ms >= min(39_000, before + 20_000))
        lock.close()
        events = await kit.follow(job.id)
        assert spoken(events) == words(200)
        assert len(kit.sandbox.sessions) == 1


async def test_a_pause_of_the_recorder_pauses_the_audio_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound itself, made small: with it reached no audio is sent until the database is back."""
    monkeypatch.setattr("service.transcription.recorder.MAX_PENDING_EVENTS", 3)
    async with running(tmp_path) as kit:
        job = await kit.submit(marked_wav(DURATION_MS))
        await kit.follow(job.id, until="turn.final")
        lock = await asyncio.to_thread(lock_out_writers, tmp_path / "data" / "turnwire.db")
        session = kit.sandbox.sessions[0]
        paused_at = -1.0
        while session.audio_ms != paused_at:
            paused_at = session.audio_ms
            await asyncio.sleep(0.15)
        assert paused_at < DURATION_MS
        lock.close()
        events = await kit.follow(job.id)
        assert spoken(events) == words(30)
        assert len(kit.sandbox.sessions) == 1


# --- channels --------------------------------------------------------------------------------------------------------


def stereo(duration_ms: int) -> bytes:
    """Left: the marks of the file; right: the same, 5,000 blocks on."""
    left = np.frombuffer(marked_pcm(duration_ms), "<i2")
    right = np.frombuffer(marked_pcm(duration_ms, first=5000), "<i2")
    return riff(fmt(channels=2), chunk(b"data", np.column_stack([left, right]).tobytes()))


async def test_split_runs_one_session_per_channel_on_one_clock(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        job, events = await kit.run(stereo(4000), channels="split")
        assert job.status == "completed"
        assert spoken(events, channel=0) == words(20)
        assert spoken(events, channel=1) == [f"w{n}" for n in range(250, 270)]
        assert {s.channel for s in job.sessions} == {0, 1}
        starts = [session.arrivals[0][0] for session in kit.sandbox.sessions]
        assert abs(starts[0] - starts[1]) < 0.05
        assert job.coverage is not None
        assert job.coverage.complete


async def test_each_channel_resumes_by_itself(tmp_path: Path) -> None:
    async with running(tmp_path, faults=plan(f.Drop(at_ms=1500))) as kit:
        job, events = await kit.run(stereo(4000), channels="split")
        assert job.status == "completed"
        assert (spoken(events, channel=0), spoken(events, channel=1)) == (words(20), [f"w{n}" for n in range(250, 270)])
        assert len(kit.sandbox.sessions) == 3
        heard = {n for session in kit.sandbox.sessions for n in blocks(bytes(session.audio))}
        assert heard == {*range(400), *range(5000, 5400)}


async def test_one_channel_refused_ends_the_other_with_what_it_said(tmp_path: Path) -> None:
    async with running(tmp_path, faults=f.FaultPlan({"2": [f.ErrorFrame(at_ms=1500, name="bad_key")]})) as kit:
        job, events = await kit.run(stereo(4000), channels="split")
        assert job.error is not None
        assert job.error.code == "upstream_auth"
        other = next(session for session in kit.sandbox.sessions if session.error is None)
        assert other.ended_by == "terminated"
        assert all(len(spoken(events, channel=channel)) >= 4 for channel in (0, 1))


async def test_mix_and_first_send_one_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        job, events = await kit.run(stereo(2000), channels="first")
        assert spoken(events) == words(10)
        assert job.audio.converted
        assert [notice.code for notice in job.warnings] == ["converted"]


# --- a corrupt or missing blob ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "gone", "cut"])
async def test_audio_is_validated_again_before_it_is_streamed(tmp_path: Path, damage: str) -> None:
    async with running(tmp_path, max_streams=1) as kit:
        blocker = await kit.submit(marked_wav(2000))
        job = await kit.submit(marked_wav(2000))
        path = tmp_path / "data" / "audio" / job.id
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[-1] ^= 1
            path.write_bytes(data)
        elif damage == "cut":
            path.write_bytes(data[:-100])
        else:
            path.unlink()
        await kit.follow(blocker.id)
        end = (await kit.follow(job.id))[-1]
        assert end["type"] == "job.failed"
        assert end["job"]["error"]["code"] == ("audio_missing" if damage == "gone" else "audio_corrupt")
        assert len(kit.sandbox.sessions) == 1


class Shelf:
    """A blob store of which reading can be made to fail."""

    def __init__(self, inner: BlobStore) -> None:
        self._inner = inner
        self.read_seconds = inner.read_seconds
        self.failure: type[Exception] | None = None
        self.failed = 0

    async def read(self, key: str, start: int, length: int) -> bytes:
        if self.failure is not None:
            self.failed += 1
            raise self.failure
        return await self._inner.read(key, start, length)


def shelve(kit: Kit) -> Shelf:
    """Let the worker of `kit` read from a `Shelf`."""
    runtime = kit.worker._runtime
    shelf = Shelf(runtime.blobs)
    transcriber = replace(runtime.transcriber, blobs=cast("BlobStore", shelf))
    kit.worker._runtime = replace(runtime, transcriber=transcriber)
    return shelf


@pytest.mark.parametrize("streaming", [False, True], ids=["validating", "streaming"])
async def test_an_audio_store_that_is_away_costs_no_word(tmp_path: Path, streaming: bool) -> None:
    async with running(tmp_path) as kit:
        shelf = shelve(kit)
        if not streaming:
            shelf.failure = Unavailable
        job = await kit.submit(marked_wav(10_000))
        if streaming:
            await kit.follow(job.id, until="turn.final")
            shelf.failure = Unavailable
        await eventually(lambda: shelf.failed >= 3)
        shelf.failure = None
        events = await kit.follow(job.id)
        assert events[-1]["type"] == "job.completed"
        assert spoken(events) == words(50)


async def test_a_cancel_takes_effect_while_the_audio_store_is_away(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        shelf = shelve(kit)
        shelf.failure = Unavailable
        job = await kit.submit(marked_wav(2000))
        await eventually(lambda: shelf.failed > 0)
        await kit.runtime.intake.cancel(job.id)
        assert (await kit.follow(job.id))[-1]["type"] == "job.canceled"


async def test_a_bus_that_cannot_be_subscribed_to_costs_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subscribe, refused = MemoryBus.subscribe, 0

    def away(bus: MemoryBus, topic: str, hear: Callable[[Event], None]) -> AbstractAsyncContextManager[None]:
        nonlocal refused
        if topic.startswith("control."):
            refused += 1
            raise Unavailable
        return subscribe(bus, topic, hear)

    monkeypatch.setattr(MemoryBus, "subscribe", away)
    async with running(tmp_path) as kit:
        assert (await kit.run(marked_wav(4000)))[0].status == "completed"
        assert refused > 1


async def test_audio_that_goes_missing_while_it_is_streamed_is_named_as_such(tmp_path: Path) -> None:
    async with running(tmp_path) as kit:
        shelf = shelve(kit)
        job = await kit.submit(marked_wav(20_000))
        await kit.follow(job.id, until="turn.final")
        shelf.failure = AudioMissing
        end = (await kit.follow(job.id))[-1]
        assert (end["type"], end["job"]["error"]["code"]) == ("job.failed", "audio_missing")


# --- pacing ----------------------------------------------------------------------------------------------------------


async def test_sessions_per_minute_are_paced(tmp_path: Path) -> None:
    async with running(tmp_path, sessions_per_minute=30) as kit:
        jobs = [await kit.submit(marked_wav(400)) for _ in range(4)]
        courses = [statuses(await kit.follow(job.id)) for job in jobs]
        assert sum(("processing", "waiting_for_capacity") in course for course in courses) >= 2


async def test_waiting_for_the_pace_does_not_use_up_the_patience_with_upstream(tmp_path: Path) -> None:
    faults = f.FaultPlan({"3": [f.Refuse(status=503)]})
    async with running(tmp_path, faults=faults, sessions_per_minute=6, upstream_patience=5) as kit:
        jobs = [await kit.submit(marked_wav(400)) for _ in range(3)]
        for job in jobs:
            assert (await kit.follow(job.id))[-1]["type"] == "job.completed"
        assert kit.sandbox.knocks == 4


async def test_a_job_is_canceled_while_it_waits_for_the_pace(tmp_path: Path) -> None:
    async with running(tmp_path, sessions_per_minute=1) as kit:
        await kit.run(marked_wav(400))
        job = await kit.submit(marked_wav(400))
        async for event in kit.runtime.feed.follow(job.id, 0):
            if b"waiting_for_capacity" in event.json:
                await kit.runtime.intake.cancel(job.id)
        assert (await job_of(kit, job.id)).status == "canceled"
        assert kit.sandbox.knocks == 1


async def test_streams_are_bounded_and_queued_jobs_wait_their_turn(tmp_path: Path) -> None:
    async with running(tmp_path, max_streams=2) as kit:
        jobs = [await kit.submit(marked_wav(600)) for _ in range(6)]
        most = 0
        for job in jobs:
            await kit.follow(job.id)
            most = max(most, kit.sandbox.active)
        assert most <= 2
        assert len(kit.sandbox.sessions) == 6


async def test_without_a_worker_a_job_waits_in_the_database(tmp_path: Path) -> None:
    from service.settings import load_settings

    settings = load_settings(data_dir=tmp_path / "data", upstream_url="ws://127.0.0.1:1/v3/ws")
    async with open_runtime(settings, clock=SystemClock(10)) as runtime:
        job = await runtime.intake.accept(BytesUpload(marked_wav(400), {}), owner="", query=[], raw_length=None)
        assert await runtime.store.stranded() == [(job.id, 0)]
    async with AsyncExitStack() as stack:
        runtime = await stack.enter_async_context(open_runtime(settings, clock=SystemClock(10)))
        await start_worker(runtime, stack)
        async for event in runtime.feed.follow(job.id):
            if event.type == "session.lost":
                break


# --- broken ----------------------------------------------------------------------------------------------------------


async def test_a_sender_that_raises_fails_its_job_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object, __: int) -> bytes:
        raise ZeroDivisionError

    async with running(tmp_path) as kit:
        with monkeypatch.context() as patch:
            patch.setattr("service.transcription.sender.Source.take", broken)
            job, _ = await kit.run(marked_wav(1600))
        assert job.status == "failed"
        assert job.error is not None
        assert (job.error.code, job.error.retryable) == ("internal", True)
        assert (await kit.run(marked_wav(1600)))[0].status == "completed"
