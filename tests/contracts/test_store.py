"""The contract of the store: what is claimed, fenced, kept and counted, and what happens while the database is away.

Runs on both databases; what concerns one kind alone asks for the fixture of that kind.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from service.core.errors import CallerError, Fenced, StorageFull, Unavailable
from service.core.job import Claim, Event, Job, Status
from service.store import MAX_STRIKES, Busy, Record, Store, Use, Write, migrate, open_store
from service.store.schema import idempotency, metadata
from service.store.writer import Writer
from tests.doubles import CREATED_MS, a_job, a_session, a_turn, add_job, an_event, append, renew, start, until
from tests.engines.postgres import connect


@pytest.fixture
def database(each_database: str) -> str:
    """Of each kind."""
    return each_database


async def claim(store: Store, job_id: str = "j1", *, lease_s: float = 60) -> Claim:
    got = await store.claim(job_id, lease_s=lease_s, begin=start)
    assert isinstance(got, Claim)
    return got


async def write(store: Store, held: Claim, *made: Event, after: int, **changes: Any) -> None:
    await store.write(held, Write(held.job, events=list(made), **changes), after_seq=after)


async def log(store: Store, job_id: str = "j1") -> list[tuple[int | None, str]]:
    return [(event.seq, event.type) for event in await store.events_after(job_id, 0)]


async def the_record(store: Store, job_id: str = "j1") -> Record:
    record = await store.get(job_id)
    assert record is not None
    return record


# --- jobs by id and by list ------------------------------------------------------------------------------------------


async def test_a_created_job_is_read_back_whole(store: Store) -> None:
    job = a_job(
        filename="ü\u2028\x00.wav",
        metadata={"a": [1, {"b": None}]},
        sessions=[a_session("s", offset_ms=5)],
        turn_count=3,
    )
    made = [an_event("j1", 1, status="queued"), an_event("j1", 2, "job.warning", code="converted", message="…")]
    await store.create(job, made, owner="me", created_ms=CREATED_MS)
    record = await the_record(store)
    assert msgspec.structs.replace(record.job, queue_position=None) == job
    assert record.job.queue_position == 1
    assert (record.owner, record.epoch, record.event_seq, record.cancel_requested) == ("me", 0, 2, False)
    assert record.created_ms == CREATED_MS
    assert await store.events_after("j1", 0) == made
    assert await store.newest_seq("j1") == 2


async def test_what_is_not_there(store: Store) -> None:
    assert await store.get("nobody") is None
    assert await store.newest_seq("nobody") is None
    assert await store.events_after("nobody", 0) == []
    assert await store.turns("nobody") == []
    assert await store.claim("nobody", lease_s=60, begin=start) is None
    assert await store.amend("nobody", lambda record: Write(record.job)) is None
    assert not await store.delete("nobody")
    await store.request_cancel("nobody")
    assert await store.list(owner=None, limit=10) == []
    assert await store.stranded() == []
    assert await store.queue() == (0, None)


async def test_a_creation_tried_again_is_one_job(store: Store) -> None:
    """As the writer does when the answer to a commit was lost."""
    await add_job(store)
    await add_job(store)
    assert await log(store) == [(1, "job.status")]
    assert len(await store.list(owner=None, limit=10)) == 1


async def create_with_key(store: Store, job_id: str, key: str, fingerprint: str, owner: str = "") -> Use | None:
    made = [an_event(job_id, 1, status="queued")]
    return await store.create(a_job(job_id), made, owner=owner, created_ms=CREATED_MS, key=key, fingerprint=fingerprint)


async def test_a_key_makes_one_job_per_owner_and_is_freed_with_it(store: Store) -> None:
    assert await store.used("", "k") is None
    assert await create_with_key(store, "j1", "k", "f") is None
    assert await create_with_key(store, "j1", "k", "f") is None, "tried again, as the writer does"
    assert await create_with_key(store, "j2", "k", "g") == Use("j1", "f") == await store.used("", "k")
    assert await store.get("j2") is None
    assert await log(store, "j2") == []
    assert await create_with_key(store, "j3", "k", "f", owner="other") is None
    assert await create_with_key(store, "j4", "K", "f") is None, "keys have a case"
    await store.delete("j1")
    assert await store.used("", "k") is None
    assert await create_with_key(store, "j2", "k", "g") is None


async def test_of_many_that_race_for_a_key_one_wins(store: Store) -> None:
    others = await asyncio.gather(*(create_with_key(store, f"j{n}", "k", f"f{n}") for n in range(50)))
    winners = [n for n, use in enumerate(others) if use is None]
    assert len(winners) == 1
    assert {use for use in others if use is not None} == {Use(f"j{winners[0]}", f"f{winners[0]}")}
    assert [record.job.id for record in await store.list(owner=None, limit=100)] == [f"j{winners[0]}"]


async def test_keys_expire(store: Store) -> None:
    await create_with_key(store, "j1", "k1", "f")
    await create_with_key(store, "j2", "k2", "f")

    async def age(connection: AsyncConnection) -> None:
        older = idempotency.c.expires_ms - 24 * 3600 * 1000
        await connection.execute(update(idempotency).values(expires_ms=older))

    await store._writer.write("", age)
    assert await store.used("", "k1") is None
    assert await create_with_key(store, "j3", "k1", "g") is None
    assert await store.used("", "k1") == Use("j3", "g")
    assert len(await store._rows(select(idempotency.c.key))) == 1, "what has expired is gone"
    assert await store.get("j1") is not None


async def test_the_list_is_newest_first_ties_by_id_and_paged_without_loss(store: Store) -> None:
    for n in range(20):
        await add_job(store, f"j{n:02}", created_ms=CREATED_MS + n // 4)
    everything = [record.job.id for record in await store.list(owner=None, limit=100)]
    assert everything == sorted(everything, reverse=True)
    paged: list[str] = []
    before = None
    while page := await store.list(owner=None, limit=3, before=before):
        paged += [record.job.id for record in page]
        before = page[-1].created_ms, page[-1].job.id
    assert paged == everything


async def test_the_list_is_filtered(store: Store) -> None:
    await add_job(store, "j1", owner="a", created_ms=CREATED_MS, filename="100%_sure.wav")
    await add_job(store, "j2", owner="b", created_ms=CREATED_MS + 1, filename="Interview.wav")
    await add_job(store, "j3", owner="a", created_ms=CREATED_MS + 2, filename="view.wav")
    await claim(store, "j3")

    async def found(**filters: Any) -> list[str]:
        return [record.job.id for record in await store.list(**{"owner": None, "limit": 10} | filters)]

    assert await found(owner="a") == ["j3", "j1"]
    assert await found(owner="c") == []
    assert await found(statuses=["queued"]) == ["j2", "j1"]
    assert await found(statuses=["queued", "processing"]) == ["j3", "j2", "j1"]
    assert await found(created_after_ms=CREATED_MS + 1) == ["j3", "j2"], "inclusive"
    assert await found(created_before_ms=CREATED_MS + 1) == ["j1"], "exclusive"
    assert await found(limit=2) == ["j3", "j2"]


async def test_the_search_wants_every_word_wherever_it_was_said(store: Store) -> None:
    async def found(q: str, owner: str | None = None) -> str:
        return " ".join(record.job.id for record in await store.list(owner=owner, limit=10, q=q))

    await add_job(store, "j1", owner="a", created_ms=CREATED_MS, filename="100%_sure.wav")
    await add_job(store, "j2", owner="b", created_ms=CREATED_MS + 1, filename="Board-call.wav")
    await add_job(store, "j3", owner="a", created_ms=CREATED_MS + 2, filename="x.wav")
    held = await claim(store, "j1")
    turns = [
        a_turn(0, text="The quick brown Fox, don\u2019t you know"),
        a_turn(1, text="Straße; e\u0301te\u0301 100 %"),
    ]
    await write(store, held, an_event("j1", 3), after=2, turns=turns)
    held = await claim(store, "j2")
    await write(store, held, an_event("j2", 3), after=2, turns=[a_turn(0, text='quick "OR" dead foxes AND dons')])

    assert await found("") == await found(" \t") == "j3 j2 j1"
    assert await found("QUICK") == "j2 j1"
    assert await found("fox quick") == "j1", "any order; whole words"
    assert await found("été fox") == "j1", "in two turns, however the accents are written"
    assert await found("STRASSE") == await found("straße") == "j1"
    assert await found("don't") == await found("Don\u2019t!") == "j1"
    assert await found("fox call") == "", "all in one job"
    assert await found("board quick") == "j2", "the file's name too"
    assert await found("fox", owner="b") == ""
    for operators in ("fox OR dead", "fox NOT quick zzz", "NEAR(fox quick)", "qu*k", "q%k", "f_x", "words:fox", "fo?"):
        assert await found(operators) == "", operators
    for same in ('"quick', "quick*", "-quick", "(quick", "quick;--", "'quick'", "%quick%", "\\quick", "quick\x00"):
        assert await found(same) == "j2 j1", same
    for none in ("%", "_", "*", '"', "\\", "%_", "' OR 1=1 --", "\ud800"):
        assert await found(none) == "", none
    assert await found("a " * 127) == ""


async def test_the_search_knows_turns_as_they_stand_now(store: Store) -> None:
    async def found(q: str) -> bool:
        return bool(await store.list(owner=None, limit=10, q=q))

    await add_job(store, "j1", filename="name.wav")
    held = await claim(store)
    await write(store, held, an_event("j1", 3), after=2, turns=[a_turn(0, text="one"), a_turn(1, text="two")])
    await write(store, held, an_event("j1", 4), after=3, revised=[a_turn(0, text="won")])
    assert [await found(q) for q in ("one", "won", "two", "name")] == [False, True, True, True]
    held.job.status = Status.FAILED
    await write(store, held, an_event("j1", 5, "job.failed"), after=4)
    await store.amend("j1", lambda record: Write(record.job, withdraw_from=1))
    assert [await found(q) for q in ("won", "two", "name")] == [True, False, True]
    await store.delete("j1")
    await add_job(store, "j1", filename="other.wav")
    assert [await found(q) for q in ("won", "name", "other")] == [False, False, True], (
        "nothing of a deleted job is left"
    )


async def test_the_place_in_the_queue(store: Store) -> None:
    for n, created in enumerate([3, 1, 2, 2]):
        await add_job(store, f"j{n}", created_ms=CREATED_MS + created)
    places = {record.job.id: record.job.queue_position for record in await store.list(owner=None, limit=10)}
    assert places == {"j1": 1, "j2": 2, "j3": 3, "j0": 4}
    assert await store.queue() == (4, CREATED_MS + 1)
    await claim(store, "j1")
    assert (await the_record(store, "j1")).job.queue_position is None
    assert (await the_record(store, "j2")).job.queue_position == 1
    assert await store.queue() == (3, CREATED_MS + 2)


async def test_deleting_removes_every_row(store: Store) -> None:
    await add_job(store)
    held = await claim(store)
    await write(store, held, an_event("j1", 3, "turn.final"), after=2, turns=[a_turn()])
    assert await store.delete("j1")
    assert not await store.delete("j1")
    assert await store.get("j1") is None
    assert await store.events_after("j1", 0) == []
    assert await store.turns("j1") == []
    with pytest.raises(Fenced):
        await write(store, held, an_event("j1", 4), after=3)
    with pytest.raises(Fenced):
        await renew(store, held, lease_s=60, job=None)
    await add_job(store)  # what is left of another job of that name would collide
    assert await log(store) == [(1, "job.status")]


# --- claims ----------------------------------------------------------------------------------------------------------


async def test_a_claim_takes_a_queued_job_once(store: Store) -> None:
    await add_job(store, owner="me")
    held = await claim(store)
    assert (held.epoch, held.event_seq, held.owner, held.finalized) == (1, 2, "me", {})
    assert held.job.status == Status.PROCESSING
    assert await log(store) == [(1, "job.status"), (2, "job.status")]
    busy = await store.claim("j1", lease_s=60, begin=start)
    assert isinstance(busy, Busy)
    assert 55 < busy.seconds <= 60
    assert (await the_record(store)).epoch == 1


async def test_of_many_claims_at_once_one_wins(store: Store) -> None:
    await add_job(store)
    got = await asyncio.gather(*[store.claim("j1", lease_s=60, begin=start) for _ in range(50)])
    assert sum(isinstance(one, Claim) for one in got) == 1
    assert sum(isinstance(one, Busy) for one in got) == 49


async def test_a_claim_whose_lease_ran_out_is_taken_over_and_fenced(store: Store) -> None:
    await add_job(store)
    dead = await claim(store, lease_s=-1)
    await write(store, dead, an_event("j1", 3, "turn.final"), after=2, turns=[a_turn(end_ms=4000)])
    alive = await claim(store)
    assert (alive.epoch, alive.event_seq, alive.finalized) == (2, 4, {"s1": 4000})
    for act in (write(store, dead, an_event("j1", 5), after=4), renew(store, dead, lease_s=60, job=None)):
        with pytest.raises(Fenced):
            await act
    await write(store, alive, an_event("j1", 5), after=4)
    assert [seq for seq, _ in await log(store)] == [1, 2, 3, 4, 5]


async def test_where_a_successor_starts_is_told_per_session(store: Store) -> None:
    await add_job(store)
    held = await claim(store, lease_s=-1)
    turns = [
        a_turn(0, session_id="a", end_ms=900),
        a_turn(1, session_id="b", end_ms=700),
        a_turn(2, session_id="a", end_ms=800),
    ]
    await write(store, held, *[an_event("j1", n, "turn.final") for n in (3, 4, 5)], after=2, turns=turns)
    assert (await claim(store)).finalized == {"a": 900, "b": 700}


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELED])
async def test_an_ended_job_is_not_claimed(store: Store, status: Status) -> None:
    await add_job(store)
    held = await claim(store)
    held.job.status = status
    await write(store, held, an_event("j1", 3, f"job.{status}"), after=2)
    assert await store.claim("j1", lease_s=60, begin=start) is None
    assert await store.stranded() == []


async def test_a_job_handed_back_can_be_claimed_at_once_or_when_its_time_has_come(store: Store) -> None:
    await add_job(store)
    for wait, after in ((0.0, 2), (60.0, 4)):
        held = await claim(store)
        held.job.status = Status.QUEUED
        await write(store, held, an_event("j1", after + 1), after=after, not_before_s=wait)
    busy = await store.claim("j1", lease_s=60, begin=start)
    assert isinstance(busy, Busy)
    assert 55 < busy.seconds <= 60
    assert await store.stranded() == []


async def test_expired_leases_free_every_running_job(store: Store) -> None:
    for job_id in ("j1", "j2", "j3"):
        await add_job(store, job_id)
    await claim(store, "j1")
    await claim(store, "j2")
    assert await store.stranded() == [("j3", 0)]
    await store.expire_leases()
    assert await store.stranded() == [("j1", 1), ("j2", 1), ("j3", 0)]


async def test_the_stranded_are_told_oldest_first_and_bounded(store: Store) -> None:
    for n, created in enumerate([3, 1, 2]):
        await add_job(store, f"j{n}", created_ms=CREATED_MS + created)
    await claim(store, "j0", lease_s=-1)
    assert await store.stranded() == [("j1", 0), ("j2", 0), ("j0", 1)]
    assert await store.stranded(2) == [("j1", 0), ("j2", 0)]


# --- strikes: claims that died without a new final -------------------------------------------------------------------


def strict(record: Record, strikes: int) -> tuple[Job, list[Event]]:
    job, made = start(record, strikes)
    if strikes >= MAX_STRIKES:
        job.status = Status.FAILED
        made = [an_event(job.id, record.event_seq + 1, "job.failed")]
    return job, made


async def die(store: Store) -> Claim | Busy | None:
    return await store.claim("j1", lease_s=-1, begin=strict)


async def test_the_fourth_claim_after_three_that_died_fails_the_job(store: Store) -> None:
    await add_job(store)
    assert [isinstance(await die(store), Claim) for _ in range(4)] == [True, True, True, False]
    assert (await the_record(store)).job.status == Status.FAILED
    assert (await log(store))[-1] == (5, "job.failed")
    assert await die(store) is None


async def test_a_new_final_clears_the_strikes_and_its_own_claim_counts_from_there(store: Store) -> None:
    await add_job(store)
    await die(store)
    await die(store)
    held = await die(store)
    assert isinstance(held, Claim)
    await write(store, held, an_event("j1", 5, "turn.final"), after=4, turns=[a_turn()])
    assert [isinstance(await die(store), Claim) for _ in range(4)] == [True, True, True, False]


async def test_what_is_no_final_clears_no_strike(store: Store) -> None:
    await add_job(store)
    for n in range(3):
        held = await die(store)
        assert isinstance(held, Claim)
        await write(store, held, an_event("j1", 3 + 2 * n, "session.begin"), after=2 + 2 * n)
        await renew(store, held, lease_s=-1, job=held.job)
    assert await die(store) is None


async def test_handing_back_and_retrying_clear_the_strikes(store: Store) -> None:
    await add_job(store)
    await die(store)
    await die(store)
    held = await die(store)
    assert isinstance(held, Claim)
    held.job.status = Status.QUEUED
    await write(store, held, an_event("j1", 5), after=4)
    assert [isinstance(await die(store), Claim) for _ in range(4)] == [True, True, True, False]
    await append(store, "j1", ("job.restarted", {}), status=Status.QUEUED)
    assert [isinstance(await die(store), Claim) for _ in range(4)] == [True, True, True, False]


# --- writes of a claim -----------------------------------------------------------------------------------------------


async def test_a_step_keeps_job_events_and_turns_together(store: Store) -> None:
    await add_job(store)
    held = await claim(store)
    held.job.turn_count = 2
    made = [an_event("j1", 3, "turn.final"), an_event("j1", 4, "turn.final")]
    await write(store, held, *made, after=2, turns=[a_turn(0), a_turn(1, text="second")])
    assert (await the_record(store)).job.turn_count == 2
    assert (await store.events_after("j1", 2)) == made
    assert await store.turns("j1") == [a_turn(0), a_turn(1, text="second")]
    await write(
        store, held, an_event("j1", 5, "turn.revised"), after=4, revised=[a_turn(1, text="mended", end_ms=7000)]
    )
    assert await store.turns("j1", after=0) == [a_turn(1, text="mended", end_ms=7000)]
    assert await store.turns("j1", limit=1) == [a_turn(0)]
    assert (await store.claim("j1", lease_s=1, begin=start)) is not None


async def test_a_claim_whose_answer_was_lost_is_ours_at_once_and_no_strike(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease that it wrote need not run out, and what came of it is fenced."""
    await add_job(store)
    end, answers = Writer._end, iter([ConnectionResetError()])

    async def lose_the_first(connection: AsyncConnection, group: Any) -> None:
        await end(connection, group)
        for lost in answers:
            raise lost

    monkeypatch.setattr(Writer, "_end", staticmethod(lose_the_first))
    held = await claim(store)
    assert held.epoch == 2
    events = [msgspec.json.decode(event.json) for event in await store.events_after("j1", 1)]
    assert [event["strikes"] for event in events] == [0, 0]
    await write(store, held, an_event("j1", 4, "turn.final"), after=3, turns=[a_turn()])
    with pytest.raises(Fenced):
        await write(store, msgspec.structs.replace(held, epoch=1), an_event("j1", 5), after=4)
    assert isinstance(await store.claim("j1", lease_s=60, begin=start), Busy)


