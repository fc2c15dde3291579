"""What it costs to tell subscribers, and how long it takes: `python -m tests.bench.delivery [--full] [--out DIR]`.

    a C compiler and OpenSSL's headers (apt-get install gcc libssl-dev)

`ours` is `turnwire serve`, whole: jobs streaming in real time to the far end (`far_end.c`), persistence, `/jobs/<id>/events`.
Beside it two servers made of stock sse-starlette on the same uvicorn that only make events up, five a second and channel:
`dicts` yields a dict with `json.dumps` for each subscriber, as one writes it; `bytes` encodes once and yields the same bytes to all.
Each is a process on the last core, far end and client run on the first. CPU is of the whole server per event delivered; of ours
also what is left when the same jobs without a subscriber are taken off. Latency runs from the moment the far end (or the
made-up source) sends the turn, which says so in its first word, to the return of the client's `recv`.
"""

import asyncio
import json
import os
import re
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import uvicorn
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from tests.bench.harness import (
    Cell,
    Report,
    arguments,
    cores,
    cpu_seconds,
    interleaved,
    percentile,
    python,
    rss_bytes,
    start,
    stop,
)  # fmt: skip
from tests.bench.streams import FarEnd
from tests.wavs import wav_bytes

CHANNELS = 20
PER_SECOND = 5
WARM_SECONDS, SECONDS = 1.5, 4.0
OURS, STOCK = "ours", ("dicts", "bytes")
STAMP = re.compile(rb'"transcript":"at(\d+)')
Figures = dict[str, float]


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def service(far: FarEnd, **settings: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`turnwire serve` on the last core, its data in a directory of its own; the process and its port."""
    with tempfile.TemporaryDirectory(prefix="turnwire-bench-") as data:
        given = {
            "TURNWIRE_UPSTREAM_URL": far.url, "TURNWIRE_DATA_DIR": data, "TURNWIRE_MAX_STREAMS": "4000",
            "ASSEMBLYAI_API_KEY": "k" * 32,
        } | settings  # fmt: skip
        with (Path(data) / "log").open("w+") as log:
            command = ["env", *(f"{name}={value}" for name, value in given.items()), *python("service", "serve")]
            process = start([*command, "--port", "0"], cores()[1], stderr=log)
            try:
                yield process, _port(process, Path(log.name))
            finally:
                stop(process)


def _port(process: subprocess.Popen[str], log: Path) -> int:
    while process.poll() is None:
        if found := re.search(r"serves http://127.0.0.1:(\d+)", log.read_text()):
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(log.read_text())


def jobs(port: int, far: FarEnd, count: int, seconds: float) -> list[str]:
    """Submit `count` jobs of that length (and of what it takes to submit them); their ids, once all stream."""
    wav, ids = wav_bytes(frames=int(16_000 * (seconds + count / 15))), []
    before = int(far.ask("stats")["sessions"])
    for _ in range(count):
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/jobs?channels=first", wav, {"Content-Type": "audio/wav"})
        answer = connection.getresponse()
        ids.append(json.loads(answer.read())["id"])
        connection.close()
    deadline = time.monotonic() + 30 + count / 5
    while far.ask("stats")["sessions"] < before + count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"of {count} jobs not all stream: {far.ask('stats')}")
        time.sleep(0.1)
    return ids


class Source:
    """Makes events up for one channel and hands them to each subscriber's queue."""

    def __init__(self, kind: str) -> None:
        """`kind` is one of `STOCK`."""
        self._kind = kind
        self._queues: set[asyncio.Queue[Any]] = set()
        self._words = " ".join(f"word{n}" for n in range(22))  # then an event is as long as one of ours

    async def run(self, offset: float) -> None:
        """Publish for ever."""
        await asyncio.sleep(offset)
        due = time.monotonic()
        while True:
            text = f"at{time.monotonic_ns() // 1000} {self._words}"
            turn = {
                "index": 1,
                "transcript": text,
                "stable_words": 11,
                "start_ms": 4711,
                "session_id": "f37d7c4e-6be9-47ed-b6fc-7600fc78e34d",
                "turn_order": 1,
                "channel": None,
            }
            event: Any = {
                "id": None,
                "type": "turn.partial",
                "job_id": "0199c1d2-7c3a-7e51-9d0f-3f0a51c2b7aa",
                "at": "2026-11-21T12:00:00Z",
                "turn": turn,
            }
            if self._kind == "bytes":
                event = f"event: turn.partial\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
            for queue in self._queues:
                queue.put_nowait(event)
            due += 1 / PER_SECOND
            await asyncio.sleep(due - time.monotonic())

    async def follow(self) -> AsyncIterator[Any]:
        """What one subscriber is sent."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._queues.add(queue)
        try:
            while True:
                event = await queue.get()
                if self._kind == "bytes":
                    yield event
                else:
                    yield {"event": event["type"], "data": json.dumps(event, separators=(",", ":"))}
        finally:
            self._queues.discard(queue)


async def made_up(kind: str) -> None:
    """Serve `CHANNELS` sources of that kind; prints the port."""
    sources = [Source(kind) for _ in range(CHANNELS)]
    running = [asyncio.create_task(source.run(n / CHANNELS / PER_SECOND)) for n, source in enumerate(sources)]

    async def events(request: Request) -> EventSourceResponse:
        return EventSourceResponse(sources[int(request.path_params["channel"])].follow())

    app = Starlette(routes=[Route("/{channel}", events)])
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listening.getsockname()[1], flush=True)
    await uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning")).serve([listening])
    await asyncio.gather(*running)


@contextmanager
def serving(name: str, far: FarEnd, channels: int, seconds: float) -> Iterator[tuple[int, int, list[str]]]:
    """A contender: process id, port, and the paths of its channels."""
    if name == OURS:
        with service(far) as (process, port):
            yield process.pid, port, [f"/jobs/{job}/events" for job in jobs(port, far, channels, seconds)]
        return
    process = start(python("tests.bench.delivery", "--serve", name), cores()[1])
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline()), [f"/{n}" for n in range(channels)]
    finally:
        stop(process)


# --- subscribers -----------------------------------------------------------------------------------------------------


class Subscribers:
    """Connections that read and count, as cheaply as Python can."""

    def __init__(self, port: int, paths: Sequence[str]) -> None:
        """One subscriber for each path, and their responses begun."""
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self.events = self.bytes = 0
        self.delays: list[float] = []
        for number, path in enumerate(paths):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            connection.setblocking(False)
            self._sockets[connection.fileno()] = connection
            self._poll.register(connection, select.EPOLLIN)
            if number % 50 == 49:
                self.read(0.01)

    def read(self, seconds: float) -> None:
        """Read for so long, and count anew."""
        self.events = self.bytes = 0
        self.delays.clear()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for descriptor, _ in self._poll.poll(left):
                data = self._sockets[descriptor].recv(262_144)
                now = time.monotonic()
                if not data:
                    raise RuntimeError("the server ended a stream")
                self.bytes += len(data)
                self.events += data.count(b"\ndata: ")
                self.delays += [now - int(stamp) / 1e6 for stamp in STAMP.findall(data)]

    def catch_up(self, patience: float) -> float:
        """Read until what comes is new; the seconds that took. What was said before is replayed to who comes."""
        began = time.monotonic()
        while time.monotonic() < began + patience:
            self.read(0.5)
            if self.events >= PER_SECOND * len(self._sockets) * 0.4 and max(self.delays, default=0) < 1:
                break
        return time.monotonic() - began

    def close(self) -> None:
        """All leave."""
        for connection in self._sockets.values():
            connection.close()
        self._poll.close()


def measure(pid: int, port: int, paths: Sequence[str], count: int, warm: float, seconds: float) -> Figures:
    """CPU and latency with `count` subscribers, spread over the paths."""
    quiet = rss_bytes(pid)
    subscribers = Subscribers(port, list(islice(cycle(paths), count)))
    try:
        caught_up = subscribers.catch_up(20 * warm) if count else 0.0
        began, used = time.monotonic(), cpu_seconds(pid)
        subscribers.read(seconds)
        took, used = time.monotonic() - began, cpu_seconds(pid) - used
        return {
            "busy": used / took, "caught up": caught_up, "events": subscribers.events / took,
            "size": subscribers.bytes / max(1, subscribers.events),
            "us": used / max(1, subscribers.events) * 1e6, "kb": (rss_bytes(pid) - quiet) / count / 1024 if count else 0,
            "p50": percentile(subscribers.delays, 0.5) * 1000, "p99": percentile(subscribers.delays, 0.99) * 1000,
        }  # fmt: skip
    finally:
        subscribers.close()


def steps(name: str, far: FarEnd, channels: int, counts: Sequence[int], warm: float, seconds: float) -> Figures:
    """All the figures of a contender, as `<subscribers> <figure>`."""
    found: Figures = {}
    with serving(name, far, channels, (warm + seconds + 6) * (len(counts) + 1) + 10) as (pid, port, paths):
        time.sleep(min(2, seconds))  # what submitting left to be done
        idle = measure(pid, port, paths, 0, warm, seconds)["busy"]
        for count in counts:
            step = measure(pid, port, paths, count, warm, seconds)
            step["marginal"] = (step["busy"] - idle) / step["events"] * 1e6 if step["events"] else float("nan")
            found |= {f"{count} {figure}": value for figure, value in step.items()}
    return found


# --- the report ------------------------------------------------------------------------------------------------------


def compare(report: Report, far: FarEnd, channels: int, counts: Sequence[int], rounds: int, seconds: float) -> None:
    """Table, goals and plot of one way to spread subscribers over channels."""
    label = "one channel" if channels == 1 else f"{channels} channels"
    found = interleaved(
        (OURS, *STOCK), rounds, lambda name: steps(name, far, channels, counts, min(WARM_SECONDS, seconds), seconds)
    )
    rows: list[list[Cell]] = [
        [n, name, f"{f[f'{n} busy']:.0%}", f[f"{n} events"], round(f[f"{n} size"]), f[f"{n} us"], f[f"{n} marginal"],
         f[f"{n} us"] / found["dicts"][f"{n} us"], f[f"{n} p50"], f[f"{n} p99"], f[f"{n} kb"], f[f"{n} caught up"]]
        for n in counts for name, f in found.items()
    ]  # fmt: skip
    report.table(
        f"subscribers of {label}, {PER_SECOND} turns a second",
        ["subscribers", "server", "core", "events/s", "bytes", "µs/event", "without jobs", "x dicts", "p50 ms", "p99 ms", "KB each", "caught up s"],
        rows,
    )  # fmt: skip
    if 1000 in counts:
        for what, figure in (("", "us"), (" without the jobs'", "marginal")):
            ratio = found[OURS][f"1000 {figure}"] / found["dicts"][f"1000 {figure}"]
            report.goal(f"CPU per event{what}, of dicts', 1,000 subscribers of {label}", ratio, at_most=0.5)
    slug = label.replace(" ", "-")
    cpu = {name: [(n, f[f"{n} us"]) for n in counts if n >= 100] for name, f in found.items()}
    report.lines(f"cpu-{slug}", f"CPU per delivered event, {label}", "subscribers", "µs", cpu)


def latency(report: Report, far: FarEnd, streams: int, seconds: float) -> None:
    """What is added to a turn between upstream's frame and a subscriber's socket, one subscriber a job."""
    with serving(OURS, far, streams, 2 * seconds + 20) as (pid, port, paths):
        found = measure(pid, port, paths, streams, 3 * min(seconds, WARM_SECONDS), seconds)
    columns = ["streams", "core", "events/s", "p50 ms", "p99 ms"]
    report.table(
        "turn latency added, one subscriber a stream", columns,
        [[streams, f"{found['busy']:.0%}", found["events"], found["p50"], found["p99"]]],
    )  # fmt: skip
    report.goal(f"added latency p50 ms, {streams} streams", found["p50"], at_most=5)
    report.goal(f"added latency p99 ms, {streams} streams", found["p99"], at_most=25)


def lateness(port: int) -> Mapping[str, float]:
    """The service's own histogram of how late it sent chunks: bound in seconds → chunks so far."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {b: float(n) for b, n in re.findall(r'turnwire_chunk_lateness_seconds_bucket\{le="([^"]+)"\} (\S+)', text)}


