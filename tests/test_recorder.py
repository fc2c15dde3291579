"""The recorder: nothing is shown before it is kept, nothing kept is lost or doubled, and the store may take its time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from service.backends.memory import MemoryBus
from service.core.coverage import coverage
from service.core.errors import Fenced
from service.core.job import Claim, Closed, Coverage, Event, Failure, Job, Partial, Stage, Status, Turn
from service.core.transcript import Folded
from service.feed import Feed
from service.runtime import SystemClock
from service.store import Busy, Store
from service.transcription import recorder as module
from service.transcription.recorder import Recorder
from tests.doubles import a_job, a_session, a_turn, add_job, an_event, append, beat, listening, start, until

CLOCK = SystemClock()


class Desk:
    """A recorder at work, and everything it has told."""

    def __init__(self, store: Store, bus: MemoryBus, claim: Claim) -> None:
        self.recorder = Recorder(claim, store, bus, CLOCK)
        self.told: list[Event] = []
        self.heard: asyncio.Queue[Event] = asyncio.Queue()
        self.looking = False

    def bodies(self, *types: str) -> list[dict[str, Any]]:
        return [msgspec.json.decode(event.json) for event in self.told if not types or event.type in types]

    def types(self) -> list[str]:
        return [event.type for event in self.told]


@asynccontextmanager
async def recording(store: Store, *, claim: Claim | None = None, slow: bool = False) -> AsyncIterator[Desk]:
    """A recorder of job j1 that has written everything when the context ends. `slow`: it starts only then."""
    bus = MemoryBus()
    if claim is None:
        await add_job(store)
        claimed = await store.claim("j1", lease_s=60, begin=start)
        assert isinstance(claimed, Claim)
        claim = claimed
    desk = Desk(store, bus, claim)

    async def note() -> None:
        async with listening(bus, "events.j1") as desk.heard:
            while True:
                event = await desk.heard.get()
                desk.looking = True
                if event.seq is not None:
                    kept = await store.newest_seq("j1")
                    assert kept is None or kept >= event.seq, "it was shown before it was kept"
                desk.told.append(event)
                desk.looking = False

    async with asyncio.timeout(20):
        noting = asyncio.create_task(note())
        await until(lambda: bool(bus._topics))
        writing = None if slow else asyncio.create_task(desk.recorder.run())
        yield desk
        desk.recorder.close()
        await (writing or desk.recorder.run())
        await until(lambda: noting.done() or (desk.heard.empty() and not desk.looking))
        noting.cancel()
        await asyncio.wait([noting])
        if not noting.cancelled():
            noting.result()


def final(turn: Turn) -> Folded:
    return Folded("turn.final", turn)


def revised(turn: Turn) -> Folded:
    return Folded("turn.revised", turn)


def partial(order: int, text: str = "so far", session_id: str = "s1") -> Folded:
    shown = Partial(
        index=99, transcript=text, stable_words=0, start_ms=0, session_id=session_id, turn_order=order, channel=None
    )
    return Folded("turn.partial", shown)


def complete() -> Coverage:
    return coverage(
        file_ms=10, sessions=[a_session(sent_ms=10, audio_duration_seconds=0.0)], finalized={}, channels=[None]
    )


async def settled(desk: Desk) -> None:
    await until(lambda: desk.recorder._settled and not desk.recorder._partials)


# --- kept, then shown ------------------------------------------------------------------------------------------------


async def test_everything_that_happens_is_kept_in_order_and_then_told(store: Store) -> None:
    async with recording(store) as desk:
        recorder = desk.recorder
        recorder.stage(Stage.CONNECTING)
        recorder.stage(Stage.CONNECTING)
        recorder.session_begin(a_session("s1", offset_ms=300, channel=None))
        recorder.stage(Stage.STREAMING)
        recorder.folded(final(a_turn(0)))
        await settled(desk)
        recorder.folded(revised(a_turn(0, text="Hello there.")))
        recorder.warn("odd", "something odd")
        recorder.warn("odd", "said once")
        recorder.session_lost(recorder.job.sessions[0], Closed(3005, "gone"), retry_in_s=1.25)
        recorder.session_lost(None, Closed(None, "unreachable"), retry_in_s=None)
        recorder.finish(Status.COMPLETED, coverage=complete())
    log = await store.events_after("j1", 2)
    assert [event for event in desk.told if event.seq is not None] == log
    assert [event.seq for event in log] == list(range(3, 12))
    assert [event.type for event in log] == [
        "job.status", "session.begin", "job.status", "turn.final", "turn.revised", "job.warning",
        "session.lost", "session.lost", "job.completed",
    ]  # fmt: skip
    begin, lost, never = desk.bodies("session.begin", "session.lost")
    assert (begin["session_id"], begin["model"], begin["offset_ms"], begin["channel"]) == ("s1", "u3-rt-pro", 300, None)
    assert (lost["session_id"], lost["code"], lost["reason"], lost["retry_in_ms"]) == ("s1", 3005, "gone", 1250)
    assert (never["session_id"], never["code"], never["retry_in_ms"]) == (None, None, None)
    assert [w["code"] for w in desk.bodies("job.completed")[0]["job"]["warnings"]] == ["odd"]
    assert await store.turns("j1") == [a_turn(0, text="Hello there.")]
    record = await store.get("j1")
    assert record is not None
    assert (record.job.status, record.job.stage, record.job.turn_count) == ("completed", None, 1)
    assert record.job.sessions[0].closed == Closed(3005, "gone")
    assert msgspec.json.decode(msgspec.json.encode(record.job)) == desk.bodies("job.completed")[0]["job"]


async def test_what_gathers_while_the_store_is_busy_is_one_commit_in_order(store: Store) -> None:
    async with recording(store, slow=True) as desk:
        for index in range(80):
            desk.recorder.folded(final(a_turn(index)))
            desk.recorder.folded(revised(a_turn(index, text=f"turn {index}")))
    assert [event.seq for event in desk.told] == list(range(3, 163))
    assert [turn.transcript for turn in await store.turns("j1")] == [f"turn {index}" for index in range(80)]


async def test_a_revision_of_a_turn_whose_commit_is_under_way_is_not_lost(store: Store) -> None:
    async with recording(store) as desk:
        for index in range(40):
            desk.recorder.folded(final(a_turn(index)))
            for _ in range(index % 5):
                await asyncio.sleep(0)
            desk.recorder.folded(revised(a_turn(index, text=f"turn {index}")))
    assert [turn.transcript for turn in await store.turns("j1")] == [f"turn {index}" for index in range(40)]
    assert desk.types() == ["turn.final", "turn.revised"] * 40


async def test_a_successor_goes_on_where_the_dead_one_stopped(store: Store) -> None:
    await add_job(store)
    dead = await store.claim("j1", lease_s=-1, begin=start)
    assert isinstance(dead, Claim)
    async with recording(store, claim=dead) as desk:
        desk.recorder.session_begin(a_session("s1"))
        desk.recorder.folded(final(a_turn(0, end_ms=4000)))
    heir = await store.claim("j1", lease_s=60, begin=start)
    assert isinstance(heir, Claim)
    async with recording(store, claim=heir) as desk:
        assert desk.recorder.finalized == {"s1": 4000}
        desk.recorder.folded(final(a_turn(1, session_id="s2")))
    assert [event.seq for event in await store.events_after("j1", 0)] == [1, 2, 3, 4, 5, 6]
    assert [turn.index for turn in await store.turns("j1")] == [0, 1]


# --- partials --------------------------------------------------------------------------------------------------------


async def test_of_many_partials_the_newest_is_told_with_the_index_that_is_free(store: Store) -> None:
    async with recording(store, slow=True) as desk:
        desk.recorder.folded(final(a_turn(0)))
        for n in range(50):
            desk.recorder.folded(partial(1, f"text {n}"))
        desk.recorder.folded(partial(0, "another channel", session_id="s2"))
    assert desk.types() == ["turn.final", "turn.partial", "turn.partial"]
    newest, other = desk.bodies("turn.partial")
    assert (newest["turn"]["transcript"], newest["turn"]["index"], newest["id"]) == ("text 49", 1, None)
    assert other["turn"]["session_id"] == "s2"
    assert [event.after_seq for event in desk.told[1:]] == [3, 3]


@pytest.mark.parametrize(
    "over",
    [
        lambda recorder: recorder.folded(final(a_turn(0))),
        lambda recorder: recorder.session_lost(recorder.job.sessions[0], Closed(None, "gone"), retry_in_s=0),
        lambda recorder: recorder.finish(Status.FAILED, coverage=complete(), error=Failure("internal", "m", True)),
    ],
    ids=["final", "lost", "end"],
)
async def test_a_partial_that_is_over_is_never_told_again(store: Store, over: Callable[[Recorder], None]) -> None:
    async with recording(store, slow=True) as desk:
        desk.recorder.session_begin(a_session("s1"))
        desk.recorder.folded(partial(0))
        over(desk.recorder)
        desk.recorder.tell_again()
    assert "turn.partial" not in desk.types()


async def test_a_partial_of_the_next_turn_outlives_a_late_final_of_the_one_before(store: Store) -> None:
    async with recording(store, slow=True) as desk:
        desk.recorder.stage(Stage.STREAMING)
        desk.recorder.folded(partial(1, "next"))
        desk.recorder.folded(final(a_turn(0)))
    assert desk.types() == ["job.status", "turn.final", "turn.partial"]
    assert desk.bodies("turn.partial")[0]["turn"]["index"] == 1


async def test_a_partial_is_told_at_once_where_nothing_waits_to_be_kept(store: Store) -> None:
    async with recording(store) as desk:
        await settled(desk)
        desk.recorder.folded(partial(0))
        assert desk.heard.qsize() == 1
        desk.recorder.folded(final(a_turn(0)))
        desk.recorder.folded(partial(1))
        assert desk.heard.qsize() == 1
    assert desk.types() == ["turn.partial", "turn.final", "turn.partial"]


async def test_a_new_listener_is_told_the_open_partials_again(store: Store) -> None:
    async with recording(store) as desk:
        desk.recorder.folded(partial(0, "open"))
        await settled(desk)
        desk.recorder.tell_again()
        await settled(desk)
        desk.recorder.folded(final(a_turn(0)))
        await settled(desk)
        desk.recorder.tell_again()
    assert desk.types() == ["turn.partial", "turn.partial", "turn.final"]


# --- the store takes its time, or is somebody else's -----------------------------------------------------------------


async def test_senders_are_asked_to_pause_while_too_much_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING_EVENTS", 10)
    async with recording(store, slow=True) as desk:
        recorder = desk.recorder
        congested = []
        for n in range(10):
            recorder.warn(f"w{n}", "m")
            congested.append(recorder.congested)
        assert congested == [False] * 9 + [True]
        writing = asyncio.create_task(recorder.run())
        await until(lambda: not recorder.congested)
        await settled(desk)
        recorder.warn("big", "x" * (1 << 20))
        assert recorder.congested, "bytes count too"
        recorder.close()
        await writing
        assert not recorder.congested


async def test_a_job_taken_over_raises_and_nothing_more_is_told(store: Store) -> None:
    await add_job(store)
    stale = await store.claim("j1", lease_s=-1, begin=start)
    assert isinstance(stale, Claim)
    assert isinstance(await store.claim("j1", lease_s=60, begin=start), Claim)
    with pytest.raises(Fenced):
        async with recording(store, claim=stale) as desk:
            desk.recorder.folded(final(a_turn(0)))
    assert desk.told == []


async def test_a_refused_renewal_ends_a_recorder_that_has_nothing_to_write(store: Store) -> None:
    await add_job(store)
    stale = await store.claim("j1", lease_s=-1, begin=start)
    assert isinstance(stale, Claim)
    assert isinstance(await store.claim("j1", lease_s=60, begin=start), Claim)
    recorder = Recorder(stale, store, MemoryBus(), CLOCK)
    writing = asyncio.create_task(recorder.run())
    await beat(store, recorder)
    with pytest.raises(Fenced):
        await writing


async def test_a_deleted_job_raises(store: Store) -> None:
    await add_job(store)
    held = await store.claim("j1", lease_s=60, begin=start)
    assert isinstance(held, Claim)
    await store.delete("j1")
    with pytest.raises(Fenced):
        async with recording(store, claim=held) as desk:
            desk.recorder.warn("a", "b")
    assert desk.told == []


# --- renewing --------------------------------------------------------------------------------------------------------


async def test_progress_is_kept_and_then_told_while_streaming(store: Store) -> None:
    async with recording(store) as desk:
        recorder = desk.recorder
        assert (await beat(store, recorder)).stop is None
        recorder.stage(Stage.STREAMING)
        recorder.sent(None, 1500)
        await settled(desk)
        assert (await beat(store, recorder)).stop is None
        record = await store.get("j1")
        assert record is not None
        assert record.job.progress.sent_ms == 1500
        recorder.stage(Stage.FINALIZING)
        await settled(desk)
        await beat(store, recorder)
    assert [(body["sent_ms"], body["total_ms"], body["id"]) for body in desk.bodies("job.progress")] == [
        (1500, 10_000, None)
    ]


async def test_a_renewal_keeps_nothing_that_is_not_yet_committed(store: Store) -> None:
    """Else a crash would leave a job that says more than its log."""
    async with recording(store, slow=True) as desk:
        desk.recorder.stage(Stage.STREAMING)
        desk.recorder.folded(final(a_turn(0)))
        assert (await beat(store, desk.recorder)).stop is None
        record = await store.get("j1")
        assert record is not None
        assert (record.job.stage, record.job.turn_count, record.event_seq) == (None, 0, 2)
    assert "job.progress" not in desk.types()


async def test_word_of_a_cancel_comes_with_the_renewal(store: Store) -> None:
    async with recording(store) as desk:
        await store.request_cancel("j1")
        assert (await beat(store, desk.recorder)).stop == "cancel"


async def test_a_renewal_after_the_end_is_no_news(store: Store) -> None:
    async with recording(store) as desk:
        desk.recorder.finish(Status.CANCELED, coverage=complete())
        await until(lambda: "job.canceled" in desk.types())
        assert (await beat(store, desk.recorder)).stop is None


def test_the_job_is_as_far_as_its_slowest_channel_and_never_goes_back() -> None:
    options = {"channels": "split"}
    claim = Claim(job=split_job(options), owner="", epoch=1, event_seq=2, finalized={})
    recorder = Recorder(claim, None, MemoryBus(), CLOCK)  # type: ignore[arg-type]
    seen = []
    for channel, position in [(0, 500), (1, 300), (1, 900), (0, 400), (0, 1000)]:
        recorder.sent(channel, position)
        seen.append(recorder.job.progress.sent_ms)
    assert seen == [0, 300, 500, 500, 900]


def split_job(options: dict[str, Any]) -> Job:
    job = a_job(options=options)
    job.audio = msgspec.structs.replace(job.audio, channels=2)
    return job


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_an_incomplete_transcript_is_a_warning_never_silence(store: Store) -> None:
    async with recording(store) as desk:
        holed = coverage(file_ms=10_000, sessions=[], finalized={}, channels=[None])
        desk.recorder.finish(Status.COMPLETED, coverage=holed)
    assert desk.types() == ["job.warning", "job.completed"]
    assert desk.bodies("job.warning")[0]["code"] == "incomplete_coverage"
    job = desk.bodies("job.completed")[0]["job"]
    assert [warning["code"] for warning in job["warnings"]] == ["incomplete_coverage"]
    assert job["coverage"]["gaps"] == [{"from_ms": 0, "to_ms": 10_000}]
    assert job["finished_at"]


async def test_a_job_handed_back_is_queued_and_waits_its_time(store: Store) -> None:
    async with recording(store) as desk:
        desk.recorder.stage(Stage.STREAMING)
        desk.recorder.release(not_before_s=30)
    assert desk.bodies()[-1]["status"] == "queued"
    assert desk.bodies()[-1]["stage"] is None
    busy = await store.claim("j1", lease_s=60, begin=start)
    assert isinstance(busy, Busy)
    assert 25 < busy.seconds <= 30


async def test_a_job_handed_back_shows_no_partial_after_it_is_queued(store: Store) -> None:
    async with recording(store, slow=True) as desk:
        desk.recorder.stage(Stage.STREAMING)
        desk.recorder.folded(partial(0, "cut off by the drain"))
        desk.recorder.release(not_before_s=0)
    assert desk.types() == ["job.status", "job.status"]


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELED])
async def test_a_follower_sees_what_was_recorded_and_then_the_end(store: Store, status: Status) -> None:
    error = Failure("internal", "m", True) if status == Status.FAILED else None
    async with recording(store) as desk:
        desk.recorder.folded(final(a_turn(0)))
        desk.recorder.finish(status, coverage=complete(), error=error)
    followed = [event async for event in Feed(store, MemoryBus(), CLOCK).follow("j1")]
    assert [event.type for event in followed] == ["job.status", "job.status", "turn.final", f"job.{status}"]
    assert await append(store, "j1", ("job.restarted", {})) == [an_event("j1", 5, "job.restarted")]


def test_no_status_is_skipped() -> None:
    claim = Claim(job=split_job({}), owner="", epoch=1, event_seq=2, finalized={})
    recorder = Recorder(claim, None, MemoryBus(), CLOCK)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="queued -> completed"):
        recorder.finish(Status.COMPLETED, coverage=complete())