async def test_a_step_tried_again_changes_nothing(store: Store) -> None:
    """The commit went through and only its answer was lost."""
    await add_job(store)
    held = await claim(store)
    for _ in range(3):
        await write(store, held, an_event("j1", 3, "turn.final"), after=2, turns=[a_turn()])
    assert [seq for seq, _ in await log(store)] == [1, 2, 3]
    assert len(await store.turns("j1")) == 1
    await write(store, held, an_event("j1", 4), after=3)
    with pytest.raises(Fenced):
        await write(store, held, an_event("j1", 3), after=2)


async def test_the_last_step_tried_again_changes_nothing(store: Store) -> None:
    await add_job(store)
    held = await claim(store)
    held.job.status = Status.COMPLETED
    for _ in range(2):
        await write(store, held, an_event("j1", 3, "job.completed"), after=2)
    assert [seq for seq, _ in await log(store)] == [1, 2, 3]


async def test_a_step_that_follows_another_event_is_refused_whole(store: Store) -> None:
    await add_job(store)
    held = await claim(store)
    for after in (0, 3):
        with pytest.raises(Fenced):
            await write(store, held, an_event("j1", 9, "turn.final"), after=after, turns=[a_turn()])
    assert [seq for seq, _ in await log(store)] == [1, 2]
    assert await store.turns("j1") == []


