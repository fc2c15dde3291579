"""Whether a stream costs the same among many as among few, and late in a long file as at its start.

    python -m tests.bench.growth [--full] [--out DIR]; a C compiler and OpenSSL's headers (apt-get install gcc libssl-dev)

The whole service with persistence and one subscriber per stream (`tests.bench.whole`), TLS, 100 ms chunks. First streams are added to
one process. Then the same window is measured at the start, in the middle and at the end of a file of three hours. Nobody waits three
hours for that: the store is given what a worker that died there had kept (all final turns and events of the audio so far, as long as
the far end's), the service is started on it, resumes at the last final turn as after any crash, and streams at real speed. So what
could grow is there: the file, its position, the tables, the log; only the hours of running are not (`pytest -m soak` has
those). Each time a late subscriber then reads the job's events from the first on.
"""

import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path

from service.core.job import Audio, Claim, Event, Job, Progress, Session, Status, Turn, TurnWord, links, make_event
from service.intake import begin_claim
from service.runtime import SystemClock
from service.store import Store, Write, migrate, open_store
from tests.bench.far_end import FarEnd, Figures, window
from tests.bench.harness import Cell, Report, arguments, cores, cpu_seconds, rss_bytes, stop
from tests.bench.whole import Whole, whole
from tests.wavs import wav_bytes

HOURS, RATE = 3.0, 8000  # telephony: the hash of half as many bytes is waited for before a job streams
CHUNK_MS = 100
TURN_MS, WORDS = 3400, 22  # as the far end speaks
BATCH = 250  # turns of a commit


# --- streams ---------------------------------------------------------------------------------------------------------


def streams(report: Report, far: FarEnd, counts: Sequence[int], seconds: float) -> None:
    """Add streams to one process, as many as it admits."""
    rows: list[list[Cell]] = []
    found: list[tuple[int, Figures]] = []
    with whole(far) as service:
        empty = rss_bytes(service.pid) / 1024
        for step, count in enumerate(counts):
            left = (counts[-1] - count) / 8 + 2.5 * seconds * (len(counts) - step)
            live = service.grow(count, CHUNK_MS, left + 30)
            service.heard()
            f = window(far, service.pid, live, CHUNK_MS, seconds)
            found.append((live, f))
            rows.append([live, f["cpu"], f["cpu"] / found[0][1]["cpu"], (f["rss"] - empty) / max(1, live), f["p99"],
                         service.heard()["p99"], f["busy"], f["others"], f["far"]])  # fmt: skip
            if live < count:
                break
    columns = ["streams", "CPU ms/stream-s", "x first", "KB per stream", "p99 ms late", "p99 ms turn", "core", "others", "far end"]  # fmt: skip
    report.table("more streams (TLS, 100 ms chunks, a subscriber each)", columns, rows)
    (low, first), (high, last) = found[0], found[-1]
    if high > low:
        report.goal(f"CPU per stream-second, {high} streams of {low}", last["cpu"] / first["cpu"], at_most=1.1)
        report.goal(f"KB of a stream, {low} to {high}", (last["rss"] - first["rss"]) / (high - low), at_most=180)
    report.lines("streams", "CPU per stream-second of the whole service", "streams", "ms",
                 {"whole": [(live, f["cpu"]) for live, f in found]})  # fmt: skip


# --- one long file ---------------------------------------------------------------------------------------------------


def long_file(directory: Path, hours: float) -> tuple[Path, str]:
    """A WAV file of that length, and its SHA-256."""
    path, block = directory / "long.wav", os.urandom(1 << 20)
    size = int(hours * 3600 * RATE) * 2
    head = wav_bytes(rate=RATE, frames=0)
    head = head[:4] + (36 + size).to_bytes(4, "little") + head[8:40] + size.to_bytes(4, "little")
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for left in range(size, 0, -len(block)):
            file.write(block[:left])
            digest.update(block[:left])
    return path, digest.hexdigest()


def _turn(index: int, session: str) -> Turn:
    start = index * TURN_MS
    words = [
        TurnWord(
            text=f"word{n}", start_ms=start + 150 * n, end_ms=start + 150 * n + 120, confidence=0.98765, speaker=None
        )
        for n in range(WORDS)
    ]
    return Turn(
        index=index, start_ms=start, end_ms=start + TURN_MS - 100, transcript=" ".join(word.text for word in words),
        words=words, formatted=True, session_id=session, turn_order=index, end_of_turn_confidence=0.91, language=None,
        speaker=None, channel=None, latency_ms=300,
    )  # fmt: skip


