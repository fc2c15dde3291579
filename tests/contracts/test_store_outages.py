"""The store on a real PostgreSQL that is stopped, killed, frozen or refuses, and several processes' stores on one.

What holds on both databases is in `test_store`; here a server of its own is hurt.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.core.errors import Fenced, Unavailable
from service.core.job import Claim, Status
from service.store import Busy, Store, Write, open_store, writer
from service.store.engines import open_engine
from tests.doubles import a_turn, add_job, an_event, renew, start, until
from tests.engines.postgres import Postgres, connect

PATIENCE = 60.0


@pytest.fixture
def database(postgres_database: str) -> str:
    """On the server of all."""
    return postgres_database


@pytest.fixture
def hurt() -> Iterator[Postgres]:
    """A server to be hurt."""
    with Postgres() as server:
        yield server


@pytest.fixture
async def on_hurt(hurt: Postgres) -> AsyncIterator[Store]:
    """A store on it."""
    from service.store import migrate

    await migrate(hurt.url())
    async with open_store(hurt.url()) as opened:
        yield opened


async def claimed(store: Store, job_id: str = "j1", lease_s: float = 60) -> Claim:
    got = await store.claim(job_id, lease_s=lease_s, begin=start)
    assert isinstance(got, Claim)
    return got


async def speak(store: Store, held: Claim, index: int) -> None:
    """One final, as event 3 and on."""
    step = Write(held.job, events=[an_event(held.job.id, 3 + index, "turn.final")], turns=[a_turn(index)])
    await store.write(held, step, after_seq=2 + index)


async def seqs(store: Store, job_id: str) -> list[int | None]:
    return [event.seq for event in await store.events_after(job_id, 0, 10_000)]


# --- a server that goes and comes ------------------------------------------------------------------------------------


async def test_a_server_restarted_and_killed_under_load_costs_no_final_and_doubles_none(
    hurt: Postgres, on_hurt: Store
) -> None:
    """Each job writes on until the server has gone and come four times; a commit may be cut anywhere."""
    store, over = on_hurt, asyncio.Event()

    async def live(job_id: str) -> int:
        await add_job(store, job_id)
        held = await claimed(store, job_id)
        spoken = 0
        while not over.is_set():
            await speak(store, held, spoken)
            spoken += 1
            with suppress(Unavailable):  # it does not wait for a server that is away
                await renew(store, held, lease_s=60, job=None)
        held.job.status = Status.COMPLETED
        step = Write(held.job, events=[an_event(job_id, 3 + spoken, "job.completed")])
        await store.write(held, step, after_seq=2 + spoken)
        return spoken

    jobs = [f"j{n}" for n in range(8)]
    lives = [asyncio.create_task(live(job_id)) for job_id in jobs]
    for hurting in (hurt.stop, hurt.kill, hurt.kill, hurt.stop):
        commits = await _count(store, "j0")
        await _until(lambda commits=commits: _more_than(store, "j0", commits + 5))
        await asyncio.to_thread(hurting)
        with pytest.raises(Unavailable):
            await store.get("j0")
        with pytest.raises(Unavailable):
            await add_job(store, "refused")
        assert not any(life.done() for life in lives)
        await asyncio.to_thread(hurt.start)
    over.set()
    async with asyncio.timeout(PATIENCE):
        counts = await asyncio.gather(*lives)
    for job_id, spoken in zip(jobs, counts, strict=True):
        assert await seqs(store, job_id) == list(range(1, spoken + 4))
        assert [turn.index for turn in await store.turns(job_id, limit=10_000)] == list(range(spoken))
    assert await store.get("refused") is None


async def _count(store: Store, job_id: str) -> int:
    try:
        return await store.newest_seq(job_id) or 0
    except Unavailable:
        return 0


async def _more_than(store: Store, job_id: str, count: int) -> bool:
    return await _count(store, job_id) > count


async def _until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_a_server_that_hangs_is_given_up_and_found_again(hurt: Postgres, on_hurt: Store) -> None:
    """Connections stay and nobody answers, as behind a firewall that forgot them."""
    await add_job(on_hurt)
    held = await claimed(on_hurt)
    await on_hurt.get("j1")
    with hurt.paused():
        patient = asyncio.create_task(speak(on_hurt, held, 0))
        await until(lambda: not on_hurt._writer._waiting)
        async with asyncio.timeout(PATIENCE):
            acts = add_job(on_hurt, "j2"), on_hurt.get("j1")
            results = await asyncio.gather(*acts, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable] * 2
        assert not patient.done()
    async with asyncio.timeout(PATIENCE):
        await patient
    assert await seqs(on_hurt, "j1") == [1, 2, 3]
    assert await on_hurt.get("j2") is None


async def test_reads_find_a_server_that_was_restarted_at_the_first_attempt(hurt: Postgres, on_hurt: Store) -> None:
    await add_job(on_hurt)
    await asyncio.gather(*(on_hurt.get("j1") for _ in range(8)))  # every connection of the pool is in use
    await asyncio.to_thread(hurt.stop)
    await asyncio.to_thread(hurt.start)
    assert all(await asyncio.gather(*(on_hurt.get("j1") for _ in range(8))))


async def test_a_read_only_server_is_away(store: Store, database: str) -> None:
    await add_job(store)
    held = await claimed(store)
    name = database.rpartition("/")[2]
    other = await connect(database)
    await other.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    kick = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
    await other.fetch(kick, name)
    patient = asyncio.create_task(speak(store, held, 0))
    with pytest.raises(Unavailable):
        await add_job(store, "j2")
    assert not patient.done()
    assert await seqs(store, "j1") == [1, 2], "it is read from"
    await other.execute("SET default_transaction_read_only = off")
    await other.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await other.fetch(kick, name)
    await other.close()
    async with asyncio.timeout(PATIENCE):
        await patient
    assert await seqs(store, "j1") == [1, 2, 3]


@pytest.mark.parametrize("statement", ["SELECT no_such_thing", "SELECT 1/0", "not even SQL"])
async def test_a_faulty_statement_is_told_to_its_caller_however_patient(store: Store, statement: str) -> None:
    async def run(connection: AsyncConnection) -> None:
        await connection.exec_driver_sql(statement)

    async with asyncio.timeout(PATIENCE):
        with pytest.raises(DBAPIError):
            await store._writer.write("j1", run, patient=True)
    await add_job(store)


async def test_an_argument_out_of_form_is_told_to_its_caller(store: Store) -> None:
    async def run(connection: AsyncConnection) -> None:
        await connection.exec_driver_sql("SELECT $1::int", ("no number",))

    async with asyncio.timeout(PATIENCE):
        with pytest.raises(DBAPIError):
            await store._writer.write("j1", run, patient=True)


# --- several processes on one database -------------------------------------------------------------------------------


@pytest.fixture
async def stores(database: str) -> AsyncIterator[list[Store]]:
    """As three processes have them."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_store(database)) for _ in range(3)]