async def test_an_ended_claim_writes_no_more(store: Store) -> None:
    await add_job(store)
    held = await claim(store)
    held.job.status = Status.FAILED
    await write(store, held, an_event("j1", 3, "job.failed"), after=2)
    with pytest.raises(Fenced):
        await write(store, held, an_event("j1", 4), after=3)
    with pytest.raises(Fenced):
        await renew(store, held, lease_s=60, job=None)


async def test_renewing_extends_the_lease_and_notes_the_progress(store: Store) -> None:
    await add_job(store)
    held = await claim(store, lease_s=-1)
    held.job.progress.sent_ms = 4200
    assert not await renew(store, held, lease_s=60, job=None)
    assert (await the_record(store)).job.progress.sent_ms == 0
    assert isinstance(await store.claim("j1", lease_s=60, begin=start), Busy)
    await renew(store, held, lease_s=60, job=held.job)
    assert (await the_record(store)).job.progress.sent_ms == 4200
    assert (await the_record(store)).event_seq == 2


async def test_word_of_a_cancel_is_found_when_renewing_by_whoever_holds_the_job(store: Store) -> None:
    await add_job(store)
    assert not await store.request_cancel("j1"), "nobody holds it"
    held = await claim(store, lease_s=-1)
    assert not await renew(store, held, lease_s=-1, job=None)
    assert await store.request_cancel("j1")
    assert await renew(store, held, lease_s=-1, job=None)
    assert await renew(store, await claim(store), lease_s=60, job=None), "the claim before died"