async def kept(data: Path, audio: tuple[Path, str], count: int, hours: float, position_ms: int) -> list[str]:
    """Lay out a data directory in which a worker died when it had streamed so far of `count` jobs; their ids."""
    (data / "audio").mkdir(parents=True)
    url, clock = f"sqlite+aiosqlite:///{data / 'turnwire.db'}", SystemClock()
    await migrate(url)
    ids = [f"01990000-0000-7000-8000-{number:012x}" for number in range(count)]
    duration = int(hours * 3_600_000)
    async with open_store(url) as store:
        for job_id in ids:
            os.link(audio[0], data / "audio" / job_id)
            size, now = audio[0].stat().st_size, clock.utc_ms()
            job = Job(
                id=job_id, status=Status.QUEUED, created_at="2026-11-21T09:00:00.000Z", filename="long.wav",
                audio=Audio(bytes=size, sha256=audio[1], duration_ms=duration, sample_rate=RATE, channels=1,
                            encoding="pcm_s16le", converted=False),
                options={"chunk_ms": CHUNK_MS}, progress=Progress(0, duration), links=links(job_id),
            )  # fmt: skip
            await store.create(job, [make_event(job_id, 1, "job.queued", now, {"job": job})], owner="", created_ms=now)
            claim = await store.claim(
                job_id, lease_s=1, begin=lambda record, strikes: begin_claim(clock, record, strikes)
            )
            assert isinstance(claim, Claim)
            if position_ms:
                session = Session(id=f"history-{job_id}", model=None, channel=None, offset_ms=0, sent_ms=position_ms)
                claim.job.sessions.append(session)
                await _spoken(store, claim, session.id, position_ms // TURN_MS, now)
    return ids


async def _spoken(store: Store, claim: Claim, session: str, turns: int, now: int) -> None:
    seq = claim.event_seq
    for first in range(0, turns, BATCH):
        said = [_turn(index, session) for index in range(first, min(turns, first + BATCH))]
        claim.job.turn_count = said[-1].index + 1
        events: list[Event] = [
            make_event(claim.job.id, seq + n, "turn.final", now, {"turn": turn}) for n, turn in enumerate(said, 1)
        ]
        await store.write(claim, Write(claim.job, events, said), after_seq=seq)
        seq += len(events)


def replay(service: Whole, job_id: str, busy: float) -> Figures:
    """What a late subscriber costs; `busy` is the core's share that the service takes without."""
    began, used, durable = time.monotonic(), cpu_seconds(service.pid), 0
    connection = HTTPConnection("127.0.0.1", service.port)
    connection.request("GET", f"/jobs/{job_id}/events")
    answer = connection.getresponse()
    numbered = False
    for line in answer:  # what has no number is not of the past
        numbered = numbered or line.startswith(b"id:")
        if line == b"\n" and numbered:
            durable, numbered = durable + 1, False
        elif line.startswith(b"data:") and not numbered and durable:
            break
    took = time.monotonic() - began
    connection.close()
    spent = cpu_seconds(service.pid) - used - busy * took
    return {"events": durable, "us": spent / max(1, durable) * 1e6, "seconds": took}


def positions(
    report: Report, far: FarEnd, directory: Path, hours: float, count: int, seconds: float, rounds: int
) -> None:
    """The same window at the start, in the middle and at the end."""
    audio = long_file(directory, hours)
    end = int(hours * 3_600_000 - 1000 * (3 * seconds + 60))
    places = {"start": 0, "middle": int(hours * 1_800_000), "end": max(0, end)}
    found: dict[str, list[Figures]] = {name: [] for name in places}
    for number in range(rounds):
        for name, position in places.items():
            data = directory / f"{name}-{number}"
            ids = asyncio.run(kept(data, audio, count, hours, position))
            with whole(far, data) as service:
                for job_id in ids:
                    service.follow(job_id)
                live = service.live(count, 60.0)  # the hash of all files is taken first
                began = rss_bytes(service.pid)
                f = window(far, service.pid, live, CHUNK_MS, seconds)
                f["grown"] = (rss_bytes(service.pid) - began) / 1e6
                found[name].append(f | {f"late {k}": v for k, v in replay(service, ids[0], f["busy"]).items()})
    middle = {name: {k: sorted(f[k] for f in fs)[len(fs) // 2] for k in fs[0]} for name, fs in found.items()}
    first = middle["start"]
    columns = ["at", "min", "CPU ms/stream-s", "x start", "RSS MB", "grown MB", "p99 ms late", "events", "µs/event, late", "s, late"]  # fmt: skip
    report.table(
        f"the same {seconds:g} s of {count} files of {hours:g} h, as kept by a worker that died there", columns,
        [[name, places[name] / 60_000, f["cpu"], f["cpu"] / first["cpu"], f["rss"] / 1024, f["grown"], f["p99"],
          f["late events"], f["late us"], f["late seconds"]] for name, f in middle.items()],
    )  # fmt: skip
    report.goal("CPU per stream-second, end of the file's start", middle["end"]["cpu"] / first["cpu"], at_most=1.1)
    report.goal("RSS in MB, end over start", (middle["end"]["rss"] - first["rss"]) / 1024, at_most=20)
    late = middle["end"]["late us"] / middle["middle"]["late us"]
    report.goal("CPU per event of a late subscriber, end of the middle's", late, at_most=1.2)
    report.bars(
        "positions", f"CPU per stream-second in a file of {hours:g} h", "ms", {k: f["cpu"] for k, f in middle.items()}
    )


def run(
    out: Path, *, counts: Sequence[int], hours: float = HOURS, files: int = 10, seconds: float = 6.0, rounds: int = 1
) -> Report:
    """All of it; smaller figures try whether it runs."""
    report = Report("growth", ("uvloop", "httpx-ws", "sqlalchemy", "aiosqlite"))
    with tempfile.TemporaryDirectory(prefix="turnwire-bench-") as given:
        far = FarEnd(Path(given), tls=True)
        try:
            streams(report, far, counts, min(seconds, 5.0))
            positions(report, far, Path(given), hours, files, seconds, rounds)
        finally:
            stop(far.process)
    report.write(out)
    return report


def main() -> None:
    """Measure."""
    given = arguments(__doc__, "growth").parse_args()
    os.sched_setaffinity(0, {cores()[0]})
    if given.full:
        run(given.out, counts=range(100, 1001, 100), files=20, seconds=60.0)
    else:
        run(given.out, counts=(100, 300))


if __name__ == "__main__":
    main()