def p99_ms(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Between two looks at the histogram, spread evenly inside the bucket."""
    counts = [(float(bound), after[bound] - before.get(bound, 0)) for bound in after]
    wanted, low, below = 0.99 * counts[-1][1], 0.0, 0.0
    for bound, count in counts:
        if count >= wanted:
            return 1000 * (low + (min(bound, 2 * low + 10) - low) * (wanted - below) / max(1, count - below))
        low, below = bound, count
    return float("nan")


def burst(report: Report, far: FarEnd, streams: int, counts: Sequence[int], seconds: float) -> None:
    """What everybody listening to one job does to the pace of the others."""
    rows: list[list[Any]] = []
    with serving(OURS, far, streams + 1, (len(counts) + 1) * (seconds + 6 * WARM_SECONDS) + 20) as (pid, port, paths):
        for count in (0, *counts):
            subscribers = Subscribers(port, paths[:1] * count)
            subscribers.catch_up(20 * min(seconds, WARM_SECONDS) if count else 0)
            far.ask("reset 100")
            before, began, used = lateness(port), time.monotonic(), cpu_seconds(pid)
            subscribers.read(seconds)
            busy = (cpu_seconds(pid) - used) / (time.monotonic() - began)
            told = far.ask("stats")
            rows.append([count, f"{busy:.0%}", subscribers.events / seconds, p99_ms(before, lateness(port)),
                         told["p99"], percentile(subscribers.delays, 0.99) * 1000])  # fmt: skip
            subscribers.close()
    columns = ["subscribers of one job", "core", "events/s", "late p99 ms, sent", "arrived", "event p99 ms"]
    report.table(f"pace of {streams} other streams", columns, rows)
    report.goal("p99 lateness ms that a burst to one job adds", rows[-1][3] - rows[0][3], at_most=10)


def main() -> None:
    """Compare, or be a contender."""
    parser = arguments(__doc__, "delivery")
    parser.add_argument("--serve", choices=STOCK, help="be that contender")
    options = parser.parse_args()
    if options.serve:
        uvicorn.Config(app="").get_loop_factory()  # as uvicorn runs by itself: uvloop where it is installed
        import uvloop

        uvloop.run(made_up(options.serve))
        return
    os.sched_setaffinity(0, {cores()[0]})
    run(options.out, rounds=3 if options.full else 1)


def run(
    out: Path, *, rounds: int = 1, counts: Sequence[int] = (1, 100, 1000, 2000), streams: int = 500, seconds: float = SECONDS
) -> Report:  # fmt: skip
    """The whole comparison; smaller figures try whether it runs."""
    report = Report("delivery", ("sse-starlette", "starlette", "uvicorn", "uvloop", "anyio"))
    with tempfile.TemporaryDirectory() as directory:
        far = FarEnd(Path(directory), tls=False)
        try:
            compare(report, far, min(CHANNELS, streams), counts, rounds, seconds)
            compare(report, far, 1, counts[-2:], rounds, seconds)
            latency(report, far, streams, seconds)
            burst(report, far, streams * 2 // 5, counts[-1:], seconds)
        finally:
            stop(far.process)
    report.write(out)
    return report


if __name__ == "__main__":
    main()