async def test_word_of_a_cancel_outlives_a_job_handed_back_but_not_its_end(store: Store) -> None:
    """A drain at the same moment must not swallow the cancel."""
    await add_job(store)
    held = await claim(store)
    await store.request_cancel("j1")
    held.job.status = Status.QUEUED
    await write(store, held, an_event("j1", 3), after=2)
    again = await claim(store)
    assert await renew(store, again, lease_s=60, job=None)
    again.job.status = Status.CANCELED
    await write(store, again, an_event("j1", 5, "job.canceled"), after=4)
    assert not (await the_record(store)).cancel_requested


# --- amends ----------------------------------------------------------------------------------------------------------


async def test_an_amend_sees_the_job_and_changes_it(store: Store) -> None:
    await add_job(store, owner="me")
    held = await claim(store)
    await write(store, held, *[an_event("j1", n, "turn.final") for n in (3, 4)], after=2, turns=[a_turn(0), a_turn(1)])
    held.job.status = Status.FAILED
    await write(store, held, an_event("j1", 5, "job.failed"), after=4)

    def change(record: Record) -> Write:
        assert (record.owner, record.event_seq, record.finalized) == ("me", 5, {"s1": 2000})
        record.job.status = Status.QUEUED
        return Write(record.job, events=[an_event("j1", 6, "job.restarted")], withdraw_from=1)

    record = await store.amend("j1", change)
    assert record is not None
    assert (record.job.status, record.event_seq) == (Status.QUEUED, 6)
    assert await store.turns("j1") == [a_turn(0)]
    assert (await claim(store)).epoch == 2


