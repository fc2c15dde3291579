"""The feed: whatever the bus does, a follower gets 1…n once and in order, and no partial where it may not be."""

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from service.backends.memory import MemoryBus
from service.core import protocol
from service.core.coverage import coverage
from service.core.errors import Unavailable
from service.core.job import DELETED, LISTENING, Closed, Event, Stage, Status, hint
from service.core.transcript import Folder
from service.feed import Feed, audience
from service.feed.audience import Push
from service.feed.hub import BACKLOG, PAGE, TAIL, WARY
from service.ports import Bus
from service.runtime import SystemClock
from service.store import Store
from service.transcription.recorder import Recorder
from tests.doubles import DeafBus, LossyBus, a_session, add_job, an_event, append, beat, listening, start, until

FAST = SystemClock(100)  # a silence of five seconds is over in fifty milliseconds


def ids(events: Sequence[Event]) -> list[int]:
    return [event.seq for event in events if event.seq is not None]


async def take(feed: Feed, job_id: str, after: int = 0, *, until: int | None = None) -> list[Event]:
    """Follow to the end, or until that many events have come."""
    seen: list[Event] = []
    stream = feed.follow(job_id, after)
    try:
        async with asyncio.timeout(10):
            async for event in stream:
                seen.append(event)
                if len(seen) == until:
                    break
    finally:
        await stream.aclose()
    return seen


@asynccontextmanager
async def following(feed: Feed, job_id: str, after: int = 0) -> AsyncIterator[list[Event]]:
    """What a follower in the background has seen; inside, it has caught up and waits."""
    seen: list[Event] = []

    async def follow() -> None:
        async for event in feed.follow(job_id, after):
            seen.append(event)  # noqa: PERF401 - looked at meanwhile

    task = asyncio.create_task(follow())
    try:
        hub = await _hub(feed, job_id)
        await until(lambda: bool(hub.audience._waiting) or task.done())
        yield seen
    finally:
        task.cancel()
        await asyncio.wait([task])


def _waits(hub: Any) -> bool:
    return bool(hub.audience._waiting)


def _at(hub: Any, event: Event) -> bool:
    return bool(hub.last == event.seq)


async def _hub(feed: Feed, job_id: str) -> Any:
    await until(lambda: job_id in feed._hubs)
    return feed._hubs[job_id]


# --- the join, under a bus that does its worst -----------------------------------------------------------------------


@dataclass
class Follower:
    """A client that reads a while, goes away, and comes back with the last id it saw."""

    feeds: list[Feed]
    dice: random.Random
    seen: list[Event] = field(default_factory=list)
    last: int = 0
    patience: int = 0

    async def follow(self, job_id: str) -> None:
        while True:
            self.patience = self.dice.choice([1, 2, 5, 20, 1000])
            willing = self.dice.choice([0, 0.5, 0.9, 1])
            push = functools.partial(self._push, willing)
            stream = self.dice.choice(self.feeds).pages(job_id, self.last, push)
            try:
                async for page in stream:
                    for event in page:
                        self._see(event)
                        for _ in range(self.dice.choice([0, 0, 0, 1, 10])):
                            await asyncio.sleep(0)
                        if self.patience <= 0:
                            break
                    if self.patience <= 0:
                        break
                else:
                    if self.seen and self.last == self.end:
                        return
            finally:
                await stream.aclose()
            await asyncio.sleep(self.dice.choice([0, 0, 0.001]))

    def _push(self, willing: float, page: Sequence[Event]) -> bool:
        if self.patience <= 0 or self.dice.random() >= willing:
            return False
        for event in page:
            self._see(event)
        return True

    def _see(self, event: Event) -> None:
        self.seen.append(event)
        self.last = event.seq or self.last
        self.patience -= 1

    end = -1


