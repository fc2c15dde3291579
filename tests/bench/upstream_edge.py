"""What one upstream stream costs: stock httpx-ws and ours side by side, in one run.

    python -m tests.bench.upstream_edge --streams 100 500 --seconds 5 --rounds 2 [--tls] [--chunk-ms 100]

The client runs on the last core, the far end on the first; each measurement is a process of its own and rounds are
interleaved, because a machine drifts by more than what is compared. Trust the ratios of one run, not the digits. All
variants send the same chunks to the same schedule, take five turns a second per stream and decode every one of them.
CPU is user and system time per second of audio sent; late is how long after its due time a chunk was handed over (p99);
rate is the audio sent of what was due: below 1 the variant is overloaded.
"""

import argparse
import asyncio
import json
import os
import resource
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx
import uvloop
from httpx_ws import AsyncWebSocketSession, aconnect_ws
from wsproto.utilities import generate_accept_token

from service.backends.assemblyai import AssemblyAI, Session
from service.core.protocol import decode
from tests.raw_upstream import BEGIN, CERTIFICATE, text

TURNS_PER_SECOND = 5
WORDS = [
    {"text": "benchmark", "start": 40 * n, "end": 40 * n + 30, "confidence": 0.987654, "word_is_final": True}
    for n in range(13)
]
TURN = text({"type": "Turn", "turn_order": 1, "end_of_turn": False, "transcript": "benchmark " * 13, "words": WORDS})