async def test_an_amend_may_leave_the_job_or_refuse(store: Store) -> None:
    await add_job(store)
    record = await store.amend("j1", lambda record: None)
    assert record is not None
    assert record.job.status == Status.QUEUED

    def refuse(record: Record) -> Write:
        raise CallerError("not_retryable", "no")

    with pytest.raises(CallerError, match="no"):
        await store.amend("j1", refuse)
    assert await log(store) == [(1, "job.status")]


# --- many at once ----------------------------------------------------------------------------------------------------


async def test_two_hundred_writers_leave_gapless_logs(store: Store) -> None:
    async def live(n: int) -> None:
        job_id = f"j{n:03}"
        await add_job(store, job_id)
        held = await claim(store, job_id)
        for seq in (3, 5):
            made = [an_event(job_id, seq, "turn.final"), an_event(job_id, seq + 1, "job.warning")]
            await write(store, held, *made, after=seq - 1, turns=[a_turn(seq, session_id=job_id)])
            await renew(store, held, lease_s=60, job=held.job)
        held.job.status = Status.COMPLETED
        await write(store, held, an_event(job_id, 7, "job.completed"), after=6)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for n in range(200):
            group.create_task(live(n))
    assert len(await store.list(owner=None, limit=1000, statuses=["completed"])) == 200
    for n in range(200):
        assert [seq for seq, _ in await log(store, f"j{n:03}")] == [1, 2, 3, 4, 5, 6, 7]
        assert len(await store.turns(f"j{n:03}")) == 2