class Speech:
    """One run of a job, spoken by the dice through the real folder and recorder."""

    def __init__(self, store: Store, bus: Bus, dice: random.Random) -> None:
        self._store, self._bus, self._dice = store, bus, dice

    async def speak(self, job_id: str, run: int, status: Status) -> None:
        claim = await self._store.claim(job_id, lease_s=60, begin=start)
        assert claim is not None
        recorder = Recorder(claim, self._store, self._bus, FAST)  # type: ignore[arg-type]
        recording = asyncio.create_task(recorder.run())
        recorder.stage(Stage.STREAMING)
        for number in range(self._dice.randint(1, 3)):
            await self._session(recorder, f"{run}-{number}")
        _finish(recorder, status)
        recorder.close()
        await recording

    async def _session(self, recorder: Recorder, name: str) -> None:
        session = a_session(name, offset_ms=recorder.job.progress.sent_ms)
        recorder.session_begin(session)
        folder = Folder(session_id=name, channel=None, offset_ms=session.offset_ms, chunk_ms=100)
        for order in range(self._dice.randint(1, 5)):
            for words in range(1, self._dice.randint(1, 6)):
                await self._say(recorder, folder, order, words, ended=False)
            await self._say(recorder, folder, order, self._dice.randint(0, 5), ended=True)
        if self._dice.random() < 0.5:
            await self._say(recorder, folder, order + 1, 2, ended=False)
            recorder.session_lost(session, Closed(3005, "gone"), retry_in_s=1)
        if self._dice.random() < 0.3:
            recorder.session_lost(None, Closed(None, "unreachable"), retry_in_s=1)

    async def _say(self, recorder: Recorder, folder: Folder, order: int, words: int, *, ended: bool) -> None:
        text = [f"w{order}.{n}" for n in range(words)]
        message = protocol.Turn(
            turn_order=order, end_of_turn=ended, transcript=" ".join(text),
            words=[protocol.Word(text=word, start=order * 500.0, end=order * 500 + 500.0) for word in text],
        )  # fmt: skip
        folded = folder.turn(message, next_index=recorder.job.turn_count, elapsed_ms=0, position_ms=0)
        if folded is not None:
            recorder.folded(folded)
        recorder.sent(None, recorder.job.progress.sent_ms + 50)
        if self._dice.random() < 0.2:
            await beat(self._store, recorder)
        if self._dice.random() < 0.2:
            recorder.tell_again()
        for _ in range(self._dice.choice([0, 0, 1, 5])):
            await asyncio.sleep(0)


def _finish(recorder: Recorder, status: Status) -> None:
    job = recorder.job
    channels: list[int | None] = [None]
    account = coverage(
        file_ms=job.audio.duration_ms, sessions=job.sessions, finalized=recorder.finalized, channels=channels
    )
    recorder.finish(status, coverage=account)


def check_partials(seen: Sequence[Event]) -> None:
    """The rules for partials, at one client, over all its connections."""
    final: set[tuple[str, int]] = set()
    shown: dict[str, int] = {}
    over: set[str] = set()
    ended = False
    for event in seen:
        body = msgspec.json.decode(event.json)
        if event.type == "turn.final":
            key = body["turn"]["session_id"], body["turn"]["turn_order"]
            assert shown.get(key[0], -1) <= key[1], "a partial came before an earlier turn's final"
            final.add(key)
        elif event.type == "turn.partial":
            key = body["turn"]["session_id"], body["turn"]["turn_order"]
            assert key not in final, "a partial came after its final"
            assert key[0] not in over, "a partial of a session that is lost"
            assert not ended, "a partial after the end"
            shown[key[0]] = max(shown.get(key[0], -1), key[1])
        elif event.type == "session.lost" and body["session_id"]:
            over.add(body["session_id"])
        elif event.type == "job.restarted":
            over |= shown.keys() | {session for session, _ in final}
            ended = False
        elif event.terminal:
            ended = True


def check_progress(seen: Sequence[Event]) -> None:
    at = 0
    for event in seen:
        if event.type == "job.progress":
            sent = msgspec.json.decode(event.json)["sent_ms"]
            assert sent >= at, "progress went back"
            at = sent
        elif event.type == "job.restarted":
            at = 0


SOAK = [pytest.param(seed, marks=pytest.mark.soak) for seed in range(12, 500)]


