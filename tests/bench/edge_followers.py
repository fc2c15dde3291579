"""The edge and its event streams: a crowd that waits, some who never read, and all who come back at once."""

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

from tests.bench import harness
from tests.bench.edge_stage import Bench, wav
from tests.bench.edge_wire import AUTH, Listener, Server, connect, head, listen, until

CROWD, DEAF, READERS = 1000, 20, 100


async def idle(bench: Bench) -> None:
    """A thousand who wait: memory, CPU through two pings, and one event for all."""
    rows: list[Sequence[harness.Cell]] = []

    async def measure(name: str, server: Server, path: str, push: Callable[[], Awaitable[object]]) -> None:
        for listener in await listen(server.port, path, 20):
            listener.close()
        await asyncio.sleep(0.5)
        before = server.rss
        crowd = await listen(server.port, path, CROWD)
        await until(lambda: all(one.answered for one in crowd))
        await asyncio.sleep(1)
        each = (server.rss - before) / CROWD
        cpu, began = server.cpu, time.monotonic()
        await asyncio.sleep(16)
        share = (server.cpu - cpu) / (time.monotonic() - began)
        heard, cpu = [len(one.delays) for one in crowd], server.cpu
        await push()
        await until(lambda: all(len(one.delays) > n for one, n in zip(crowd, heard, strict=True)))
        at = [one.delays[n] for one, n in zip(crowd, heard, strict=True)]
        rows.append(
            [
                name,
                CROWD,
                each / 1024,
                100 * share,
                1e3 * harness.percentile(at, 0.5),
                1e3 * max(at),
                1e3 * (server.cpu - cpu),
            ]
        )
        for listener in crowd:
            listener.close()

    # Nobody listens upstream: the first job waits for it, the second, which is followed, waits for the first.
    async with bench.service(max_streams="1", upstream_url="ws://127.0.0.1:9/") as ours:
        first, job = await ours.upload(wav(1)), await ours.upload(wav(1))
        await measure("turnwire", ours, f"/jobs/{job}/events", lambda: ours.call("POST", f"/jobs/{first}/cancel"))
    async with bench.stock() as stock:
        await measure("stock", stock, "/jobs/it/events", lambda: stock.call("POST", "/push"))
    columns = ["server", "clients", "KiB each", "CPU % of a core", "push p50 ms", "push last ms", "push CPU ms"]
    bench.report.table("Idle followers, then one event for all", columns, rows)
    bench.report.goal("KiB of an idle follower", float(rows[0][2] or 0), at_most=64)
    bench.report.goal("% of a core for 1,000 idle followers", float(rows[0][3] or 0), at_most=3)


async def deaf(bench: Bench) -> None:
    """Some who never read beside many who do, on a job that talks all the time."""
    rows: list[Sequence[harness.Cell]] = []

    async def measure(name: str, server: Server, path: str) -> None:
        crowd = await listen(server.port, path, READERS)
        await asyncio.sleep(4)
        alone = [delay for one in crowd for delay in one.delays[len(one.delays) // 2 :]]
        fds, before = server.descriptors, server.rss
        still = [await frozen(server.port, path) for _ in range(DEAF)]
        await until(lambda: server.descriptors >= fds + DEAF)
        heard = [len(one.delays) for one in crowd]
        began, most, gone = time.monotonic(), 0, None
        while gone is None and time.monotonic() - began < 50:
            await asyncio.sleep(0.1)
            most = max(most, server.rss - before)
            gone = time.monotonic() - began if server.descriptors <= fds else None
        left = max(0, server.descriptors - fds)
        beside = [delay for one, n in zip(crowd, heard, strict=True) for delay in one.delays[n:]]
        rows.append([name, most / 1024 / DEAF, gone, left, 1e3 * harness.percentile(alone, 0.99), 1e3 * harness.percentile(beside, 0.5),
                     1e3 * harness.percentile(beside, 0.99), len(beside)])  # fmt: skip
        for one in crowd:
            one.close()
        for client in still:
            client.close()

    async with bench.service(bench.chatty) as ours:
        job = await ours.upload(wav(120))
        await measure("turnwire", ours, f"/jobs/{job}/events")
    async with bench.stock() as stock:
        await stock.call("POST", "/talk")
        await measure("stock", stock, "/jobs/it/events")
    columns = [
        "server",
        "KiB held each, all growth",
        "last gone s",
        "left",
        "p99 without them ms",
        "p50 ms",
        "p99 ms",
        "events",
    ]
    bench.report.table(f"{DEAF} that never read beside {READERS} that do", columns, rows)
    bench.report.goal("seconds until the last who never reads is gone", float(rows[0][2] or 99), at_most=30)
    bench.report.goal("p99 ms of the others", float(rows[0][6] or 0), at_most=100)


async def frozen(port: int, path: str) -> socket.socket:
    """A follower that never reads."""
    client = await connect(port, receive_buffer=4096)
    await asyncio.get_running_loop().sock_sendall(client, head("GET", path, AUTH))
    return client


async def storm(bench: Bench) -> None:
    """A thousand come back at once, each from where it was: after a cut of the network, and after a SIGKILL."""
    rows: list[Sequence[harness.Cell]] = []
    async with bench.service() as ours:
        job = await ours.upload(wav(40))
        path = f"/jobs/{job}/events"
        crowd = await listen(ours.port, path, CROWD)
        await until(lambda: all(one.last for one in crowd))
        await asyncio.sleep(5)
        for how in ("network cut", "SIGKILL"):
            await _scatter(crowd)
            await asyncio.sleep(2)
            if how == "SIGKILL":
                await ours.end()
                await ours.start()
            newest = int((await ours.call("GET", f"/jobs/{job}")).headers["etag"].strip('W/"'))
            missed = [newest - one.last for one in crowd]
            cpu, began = ours.cpu, time.monotonic()
            await asyncio.gather(*(one.connect(ours.port) for one in crowd))
            await _caught_up(crowd, newest)
            took = time.monotonic() - began
            rows.append([how, CROWD, sum(missed) / CROWD, took, ours.cpu - cpu])
        await until(lambda: all(one.ended for one in crowd), 120)
        lines = (await ours.call("GET", path, headers={"Accept": "application/x-ndjson"})).content.splitlines()
        log = dict(enumerate(filter(None, lines), 1))
        whole = sum(one.ids == list(range(1, len(log) + 1)) and one.frames == log for one in crowd)
    columns = ["after", "clients", "events missed each", "all caught up s", "CPU s"]
    bench.report.table("All come back at once with Last-Event-ID", columns, rows)
    for row in rows:
        bench.report.goal(f"seconds until all are caught up after a {row[0]}", float(row[3] or 0), at_most=5)
    bench.report.goal(f"clients with each of {len(log)} events once, in order, as in the log", whole, at_least=CROWD)


async def _caught_up(crowd: Sequence[Listener], newest: int) -> None:
    await until(lambda: all(one.last >= newest for one in crowd))


async def _scatter(crowd: Sequence[Listener]) -> None:
    """All leave, within three seconds, each with another last id."""
    for one in random.sample(crowd, len(crowd)):
        one.close()
        await asyncio.sleep(3 / len(crowd))
    await asyncio.gather(*(one.gone.wait() for one in crowd))