async def test_a_refusal_in_a_group_concerns_nobody_else(store: Store) -> None:
    for n in range(30):
        await add_job(store, f"j{n:02}")
    fenced = await claim(store, "j05", lease_s=-1)
    await claim(store, "j05")
    commits = 0
    transact = store._writer._transact

    async def counted(group: Any) -> None:
        nonlocal commits
        commits += 1
        await transact(group)

    store._writer._transact = counted  # type: ignore[method-assign]
    acts = [append(store, f"j{n:02}", ("job.warning", {})) for n in range(30)]
    *_, refused = await asyncio.gather(*acts, write(store, fenced, an_event("j05", 4), after=3), return_exceptions=True)
    assert isinstance(refused, Fenced)
    assert [await store.newest_seq(f"j{n:02}") for n in range(30)] == [4 if n == 5 else 2 for n in range(30)]
    assert commits <= 2, "one refusal must not cost everyone a commit of his own"


async def test_a_failure_in_a_group_is_told_to_whom_it_concerns(store: Store) -> None:
    await add_job(store, "j1")

    async def collide(n: int) -> None:
        async def run(connection: Any) -> None:
            await connection.execute(text("INSERT INTO events (job_id, seq, type, doc) VALUES ('j1', 1, 'twice', '')"))

        await store._writer.write(f"x{n}", run)

    results = await asyncio.gather(
        *[add_job(store, f"y{n}") for n in range(5)], collide(1), collide(2), return_exceptions=True
    )
    assert [isinstance(result, IntegrityError) for result in results] == [False] * 5 + [True] * 2
    assert len(await store.list(owner=None, limit=10)) == 6


async def test_writes_of_one_job_keep_their_order(store: Store) -> None:
    await add_job(store)
    held = await claim(store)
    acts = [write(store, held, an_event("j1", seq), after=seq - 1) for seq in range(3, 103)]
    await asyncio.gather(*acts)
    assert [seq for seq, _ in await log(store)] == list(range(1, 101))
    assert await store.newest_seq("j1") == 102