@pytest.mark.parametrize("seed", [*range(12), *SOAK])
async def test_every_follower_gets_every_event_once_and_in_order(store: Store, seed: int) -> None:
    dice = random.Random(seed)
    memory = MemoryBus()
    bus = LossyBus(memory, dice, drop=dice.choice([0, 0.1, 0.6]), double=0.3, hold=dice.choice([0, 0.5]))
    feeds = [Feed(store, bus, FAST), Feed(store, memory, FAST)]  # two processes, one with a better ear
    await add_job(store)
    followers = [Follower(feeds, dice) for _ in range(8)]
    Follower.end = -1
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:

        async def later(follower: Follower) -> None:
            await asyncio.sleep(dice.random() * 0.05)
            await follower.follow("j1")

        for follower in followers:
            group.create_task(later(follower))
        speech = Speech(store, bus, dice)
        await speech.speak("j1", 0, Status.FAILED)
        await append(store, "j1", ("job.restarted", {"from_turn": 0}), ("job.status", {}), status=Status.QUEUED)
        await speech.speak("j1", 1, Status.COMPLETED)
        Follower.end = await store.newest_seq("j1") or 0
    log = await store.events_after("j1", 0, 10_000)
    assert ids(log) == list(range(1, Follower.end + 1))
    for follower in followers:
        durable = [event for event in follower.seen if event.seq is not None]
        assert [(event.seq, event.json) for event in durable] == [(event.seq, event.json) for event in log]
        check_partials(follower.seen)
        check_progress(follower.seen)
    assert not any(feed._hubs for feed in feeds), "hubs go with their last follower"


# --- one rule at a time ----------------------------------------------------------------------------------------------


async def test_replay_starts_after_the_given_id_and_ends_with_the_job(store: Store) -> None:
    await add_job(store)
    await append(store, "j1", ("job.warning", {}), ("job.failed", {}), status=Status.FAILED)
    feed = Feed(store, MemoryBus(), FAST)
    assert ids(await take(feed, "j1")) == [1, 2, 3]
    assert ids(await take(feed, "j1", 1)) == [2, 3]
    assert await take(feed, "j1", 3) == []


async def test_replay_shows_the_bytes_that_were_kept(store: Store) -> None:
    await add_job(store)
    made = await append(
        store, "j1", ("job.failed", {"job": {"id": "j1", "filename": "a\u2028b\r\n"}}), status=Status.FAILED
    )
    assert [(e.json, e.sse) for e in await take(Feed(store, MemoryBus(), FAST), "j1", 1)] == [
        (e.json, e.sse) for e in made
    ]


async def test_an_older_end_is_replayed_like_any_event_once_the_job_was_retried(store: Store) -> None:
    await add_job(store)
    await append(
        store,
        "j1",
        ("job.failed", {}),
        ("job.restarted", {}),
        ("job.status", {}),
        ("job.completed", {}),
        status=Status.COMPLETED,
    )
    assert ids(await take(Feed(store, MemoryBus(), FAST), "j1")) == [1, 2, 3, 4, 5]


async def test_a_long_log_is_read_in_pages(store: Store) -> None:
    await add_job(store)
    count = 2 * PAGE + 7
    await append(
        store, "j1", *[("job.warning", {"n": n}) for n in range(count)], ("job.completed", {}), status=Status.COMPLETED
    )
    assert ids(await take(Feed(store, MemoryBus(), FAST), "j1")) == list(range(1, count + 3))


async def test_an_unknown_job_has_no_events(store: Store) -> None:
    assert await take(Feed(store, MemoryBus(), FAST), "nobody") == []