class FarEnd(asyncio.Protocol):
    """Upgrades, throws the audio away unparsed and sends turns: as little as possible, so as not to be the bottleneck."""

    live: set["FarEnd"] = set()  # noqa: RUF012  one far end a process
    request = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self in self.live:
            return
        self.request += data
        if b"\r\n\r\n" in self.request:
            key = self.request.lower().split(b"sec-websocket-key: ")[1].split(b"\r\n")[0]
            at = self.request.lower().index(key)
            accept = generate_accept_token(self.request[at : at + len(key)])
            head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            self.transport.write(head + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n" + text(BEGIN))
            self.live.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.live.discard(self)


async def far_end(tls: bool) -> None:
    """Print the port, then serve until killed; every line read is answered with the CPU seconds used."""
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(FarEnd, "127.0.0.1", 0, ssl=context, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(0, lambda: (sys.stdin.readline(), print(time.process_time(), flush=True)))
    slots = 40  # streams are spread over the interval between turns
    while True:
        for slot in range(slots):
            for number, peer in enumerate(list(FarEnd.live)):
                if number % slots == slot:
                    peer.transport.write(TURN)
            await asyncio.sleep(1 / TURNS_PER_SECOND / slots)


class Clock:
    """The schedule of all streams, and how late it was kept."""

    def __init__(self, streams: int, chunk_ms: int) -> None:
        self.chunk = os.urandom(32 * chunk_ms)
        self.interval = chunk_ms / 1000
        self.start = time.monotonic() + 0.1
        self.offsets = [self.interval * n / streams for n in range(streams)]
        self.late: list[float] = []

    async def a_task_each(self, sends: list[Callable[[bytes], Awaitable[None]]]) -> None:
        """One task per stream."""

        async def stream(offset: float, send: Callable[[bytes], Awaitable[None]]) -> None:
            due = self.start + offset
            while True:
                await asyncio.sleep(due - time.monotonic())
                await send(self.chunk)
                self.late.append(time.monotonic() - due)
                due += self.interval

        async with asyncio.TaskGroup() as group:
            for offset, send in zip(self.offsets, sends, strict=True):
                group.create_task(stream(offset, send))

    async def one_pacer(self, sends: list[Callable[[bytes], None]]) -> None:
        """One task for all: what is due goes out in one go."""
        due, number = self.start, 0
        while True:
            await asyncio.sleep(max(0.002, due - time.monotonic()))
            while due <= (now := time.monotonic()):
                sends[number](self.chunk)
                self.late.append(now - due)
                number = (number + 1) % len(sends)
                due = due + self.interval / len(sends)


async def measure(clock: Clock, sending: Awaitable[None], receiving: Sequence[Awaitable[None]], seconds: float) -> None:
    """Run for a second to warm up, then count; print the result as JSON."""
    tasks = [asyncio.ensure_future(job) for job in (sending, *receiving)]
    await asyncio.sleep(1.1)
    clock.late.clear()
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    for task in tasks:
        if task.done():
            task.result()
    sent = len(clock.late) * clock.interval  # seconds of audio; less than wanted where a variant cannot keep up
    result = {
        "user": (after.ru_utime - before.ru_utime) / sent * 1000,
        "system": (after.ru_stime - before.ru_stime) / sent * 1000,
        "late": statistics.quantiles(clock.late, n=100)[98] * 1000,
        "rate": sent / took / len(receiving),
    }
    print(json.dumps(result), flush=True)
    os._exit(0)  # saying goodbye to all is not what is measured


async def client(variant: str, url: str, streams: int, chunk_ms: int, seconds: float) -> None:
    """One measurement."""
    trust = ssl.create_default_context(cafile=CERTIFICATE)

    async def stock_turns(live: AsyncWebSocketSession) -> None:
        while True:
            decode(await live.receive_text())

    async def our_turns(live: Session) -> None:
        while True:
            await live.receive()

    async with AsyncExitStack() as stack:
        if variant == "stock":
            unlimited = httpx.Limits(max_connections=None)
            web = await stack.enter_async_context(httpx.AsyncClient(limits=unlimited, verify=trust, trust_env=False))
            plain: list[AsyncWebSocketSession] = [
                await stack.enter_async_context(aconnect_ws(url, web)) for _ in range(streams)
            ]
            clock = Clock(streams, chunk_ms)
            sending = clock.a_task_each([live.send_bytes for live in plain])
            await measure(clock, sending, [stock_turns(live) for live in plain], seconds)
        upstream = await stack.enter_async_context(AssemblyAI(url, None, tls=trust))
        ours = [await stack.enter_async_context(upstream.connect("a=b")) for _ in range(streams)]
        clock = Clock(streams, chunk_ms)
        receiving = [our_turns(live) for live in ours]
        if variant == "ours":
            await measure(clock, clock.one_pacer([live.send for live in ours]), receiving, seconds)

        def awaited(live: Session) -> Callable[[bytes], Awaitable[None]]:
            async def send(chunk: bytes) -> None:
                live.send(chunk)

            return send

        await measure(clock, clock.a_task_each([awaited(live) for live in ours]), receiving, seconds)


def run(arguments: list[str], core: int) -> subprocess.Popen[str]:
    """This module again, on that core."""
    command = [sys.executable, "-m", "tests.bench.upstream_edge", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(process.pid, {core})
    return process


def cpu(process: subprocess.Popen[str]) -> float:
    """CPU seconds the far end has used."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(options: argparse.Namespace) -> None:
    """Measure every variant in turn and print the table."""
    cores = sorted(os.sched_getaffinity(0))
    far = run(["--far-end", *(["--tls"] if options.tls else [])], cores[0])
    assert far.stdout is not None
    url = f"{'wss' if options.tls else 'ws'}://127.0.0.1:{int(far.stdout.readline())}/"
    print(
        f"{'streams':>7} {'variant':<16} {'CPU ms':>7} {'user':>6} {'system':>6} {'ratio':>6} {'late ms':>8} {'rate':>5} {'far end':>7}"
    )
    try:
        for streams in options.streams:
            found: dict[str, list[dict[str, float]]] = {"stock": [], "ours, task each": [], "ours": []}
            for _ in range(options.rounds):
                for variant, results in found.items():
                    began, used = time.monotonic(), cpu(far)
                    arguments = [variant, url, str(streams), str(options.chunk_ms), str(options.seconds)]
                    out, _ = run(["--client", *arguments], cores[-1]).communicate()
                    result = json.loads(out)
                    result["far"] = (cpu(far) - used) / (time.monotonic() - began)
                    results.append(result)
            middle = {v: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for v, rs in found.items()}
            whole = {variant: m["user"] + m["system"] for variant, m in middle.items()}
            for variant, m in middle.items():
                figures = (
                    f"{whole[variant]:7.2f} {m['user']:6.2f} {m['system']:6.2f} {whole['stock'] / whole[variant]:5.1f}x"
                )
                print(
                    f"{streams:7} {variant:<16} {figures} {m['late']:8.1f} {m['rate']:5.2f} {m['far']:6.0%}", flush=True
                )
    finally:
        far.kill()
        far.wait()


def main() -> None:
    """Compare, or be one end of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chunk-ms", type=int, default=50)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--far-end", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.far_end:
        uvloop.run(far_end(options.tls))
    elif options.client:
        variant, url, streams, chunk_ms, seconds = options.client
        uvloop.run(client(variant, url, int(streams), int(chunk_ms), float(seconds)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