async def test_a_step_keeps_the_job_as_it_was_when_it_was_asked_for(store: Store) -> None:
    """The recorder ends a job while the step before waits in line."""
    await add_job(store)
    held = await claim(store)
    step = asyncio.create_task(write(store, held, an_event("j1", 3), after=2))
    await asyncio.sleep(0)
    held.job.status = Status.COMPLETED
    await step
    assert (await the_record(store)).job.status == Status.PROCESSING
    await write(store, held, an_event("j1", 4, "job.completed"), after=3)
    assert (await the_record(store)).job.status == Status.COMPLETED


async def test_a_cancelled_caller_never_half_writes(store: Store) -> None:
    """At whatever moment it is cancelled: the step is there whole, or not at all."""
    outcomes = set()
    for n in range(60):
        job_id = f"j{n:02}"
        await add_job(store, job_id)
        held = await claim(store, job_id)
        made = [an_event(job_id, seq, "turn.final") for seq in (3, 4, 5)]
        turns = [a_turn(index, session_id=job_id) for index in range(3)]
        impatient = asyncio.create_task(append(store, job_id, ("job.warning", {}), ("job.warning", {})))
        patient = asyncio.create_task(write(store, held, *made, after=2, turns=turns))
        for _ in range(n):
            await asyncio.sleep(0)
        for task in (impatient, patient):
            task.cancel()
        await asyncio.wait([impatient, patient])
        await add_job(store, f"k{n:02}")  # whatever was in the line before is through now
        seqs = [seq for seq, _ in await log(store, job_id)]
        turn_count = len(await store.turns(job_id))
        assert (len(seqs), turn_count) in {(2, 0), (4, 0), (5, 3)}
        assert seqs == list(range(1, len(seqs) + 1))
        assert await store.newest_seq(job_id) == seqs[-1]
        outcomes.add(len(seqs))
    assert len(outcomes) >= 2, "both ends of the race were seen"


async def test_reading_while_writing_sees_whole_steps(store: Store) -> None:
    await add_job(store)
    held = await claim(store)
    done = False

    async def read() -> int:
        looks = 0
        while not done:
            record = await the_record(store)
            assert await store.newest_seq("j1") or record.event_seq <= 0
            events = await store.events_after("j1", 0, 1000)
            assert len(events) >= record.event_seq, "the log is never behind the job"
            looks += 1
        return looks

    reading = asyncio.create_task(read())
    for seq in range(3, 43, 2):
        await write(store, held, an_event("j1", seq), an_event("j1", seq + 1), after=seq - 1)
    done = True
    assert await reading > 0


# --- while the database is away --------------------------------------------------------------------------------------


