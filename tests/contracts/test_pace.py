"""The pace of new upstream sessions, on both databases: many processes together begin no more than one alone may."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing
from functools import partial
from itertools import pairwise

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.runtime import SystemClock
from service.store import Store, open_store
from service.store.schema import now_ms, session_pace
from service.transcription import SessionGate, control
from tests.contracts.test_store import database as database  # noqa: PLC0414  a fixture
from tests.doubles import until

HOST = "upstream.example"
FAR = 600.0  # seconds between places in which nothing else that happens here counts


async def set_place(store: Store, seconds: float) -> None:
    """When the next place is, from now."""

    async def run(connection: AsyncConnection) -> None:
        await connection.execute(update(session_pace).values(next_ms=now_ms() + int(seconds * 1000)))

    await store._writer.write("", run)


# --- places ----------------------------------------------------------------------------------------------------------


async def test_of_stores_that_ask_at_once_each_gets_a_place_of_its_own(database: str) -> None:
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_store(database)) for _ in range(3)]
        waits = await asyncio.gather(*(store.pace.reserve(HOST, FAR) for _ in range(10) for store in stores))
        assert [round(wait / FAR) for wait in sorted(waits)] == list(range(30))
        assert await stores[0].pace.reserve("another", FAR) == 0


async def test_a_place_that_nobody_took_is_no_credit(store: Store) -> None:
    assert await store.pace.reserve(HOST, FAR) == 0
    await set_place(store, -10 * FAR)
    assert await store.pace.reserve(HOST, FAR) == 0
    assert await store.pace.reserve(HOST, FAR) == pytest.approx(FAR, abs=60)


async def test_a_clock_set_back_does_not_stop_everything(store: Store) -> None:
    await store.pace.reserve(HOST, FAR)
    await set_place(store, 100 * FAR)
    assert await store.pace.reserve(HOST, FAR) > 99 * FAR, "a hundred others may be ahead"
    await set_place(store, 100 * FAR + 120)
    assert await store.pace.reserve(HOST, FAR) == 0


# --- the gate --------------------------------------------------------------------------------------------------------


class Asked:
    """`reserve` of a gate, with what it was told: when it was asked, and how long the wait is, on the gate's clock."""

    def __init__(self, clock: SystemClock, reserve: Callable[[float], Awaitable[float]]) -> None:
        """`reserve` is the real one."""
        self._clock = clock
        self._reserve = reserve
        self.places: list[float] = []

    async def __call__(self, interval: float) -> float:
        asked = self._clock.now()
        wait = await self._reserve(interval)
        self.places.append(asked + wait / self._clock.real(1))
        return wait


async def test_three_processes_side_by_side_keep_to_the_limit_of_one(database: str) -> None:
    """Sessions are as far apart as their places, but for what each was late itself."""
    clock, per_minute, starts = SystemClock(60), 30, list[tuple[float, float]]()
    interval = 60 / per_minute
    async with AsyncExitStack() as stack:

        async def session(gate: SessionGate, asked: Asked) -> None:
            async with gate.enter(lambda _: None):
                starts.append((now := clock.now(), now - asked.places[-1]))

        acts, every = [], []
        for _ in range(3):
            store = await stack.enter_async_context(open_store(database))
            asked = Asked(clock, partial(store.pace.reserve, HOST))
            gate = SessionGate(clock, per_minute=per_minute, reserve=asked)
            acts += [session(gate, asked) for _ in range(20)]
            every.append(asked)
        await asyncio.gather(*acts)
        assert [len(asked.places) for asked in every] == [20] * 3
    starts.sort()
    late = [max(0.0, lateness - control.SLACK_SECONDS) for _, lateness in starts]
    for first, (start, _) in enumerate(starts):
        within = [other for other, _ in starts[first:] if other < start + 60 - late[first]]
        assert len(within) <= per_minute
    for (one, lateness), (other, _) in pairwise(starts):
        assert other - one >= interval - lateness


async def test_who_leaves_the_line_leaves_his_place_to_the_next(store: Store) -> None:
    clock = SystemClock(60)
    asked = Asked(clock, partial(store.pace.reserve, HOST))
    gate = SessionGate(clock, per_minute=1, reserve=asked)
    told: list[bool] = []

    async def session() -> None:
        async with gate.enter(told.append):
            pass

    await session()
    assert told == [False]
    line = [asyncio.create_task(session()) for _ in range(6)]
    await until(lambda: len(asked.places) == 2)
    for leaving in line[:2]:
        leaving.cancel()
    await line[2]
    assert len(asked.places) == 2, "the place of the first was taken by the third"
    assert clock.now() >= asked.places[1]
    for leaving in line[3:]:
        leaving.cancel()
    await asyncio.wait(line)


async def test_without_a_limit_nobody_asks_and_nobody_waits() -> None:
    async def never(_interval: float) -> float:
        raise AssertionError

    gate = SessionGate(SystemClock(), per_minute=0, reserve=never)
    for _ in range(10):
        async with gate.enter(lambda waiting: None) as waited:
            assert waited == 0


@pytest.mark.parametrize("away", ["refuses", "hangs"])
async def test_with_the_database_away_a_process_keeps_the_pace_by_itself(
    sqlite_database: str, away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "RESERVE_SECONDS", 5.0 if away == "refuses" else 0.05)
    clock, starts = SystemClock(60), list[float]()
    async with open_store(sqlite_database) as store:

        async def hangs(_interval: float) -> float:
            await asyncio.Event().wait()
            raise AssertionError

        reserve = partial(store.pace.reserve, HOST) if away == "refuses" else hangs
        gate = SessionGate(clock, per_minute=30, reserve=reserve)
        with closing(sqlite3.connect(sqlite_database.partition("///")[2])) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(3):
                async with gate.enter(lambda _: None):
                    starts.append(clock.now())
        assert all(other - one >= 2 for one, other in pairwise(starts))