async def test_of_stores_that_race_for_jobs_one_gets_each(stores: list[Store]) -> None:
    jobs = [f"j{n:02}" for n in range(50)]
    await asyncio.gather(*(add_job(stores[0], job_id) for job_id in jobs))
    tries = [store.claim(job_id, lease_s=60, begin=start) for job_id in jobs for store in stores]
    got = await asyncio.gather(*tries)
    assert sorted(one.job.id for one in got if isinstance(one, Claim)) == jobs
    assert sum(isinstance(one, Busy) for one in got) == 2 * len(jobs)
    for job_id in jobs:
        assert await seqs(stores[1], job_id) == [1, 2]


async def test_a_zombie_is_refused_once_its_lease_ran_out_on_the_databases_clock(stores: list[Store]) -> None:
    dead, alive, _ = stores
    await add_job(dead)
    zombie = await claimed(dead, lease_s=0.5)
    successor: list[Claim] = []

    async def take() -> bool:
        got = await alive.claim("j1", lease_s=60, begin=start)
        if isinstance(got, Busy):
            assert 0 < got.seconds <= 0.5
            return False
        assert isinstance(got, Claim)
        successor.append(got)
        return True

    await _until(take)
    for act in (speak(dead, zombie, 0), renew(dead, zombie, lease_s=60, job=None)):
        with pytest.raises(Fenced):
            await act
    step = Write(successor[0].job, events=[an_event("j1", 4, "turn.final")], turns=[a_turn()])
    await alive.write(successor[0], step, after_seq=3)
    assert await seqs(dead, "j1") == [1, 2, 3, 4]


