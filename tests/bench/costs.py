"""What keeping a turn and reading one cost beside the plain ways: `python -m tests.bench.costs [--full] [--out DIR]`.

Keeping: rows of a final turn of 30 words into SQLite, WAL, synchronous=FULL for all, on one core. N waiters each want their next row
durable before they go on, as N jobs do. `group commit` is the service's writer with the same row as the plain ways; `a final, whole` is
all that the service keeps of one (`Store.write`: fence, turn, words to search, event). The plain ways commit each row: SQLAlchemy's ORM
over aiosqlite with a session for each row, and aiosqlite alone; both write one at a time, as SQLite does, and never wait for a lock.
CPU is of the whole process, its threads too.

Reading: one Turn of 30 words, as upstream sends it. Contenders take turns in one process; medians count.
"""

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import msgspec
import uvloop
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.core.job import Audio, Claim, Job, Progress, Session, Status, Turn, TurnWord, make_event, to_json
from service.core.protocol import decode
from service.intake import begin_claim
from service.runtime import SystemClock
from service.store import Write, migrate, open_store
from service.store.engines import open_engine, open_writer
from service.store.prepared import Prepared
from service.store.writer import Writer
from tests.bench.harness import Cell, Report, arguments, cores, interleaved, percentile

WORDS = 30
Keep = Callable[[int], Awaitable[None]]  # makes the next row of that waiter durable


class Base(DeclarativeBase):
    """Of the plain way's only table."""


class Row(Base):
    """A final turn."""

    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str]
    idx: Mapped[int]
    doc: Mapped[str]


def final(index: int) -> Turn:
    """A final turn as it is kept."""
    words = [
        TurnWord(text=f"word{n}", start_ms=150 * n, end_ms=150 * n + 120, confidence=0.98765, speaker=None)
        for n in range(WORDS)
    ]
    return Turn(
        index=index, start_ms=0, end_ms=4500, transcript=" ".join(word.text for word in words), words=words, formatted=True,
        session_id="s", turn_order=index, end_of_turn_confidence=0.91, language=None, speaker=None, channel=None, latency_ms=9,
    )  # fmt: skip


DOC = to_json(final(0)).decode()


# --- keeping ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def group_commit(path: Path, _waiters: int) -> AsyncIterator[Keep]:
    """The service's writer, the same row."""
    engine = open_engine(f"sqlite+aiosqlite:///{path}", writing=True)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    lane = open_writer(f"sqlite+aiosqlite:///{path}")
    writer = Writer(lane)
    task = asyncio.create_task(writer.run())
    statement = Prepared(insert(Row), "job_id", "idx", "doc")

    async def keep(waiter: int) -> None:
        async def run(connection: AsyncConnection) -> None:
            await statement.run(connection, {"job_id": str(waiter), "idx": 0, "doc": DOC})

        await writer.write(str(waiter), run, patient=True)

    yield keep
    writer.close()
    await task
    await lane.dispose()


@asynccontextmanager
async def whole_final(path: Path, waiters: int) -> AsyncIterator[Keep]:
    """Everything that the service keeps of a final."""
    url, clock = f"sqlite+aiosqlite:///{path}", SystemClock()
    await migrate(url)
    async with open_store(url) as store:
        claims: list[Claim] = []
        for number in range(waiters):
            job = Job(
                id=f"job{number}", status=Status.QUEUED, created_at="", filename="a.wav", options={}, progress=Progress(0, 1),
                audio=Audio(bytes=0, sha256="", duration_ms=1, sample_rate=16000, channels=1, encoding="pcm", converted=False),
            )  # fmt: skip
            await store.create(job, [make_event(job.id, 1, "job.queued", 0, {})], owner="", created_ms=0)
            claim = await store.claim(
                job.id, lease_s=3600, begin=lambda record, strikes: begin_claim(clock, record, strikes)
            )
            assert isinstance(claim, Claim)
            claim.job.sessions.append(Session(id="s", model=None, channel=None, offset_ms=0))
            claims.append(claim)

        async def keep(waiter: int) -> None:
            claim = claims[waiter]
            turn = final(claim.job.turn_count)
            told = make_event(claim.job.id, claim.event_seq + 1, "turn.final", 0, {"turn": turn})
            claim.job.turn_count += 1
            await store.write(claim, Write(claim.job, [told], [turn]), after_seq=claim.event_seq)
            claim.event_seq += 1

        yield keep