@asynccontextmanager
async def locked(url: str) -> AsyncIterator[None]:
    """Somebody else holds every lock that a write wants."""
    if url.startswith("postgresql"):
        other = await connect(url)
        try:
            await other.execute("BEGIN; LOCK TABLE jobs, events, idempotency, api_keys IN SHARE MODE")
            yield
        finally:
            await other.close()
    else:
        connection = sqlite3.connect(url.removeprefix("sqlite+aiosqlite:///"), isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.close()


@pytest.mark.parametrize("each_database", ["sqlite"], indirect=True)  # PostgreSQL locks no more than rows
async def test_while_it_is_locked_the_impatient_fail_soon_and_the_patient_wait(store: Store, database: str) -> None:
    await add_job(store)
    held = await claim(store)
    async with locked(database):
        waiting = asyncio.create_task(write(store, held, an_event("j1", 3, "turn.final"), after=2, turns=[a_turn()]))
        await until(lambda: not store._writer._waiting)  # the patient are first in line
        for _ in range(2):
            began = monotonic()
            acts = [
                add_job(store, "j0"),
                append(store, "j2", ("job.warning", {})),
                store.delete("j1"),
                store.request_cancel("j1"),
                renew(store, held, lease_s=60, job=None),  # whose worker asks again a second later
            ]
            results = await asyncio.gather(*acts, return_exceptions=True)
            assert [type(result) for result in results] == [Unavailable] * 5
            assert monotonic() - began < 1.25
            assert await log(store) == [(1, "job.status"), (2, "job.status")], "reading goes on"
        assert not waiting.done()
    async with asyncio.timeout(5):
        await waiting
    assert [seq for seq, _ in await log(store)] == [1, 2, 3]
    assert len(await store.list(owner=None, limit=10)) == 1, "what was refused left nothing, then or later"
    await add_job(store, "j0")


async def test_who_leaves_the_line_takes_an_impatient_write_along_but_not_a_patient_one(
    store: Store, database: str
) -> None:
    await add_job(store)
    held = await claim(store)
    async with locked(database):
        patient = asyncio.create_task(write(store, held, an_event("j1", 3), after=2))
        impatient = asyncio.create_task(add_job(store, "j2"))
        await until(lambda: len(store._writer._waiting) == 2)
        for task in (patient, impatient):
            task.cancel()
        await asyncio.wait([patient, impatient])
    await add_job(store, "j3")
    assert [seq for seq, _ in await log(store)] == [1, 2, 3]
    assert await store.get("j2") is None


@pytest.mark.parametrize("each_database", ["sqlite"], indirect=True)
async def test_a_commit_survives_a_power_cut(store: Store) -> None:
    async def run(connection: Any) -> list[Any]:
        return [(await connection.execute(text(f"PRAGMA {name}"))).scalar() for name in ("journal_mode", "synchronous")]

    assert await store._writer.write("", run) == ["wal", 2], "each commit is forced to the disk"


async def test_a_short_lock_is_not_noticed(store: Store, database: str) -> None:
    async with locked(database):
        creating = asyncio.create_task(add_job(store))
        await until(lambda: bool(store._writer._waiting))  # tried once, back in line
    async with asyncio.timeout(5):
        await creating
    assert await store.newest_seq("j1") == 1


async def test_closing_while_it_is_locked_does_not_hang(database: str) -> None:
    async with asyncio.timeout(5):
        async with open_store(database) as store:
            await add_job(store)
            held = await claim(store)
            lock = locked(database)
            await lock.__aenter__()
            waiting = asyncio.create_task(write(store, held, an_event("j1", 3), after=2))
            await until(lambda: bool(store._writer._waiting))
        with pytest.raises(Unavailable):
            await waiting
        await lock.__aexit__(None, None, None)
    async with open_store(database) as store:
        assert [seq for seq, _ in await log(store)] == [1, 2]
    with pytest.raises(Unavailable):
        await add_job(store, "j2")


@pytest.mark.parametrize("each_database", ["sqlite"], indirect=True)
async def test_a_full_disk_is_said_at_once_and_the_patient_wait(store: Store, database: str) -> None:
    await add_job(store)
    held = await claim(store)
    pages: list[int] = []

    async def limit(pragma: str) -> None:
        async def run(connection: Any) -> None:
            pages.append((await connection.execute(text(f"PRAGMA {pragma}"))).scalar())

        await store._writer.write("", run)

    await limit("page_count")
    await limit(f"max_page_count={pages[0]}")
    big = "x" * 200_000
    waiting = asyncio.create_task(
        write(store, held, an_event("j1", 3, "turn.final"), after=2, turns=[a_turn(text=big)])
    )
    with pytest.raises(StorageFull):
        await add_job(store, "j2", metadata={"big": big})
    assert await store.get("j2") is None
    assert not waiting.done()
    await limit("max_page_count=1000000")
    async with asyncio.timeout(5):
        await waiting
    assert [seq for seq, _ in await log(store)] == [1, 2, 3]


# --- the schema ------------------------------------------------------------------------------------------------------


async def test_the_migrations_build_the_schema_of_the_code(database: str) -> None:
    def compare(connection: Connection) -> Any:
        return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)

    engine = create_async_engine(database)
    try:
        async with engine.connect() as connection:
            assert await connection.run_sync(compare) == []
            await connection.exec_driver_sql("DROP INDEX jobs_by_owner")
            assert await connection.run_sync(compare) != [], "the comparison sees what is missing"
    finally:
        await engine.dispose()


async def test_what_is_there_when_migrating_can_be_searched(database: str) -> None:
    async with open_store(database) as store:
        await add_job(store, "j1", filename="old.wav")
        held = await claim(store)
        await write(store, held, an_event("j1", 3), after=2, turns=[a_turn(0, text="Said before."), a_turn(1)])
    engine = create_async_engine(database)
    async with engine.begin() as connection:
        for table in ("said", "idempotency", "peaks", "api_keys", "own_secrets", "session_pace"):
            await connection.exec_driver_sql(f"DROP TABLE {table}")
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0002'")
    await engine.dispose()
    await migrate(database)
    async with open_store(database) as store:
        for q in ("said", "hello before", "old"):
            assert [record.job.id for record in await store.list(owner=None, limit=10, q=q)] == ["j1"], q


async def test_migrating_twice_loses_nothing(database: str) -> None:
    async with open_store(database) as store:
        await add_job(store)
    await migrate(database)
    await migrate(database)
    async with open_store(database) as store:
        assert await log(store) == [(1, "job.status")]