async def test_a_process_frozen_in_a_transaction_loses_its_locks(database: str, store: Store) -> None:
    """Its session is ended by the server, and whoever waits goes on; the others' jobs do so meanwhile."""
    await add_job(store, "j1")
    await add_job(store, "j2")
    held, other = await claimed(store, "j1"), await claimed(store, "j2")
    frozen = open_engine(database, writing=True)
    connection = await frozen.connect()
    await connection.exec_driver_sql("UPDATE jobs SET strikes = 9 WHERE id = 'j1'")
    waiting = asyncio.create_task(speak(store, held, 0))
    await until(lambda: bool(store._writer._waiting))  # tried once, and back in line
    async with asyncio.timeout(PATIENCE):
        await speak(store, other, 0)
        await waiting
    await connection.invalidate()
    await connection.close()
    await frozen.dispose()
    assert await seqs(store, "j1") == await seqs(store, "j2") == [1, 2, 3]


async def test_groups_that_lock_the_same_jobs_at_once_all_come_through(
    stores: list[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancels, deletes, renewals and uploads with keys of three processes, on the same few jobs, however slowly."""
    monkeypatch.setattr(writer, "IMPATIENCE_SECONDS", PATIENCE)
    monkeypatch.setattr(writer, "SLOW_SECONDS", PATIENCE)
    jobs = [f"j{n}" for n in range(10)]
    for job_id in jobs:
        await add_job(stores[0], job_id)
    held = [await claimed(stores[0], job_id) for job_id in jobs]
    acts: list[Any] = []
    for round_ in range(10):
        for n, store in enumerate(stores):
            acts += [store.request_cancel(job_id) for job_id in jobs[:: 1 if n % 2 else -1]]
            acts += [renew(stores[0], claim, lease_s=60, job=None) for claim in held]
            acts += [store.delete(f"j{round_}")] if n == 1 else []
    results = await asyncio.gather(*acts, return_exceptions=True)
    assert {type(result) for result in results} <= {bool, Fenced}
    assert await stores[2].list(owner=None, limit=10) == []


async def test_of_stores_that_race_for_an_idempotency_key_one_wins(stores: list[Store]) -> None:
    from tests.contracts.test_store import create_with_key

    acts = [create_with_key(store, f"j{n}{k}", f"k{k}", f"f{n}") for k in range(10) for n, store in enumerate(stores)]
    uses = await asyncio.gather(*acts)
    assert uses.count(None) == 10
    assert len(await stores[0].list(owner=None, limit=100)) == 10


# --- connections as the URL wants them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "lock_timeout", "prepared"),
    [("", "500ms", True), ("?statement_cache_size=0", "0", False), ("?prepared_statement_cache_size=0", "0", False)],
)
async def test_a_pooler_is_given_no_statement_and_no_parameter_to_remember(
    database: str, query: str, lock_timeout: str, prepared: bool
) -> None:
    async def look(connection: AsyncConnection) -> tuple[Any, bool]:
        for _ in range(2):
            await connection.exec_driver_sql("SELECT 'kept?'")
        kept = await connection.exec_driver_sql(
            "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%kept?%' AND statement NOT LIKE '%count%'"
        )
        return (await connection.exec_driver_sql("SHOW lock_timeout")).scalar(), bool(kept.scalar())

    async with open_store(f"{database}{query}{'&' if query else '?'}sslmode=prefer") as store:
        await add_job(store)
        await claimed(store)
        assert await store._writer.write("", look) == (lock_timeout, prepared)
        assert await seqs(store, "j1") == [1, 2]