async def test_live_events_come_without_reading_the_log(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    async with following(feed, "j1") as seen:
        for event in await append(store, "j1", *[("job.warning", {"n": n}) for n in range(20)]):
            bus.publish("events.j1", event)
        hub = await _hub(feed, "j1")
        await until(lambda: hub.last == 21 and len(seen) == 21)
    assert ids(seen) == list(range(1, 22))


async def test_a_silent_bus_is_checked_against_the_log(store: Store) -> None:
    feed = Feed(store, DeafBus(), FAST)
    await add_job(store)
    async with following(feed, "j1") as seen:
        await append(store, "j1", ("job.warning", {}), ("job.completed", {}), status=Status.COMPLETED)
        await until(lambda: len(seen) == 3)
    assert ids(seen) == [1, 2, 3]


async def test_what_comes_while_the_log_is_looked_into_waits_and_takes_a_bounded_space(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    newest_seq, there = store.newest_seq, asyncio.Event()

    async def slow(job_id: str) -> int | None:
        await there.wait()
        return await newest_seq(job_id)

    async with following(feed, "j1") as seen:
        hub = await _hub(feed, "j1")
        monkeypatch.setattr(store, "newest_seq", slow)
        await until(lambda: bool(hub.looking))
        log = await append(store, "j1", *[("job.warning", {})] * (BACKLOG + 100))
        for event in log:
            bus.publish("events.j1", event)
        assert hub.last == 1
        assert len(hub._missed) == BACKLOG
        there.set()
        await until(lambda: len(seen) == len(log) + 1)
    assert ids(seen) == [*range(1, len(log) + 2)]


async def test_an_event_that_cannot_be_taken_is_no_matter_of_its_publisher(store: Store) -> None:
    bus = MemoryBus()
    await add_job(store)
    feed = Feed(store, bus, SystemClock())
    follower = feed.follow("j1")
    await anext(follower)
    waiting = asyncio.create_task(anext(follower))
    hub = await _hub(feed, "j1")
    await until(functools.partial(_waits, hub))
    bus.publish("events.j1", an_event("j1", None, "turn.partial", after_seq=1, turn="not one"))
    with pytest.raises(msgspec.ValidationError):
        await waiting
    assert not bus._topics


async def test_a_lost_final_is_fetched_as_soon_as_anything_says_that_it_exists(store: Store) -> None:
    """A speaker who goes on for a minute must not hide for a minute that the bus lost the final before."""
    bus = MemoryBus()
    feed = Feed(store, bus, SystemClock())
    await add_job(store)
    async with following(feed, "j1") as seen:
        await append(store, "j1", ("turn.final", {"turn": {"session_id": "s", "turn_order": 0}}))
        bus.publish("events.j1", partial("s", 1, after_seq=2))
        await until(lambda: len(seen) == 3)
    assert [event.type for event in seen] == ["job.status", "turn.final", "turn.partial"]


def partial(session: str, order: int, *, after_seq: int, text: str = "so far") -> Event:
    turn = {"session_id": session, "turn_order": order, "transcript": text}
    return an_event("j1", None, "turn.partial", after_seq=after_seq, turn=turn)


async def test_late_partials_are_dropped(store: Store) -> None:
    """Of a final turn, of a lost session, and of a run that was restarted."""
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    async with following(feed, "j1") as seen:
        steps: list[tuple[tuple[str, dict[str, Any]], Event]] = [
            (("turn.final", {"turn": {"session_id": "s", "turn_order": 0}}), partial("s", 0, after_seq=1)),
            (("session.lost", {"session_id": "s"}), partial("s", 1, after_seq=2)),
            (("job.restarted", {"from_turn": 0}), partial("t", 0, after_seq=3)),
        ]
        for step, late in steps:
            for event in await append(store, "j1", step):
                bus.publish("events.j1", event)
            bus.publish("events.j1", late)
        bus.publish("events.j1", partial("u", 0, after_seq=4))
        await until(lambda: len(seen) == 5)
    assert [event.type for event in seen] == [
        "job.status",
        "turn.final",
        "session.lost",
        "job.restarted",
        "turn.partial",
    ]
    assert b'"u"' in seen[-1].json


async def test_progress_never_goes_back_but_starts_again_after_a_restart(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)

    async def tell(sent_ms: int, after_seq: int) -> None:
        bus.publish(
            "events.j1", an_event("j1", None, "job.progress", after_seq=after_seq, sent_ms=sent_ms, total_ms=9000)
        )

    async with following(feed, "j1") as seen:
        hub = await _hub(feed, "j1")
        for sent_ms, after_seq in [(2000, 1), (1000, 1), (3000, 1)]:
            await tell(sent_ms, after_seq)
            await until(lambda: hub.audience.has_all(1))
        (restarted,) = await append(store, "j1", ("job.restarted", {"from_turn": 0}))
        bus.publish("events.j1", restarted)
        await tell(9000, 1)  # of the run before, late
        await tell(500, 2)
        await until(lambda: b":500," in seen[-1].json)
    assert [msgspec.json.decode(event.json)["sent_ms"] for event in seen if event.type == "job.progress"] == [
        2000,
        3000,
        500,
    ]


async def test_a_late_follower_gets_the_current_partial_at_once(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    async with following(feed, "j1") as seen:
        bus.publish("events.j1", partial("s", 0, after_seq=1, text="one"))
        bus.publish("events.j1", partial("s", 0, after_seq=1, text="one two"))
        await until(lambda: len(seen) >= 2)
        late = await take(feed, "j1", until=2)
        assert [event.type for event in late] == ["job.status", "turn.partial"]
        assert b"one two" in late[1].json


async def test_the_first_follower_asks_for_the_current_partial(store: Store) -> None:
    bus = MemoryBus()
    await add_job(store)
    async with listening(bus, "control.j1") as control, following(Feed(store, bus, FAST), "j1"):
        assert (await control.get()).type == LISTENING


async def test_a_slow_follower_reads_the_log_and_gets_partials_merged(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    slow = feed.follow("j1")
    first = await anext(slow)
    async with following(feed, "j1") as quick:
        for n, event in enumerate(await append(store, "j1", *[("job.warning", {})] * (TAIL + 50))):
            bus.publish("events.j1", event)
            bus.publish("events.j1", partial("s", 0, after_seq=n + 2, text=f"text {n}"))
            await asyncio.sleep(0)
        await until(lambda: bool(quick) and b"text 305" in quick[-1].json)
    got = [first]
    async with asyncio.timeout(10):
        async for event in slow:
            got.append(event)
            if event.type == "turn.partial":
                break
    await slow.aclose()
    assert ids(got) == list(range(1, TAIL + 52))
    assert [b"text 305" in event.json for event in got if event.seq is None] == [True], "only the newest"
    assert ids(quick) == list(range(1, TAIL + 52))


async def test_what_all_have_seen_is_kept_no_longer(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    async with following(feed, "j1") as one, following(feed, "j1") as other:
        hub = await _hub(feed, "j1")
        for _ in range(20):
            await until(lambda: hub.audience.has_all(2))
            (event,) = await append(store, "j1", ("job.warning", {}))
            bus.publish("events.j1", event)
            await until(functools.partial(_at, hub, event))
            assert len(hub._tail) == 1
        await until(lambda: hub.audience.has_all(2))
    assert ids(one) == ids(other) == list(range(1, 22))


async def test_a_deleted_job_ends_its_streams(store: Store) -> None:
    bus = MemoryBus()
    await add_job(store)
    told, untold = Feed(store, bus, FAST), Feed(store, DeafBus(), FAST)
    streams = [asyncio.create_task(take(feed, "j1")) for feed in (told, untold)]
    for feed in (told, untold):
        await until(functools.partial(_waits, await _hub(feed, "j1")))
    await store.delete("j1")
    bus.publish("events.j1", hint("j1", DELETED))
    async with asyncio.timeout(5):
        assert [ids(seen) for seen in await asyncio.gather(*streams)] == [[1], [1]]


async def test_a_job_deleted_while_a_follower_was_busy_ends_its_stream(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    stream = feed.follow("j1")
    await anext(stream)
    await store.delete("j1")
    bus.publish("events.j1", hint("j1", DELETED))
    hub = await _hub(feed, "j1")
    await until(lambda: hub.over)
    async with asyncio.timeout(5):
        assert [event async for event in stream] == []


async def test_a_burst_to_many_followers_lets_others_run(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, SystemClock())
    await add_job(store)
    woken: list[int] = []

    async def follow() -> None:
        assert ids(await take(feed, "j1", until=2)) == [1, 2]
        woken.append(turn)

    turn = 0
    tasks = [asyncio.create_task(follow()) for _ in range(500)]
    hub = await _hub(feed, "j1")
    await until(lambda: len(hub.audience._waiting) == 500)
    (event,) = await append(store, "j1", ("job.warning", {}))
    bus.publish("events.j1", event)
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turn += 1
    assert len(woken) == 500
    assert max(woken.count(n) for n in set(woken)) <= 100, "at most a hundred in one turn of the loop"
    assert not feed._hubs


@asynccontextmanager
async def offered(feed: Feed, *pushes: Push) -> AsyncIterator[list[list[Event]]]:
    """Followers of j1 in the background, and what each was not offered or did not take; inside, they wait."""
    left: list[list[Event]] = [[] for _ in pushes]

    async def follow(push: Push, events: list[Event]) -> None:
        async for page in feed.pages("j1", 0, push):
            events += page

    tasks = [asyncio.create_task(follow(*each)) for each in zip(pushes, left, strict=True)]
    try:
        hub = await _hub(feed, "j1")
        await until(lambda: len(hub.audience._waiting) == len(pushes))
        yield left
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_who_takes_what_is_new_is_not_woken_and_nobody_gets_it_twice(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, SystemClock())
    await add_job(store)
    taken: list[Sequence[Event]] = []

    def take_it(page: Sequence[Event]) -> bool:
        taken.append(page)
        return True

    def break_down(page: Sequence[Event]) -> bool:
        raise RuntimeError

    async with offered(feed, take_it, break_down, lambda _: False, take_it) as left:
        for event in await append(store, "j1", ("job.warning", {}), ("job.warning", {})):
            bus.publish("events.j1", event)
        bus.publish("events.j1", partial("s", 0, after_seq=3))
        await until(lambda: [len(events) for events in left] == [1, 4, 4, 1])
        assert ids(left[1]) == ids(left[2]) == [1, 2, 3]
        assert [[event.seq for event in page] for page in taken] == [[2, 3, None]] * 2
        assert taken[0] is taken[1], "put together once"
        (end,) = await append(store, "j1", ("job.failed", {}), status=Status.FAILED)
        bus.publish("events.j1", end)
        await until(lambda: [events[-1].seq for events in left] == [4, 4, 4, 4] and not feed._hubs)


async def test_a_burst_to_many_who_take_it_lets_others_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "SLICE_SECONDS", 0)  # a slice is over after the first
    bus = MemoryBus()
    feed = Feed(store, bus, SystemClock())
    await add_job(store)
    turn, told = 0, []

    def take_it(_page: Sequence[Event]) -> bool:
        told.append(turn)
        return True

    async with offered(feed, *[take_it] * 100):
        (event,) = await append(store, "j1", ("job.warning", {}))
        bus.publish("events.j1", event)
        while len(told) < 100:
            await asyncio.sleep(0)
            turn += 1
    assert len(set(told)) == 100


async def test_leaving_is_instant_and_takes_the_hub_along(store: Store) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    async with following(feed, "j1"):
        assert bus._topics
    assert not feed._hubs
    await until(lambda: not bus._topics)


async def test_followers_outlive_a_database_that_is_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    await add_job(store)
    newest_seq = store.newest_seq
    asked = 0

    async def away(job_id: str) -> int | None:
        nonlocal asked
        asked += 1
        raise Unavailable

    async with following(feed, "j1") as seen:
        monkeypatch.setattr(store, "newest_seq", away)
        await until(lambda: asked == 3)
        monkeypatch.setattr(store, "newest_seq", newest_seq)
        await append(store, "j1", ("job.completed", {}), status=Status.COMPLETED)
        await until(lambda: len(seen) == 2)
    assert ids(seen) == [1, 2]


@pytest.mark.parametrize("reading", ["newest_seq", "events_after"])
async def test_who_comes_while_the_database_is_away_waits_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, reading: str
) -> None:
    """Whether the hub does not know how far the log is, or the follower reads what was before it came."""
    await add_job(store)
    await append(store, "j1", *[("job.warning", {})] * 2 * PAGE)
    feed = Feed(store, MemoryBus(), FAST)
    read = getattr(store, reading)
    asked = 0

    async def away(job_id: str, *more: int) -> Any:
        nonlocal asked
        asked += 1
        raise Unavailable

    monkeypatch.setattr(store, reading, away)
    followers = [asyncio.create_task(take(feed, "j1", after)) for after in (0, 150)]
    await until(lambda: asked >= 4)
    monkeypatch.setattr(store, reading, read)
    await append(store, "j1", ("job.completed", {}), status=Status.COMPLETED)
    assert [ids(await follower) for follower in followers] == [[*range(1, 203)], [*range(151, 203)]]


@pytest.mark.parametrize("reading", ["newest_seq", "events_after"])
async def test_who_waits_for_a_database_that_is_away_goes_with_the_process(
    store: Store, monkeypatch: pytest.MonkeyPatch, reading: str
) -> None:
    feed = Feed(store, MemoryBus(), SystemClock())
    await add_job(store)
    asked = 0

    async def away(*_: Any) -> Any:
        nonlocal asked
        asked += 1
        raise Unavailable

    monkeypatch.setattr(store, reading, away)
    follower = asyncio.create_task(take(feed, "j1"))
    await until(lambda: asked > 0)
    feed.end()
    assert await follower == []


async def test_a_bus_that_lost_something_is_not_trusted_for_a_while(store: Store) -> None:
    """With the bus gone for good a turn is told a second after it was kept, not after a silence."""
    clock = SystemClock(10)
    feed = Feed(store, DeafBus(), clock)
    await add_job(store)
    async with following(feed, "j1") as seen:
        hub = await _hub(feed, "j1")
        assert hub.wary == 0
        for _ in range(2):
            before = len(seen)
            await append(store, "j1", ("job.warning", {}))
            await until(lambda: len(seen) > before)  # noqa: B023 - it is over before the next
            assert hub.wary == WARY
        await until(lambda: hub.wary == 0)
    assert ids(seen) == [1, 2, 3]


async def test_a_hub_that_broke_is_not_handed_to_the_next_follower(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow follower may hold on to it for long."""
    await add_job(store)
    bus = MemoryBus()
    feed = Feed(store, bus, FAST)
    slow = feed.follow("j1")
    await anext(slow)
    hub = await _hub(feed, "j1")

    async def broken(job_id: str) -> int | None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(store, "newest_seq", broken)
        await until(lambda: hub.over)
    await append(store, "j1", ("job.completed", {}), status=Status.COMPLETED)
    assert ids(await take(feed, "j1")) == [1, 2]
    with pytest.raises(RuntimeError):
        await anext(slow)


async def test_the_end_of_the_process_lets_followers_catch_up_and_go(store: Store) -> None:
    await add_job(store)
    feed = Feed(store, MemoryBus(), FAST)
    async with following(feed, "j1") as seen:
        feed.end()
        await until(lambda: not feed._hubs)
        assert ids(seen) == [1]
    assert ids(await take(feed, "j1")) == [1]


def test_the_checker_of_partials_can_fail() -> None:
    final = an_event("j1", 2, "turn.final", turn={"session_id": "s", "turn_order": 0})
    for wrong in (
        [final, partial("s", 0, after_seq=1)],
        [partial("s", 1, after_seq=1), final],
        [an_event("j1", 2, "session.lost", session_id="s"), partial("s", 0, after_seq=1)],
        [an_event("j1", 2, "job.failed"), partial("s", 0, after_seq=1)],
    ):
        with pytest.raises(AssertionError):
            check_partials(wrong)
    check_partials([partial("s", 0, after_seq=1), final, partial("s", 1, after_seq=2)])