@asynccontextmanager
async def sqlalchemy_per_row(path: Path, _waiters: int) -> AsyncIterator[Keep]:
    """An ORM session and a commit for each row."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", pool_size=1, max_overflow=0, pool_timeout=3600)

    @event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: Any, _record: object) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)

    async def keep(waiter: int) -> None:
        async with AsyncSession(engine) as session:
            session.add(Row(job_id=str(waiter), idx=0, doc=DOC))
            await session.commit()

    yield keep
    await engine.dispose()


@asynccontextmanager
async def aiosqlite_per_row(path: Path, _waiters: int) -> AsyncIterator[Keep]:
    """An INSERT and a commit for each row."""
    lock = asyncio.Lock()
    async with aiosqlite.connect(path) as connection:
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            await connection.execute(f"PRAGMA {pragma}")
        await connection.execute("CREATE TABLE row (id INTEGER PRIMARY KEY, job_id TEXT, idx INTEGER, doc TEXT)")

        async def keep(waiter: int) -> None:
            async with lock:
                await connection.execute("INSERT INTO row (job_id, idx, doc) VALUES (?, ?, ?)", (str(waiter), 0, DOC))
                await connection.commit()

        yield keep


KEEPING = {"group commit": group_commit, "a final, whole": whole_final,
           "SQLAlchemy, a commit per row": sqlalchemy_per_row, "aiosqlite, a commit per row": aiosqlite_per_row}  # fmt: skip
PLAIN = "SQLAlchemy, a commit per row"


async def _kept(name: str, waiters: int, seconds: float) -> Mapping[str, float]:
    took: list[float] = []
    with tempfile.TemporaryDirectory(prefix="turnwire-bench-") as directory:
        async with KEEPING[name](Path(directory) / "rows.db", waiters) as keep:

            async def wait(waiter: int, until: float) -> None:
                while True:
                    before = time.monotonic()
                    await keep(waiter)
                    took.append(time.monotonic() - before)
                    if time.monotonic() >= until:
                        break

            await asyncio.gather(*(wait(waiter, 0) for waiter in range(waiters)))  # connections and caches
            took.clear()
            began, used = time.monotonic(), time.process_time()
            await asyncio.gather(*(wait(waiter, began + seconds) for waiter in range(waiters)))
            spent, passed = time.process_time() - used, time.monotonic() - began
    return {
        "rows": len(took) / passed, "us": spent / len(took) * 1e6,
        "p50": 1000 * percentile(took, 0.5), "p99": 1000 * percentile(took, 0.99),
    }  # fmt: skip


def keeping(report: Report, counts: tuple[int, ...], seconds: float, rounds: int) -> None:
    """Table, goal and plot."""
    rows: list[list[Cell]] = []
    for waiters in counts:
        found = interleaved(KEEPING, rounds, lambda name, n=waiters: uvloop.run(_kept(name, n, seconds)))  # type: ignore[misc]
        plain = found[PLAIN]
        rows += [
            [waiters, name, f["rows"], f["rows"] / plain["rows"], f["us"], plain["us"] / f["us"], f["p50"], f["p99"]]
            for name, f in found.items()
        ]
    columns = ["waiters", "", "rows/s", "x SQLAlchemy", "CPU µs/row", "times cheaper", "p50 ms", "p99 ms"]
    report.table(f"keeping turns, synchronous=FULL, medians of {rounds} rounds", columns, rows)
    ours = found["group commit"]
    report.goal(
        f"rows a second of SQLAlchemy's commits per row, {counts[-1]} waiters",
        ours["rows"] / plain["rows"],
        at_least=20,
    )
    report.goal(f"CPU a row of SQLAlchemy's, {counts[-1]} waiters", ours["us"] / plain["us"], at_most=0.1)
    report.bars("keeping", f"CPU of a row, {counts[-1]} waiters", "µs", {name: f["us"] for name, f in found.items()})


# --- reading ---------------------------------------------------------------------------------------------------------


def upstream_turn() -> str:
    """A Turn of 30 words."""
    words = [
        {"text": f"word{n}", "word_is_final": True, "start": 150 * n, "end": 150 * n + 120, "confidence": 0.98765}
        for n in range(WORDS)
    ]
    turn = {"type": "Turn", "turn_order": 7, "turn_is_formatted": True, "end_of_turn": True, "words": words,
            "transcript": " ".join(str(word["text"]) for word in words), "end_of_turn_confidence": 0.91}  # fmt: skip
    return json.dumps(turn)


def ways() -> dict[str, Callable[[str], object]]:
    """How to read it. Without the SDK its ways are not there."""
    found: dict[str, Callable[[str], object]] = {
        "this service": decode, "json.loads": json.loads, "msgspec, untyped": msgspec.json.decode,
    }  # fmt: skip
    try:
        from assemblyai.streaming.v3 import TurnEvent
    except ImportError:
        return found
    found["pydantic, validate_json"] = TurnEvent.model_validate_json
    found["SDK: json.loads and its model"] = lambda text: TurnEvent.model_validate(json.loads(text))
    return found


def reading(report: Report, seconds: float, rounds: int) -> None:
    """Table, goal and plot."""
    turn, every = upstream_turn(), ways()

    def measure(name: str) -> Mapping[str, float]:
        read, count, used = every[name], 0, time.process_time()
        while (spent := time.process_time() - used) < seconds:
            for _ in range(100):
                read(turn)
            count += 100
        return {"us": spent / count * 1e6}

    found = {name: f["us"] for name, f in interleaved(every, rounds, measure).items()}
    ours = found["this service"]
    rows: list[list[Cell]] = [[name, us, us / ours] for name, us in found.items()]
    report.table(
        f"reading a Turn of {WORDS} words, {len(turn)} bytes, medians of {rounds} rounds", ["", "µs", "x ours"], rows
    )
    report.goal("times json.loads' cost", found["json.loads"] / ours, at_least=3)
    report.bars("reading", f"Reading a Turn of {WORDS} words", "µs", found)


def run(out: Path, *, counts: tuple[int, ...], seconds: float, rounds: int) -> Report:
    """Both; smaller figures try whether it runs."""
    report = Report("costs", ("sqlalchemy", "aiosqlite", "msgspec", "pydantic", "assemblyai", "uvloop"))
    keeping(report, counts, seconds, rounds)
    reading(report, seconds / 10, rounds)
    report.write(out)
    return report


def main() -> None:
    """Measure on the last core, where the benchmarks measure."""
    given = arguments(__doc__, "costs").parse_args()
    os.sched_setaffinity(0, {cores()[1]})
    run(given.out, counts=(20, 200, 1000) if given.full else (200,), seconds=1.5 if given.full else 1.0, rounds=3)


if __name__ == "__main__":
    main()
