"""The edge of the service under strangers, crowds and the slow, beside a stock FastAPI server in the same run.

    python -m tests.bench.edge [--only NAME] [--out DIRECTORY]

The real service and the stock one (`edge_stock`) run as processes on one core, everything else on the other. A sandbox with
a script is the upstream, a process of its own. Latencies mean something on a quiet machine only; each table says its load.
"""

import asyncio
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from tests.bench import harness
from tests.bench.edge_followers import CROWD, DEAF, READERS, deaf, frozen, idle, storm
from tests.bench.edge_stage import FORM, GIB, Bench, script, wav
from tests.bench.edge_wire import AUTH, Server, asking, connect, head, listen, running, send_until_answered
from tests.wavs import fmt, riff

SLOW = 1000


# --- before the body -------------------------------------------------------------------------------------------------


async def refusals(bench: Bench) -> None:
    """What a client sends of a body before it hears that it is refused."""
    kind, wrong = "Content-Type: audio/wav", "Authorization: Bearer a-key-that-is-not-one"
    form = "Content-Type: multipart/form-data; boundary=b"
    length = f"Content-Length: {GIB}"
    rows: list[Sequence[harness.Cell]] = []

    async def case(server: Server, who: str, what: str, headers: list[str], size: int, *, expect: bool = False) -> None:
        before = server.cpu
        asked = head("POST", "/jobs", *headers, *(["Expect: 100-continue"] if expect else []))
        first, last = (FORM, b"\r\n--b--\r\n") if form in headers else (b"RIFF", b"")
        status, sent, seconds = await send_until_answered(
            server.port, asked, size, expect=expect, first=first, last=last
        )
        rows.append([what, who, status or "cut", sent / 1e6, seconds, server.cpu - before])

    async with bench.service() as ours:
        for expect in (True, False):
            said = "1 GiB, no key" + (", Expect" if expect else "")
            await case(ours, "turnwire", said, [kind, length], GIB, expect=expect)
        await case(ours, "turnwire", "1 GiB, wrong key", [kind, length, wrong], GIB)
        await case(ours, "turnwire", "declared 2 GiB", [kind, f"Content-Length: {2 * GIB}", AUTH], 2 * GIB)
        await case(
            ours, "turnwire", "declared 2 GiB, Expect", [kind, f"Content-Length: {2 * GIB}", AUTH], 2 * GIB, expect=True
        )
        await case(ours, "turnwire", "two lengths", [kind, AUTH, "Content-Length: 5", "Content-Length: 6"], 6)
        await case(ours, "turnwire", "length of -1", [kind, AUTH, "Content-Length: -1"], 6)
        await case(
            ours, "turnwire", "length and chunked", [kind, AUTH, "Content-Length: 5", "Transfer-Encoding: chunked"], 6
        )
    async with bench.stock() as stock:
        for expect in (True, False):
            said = "1 GiB, no key" + (", Expect" if expect else "")
            await case(stock, "stock", said, [form, length], GIB, expect=expect)
        await case(stock, "stock", "1 GiB, wrong key", [form, length, wrong], GIB)
    bench.report.table("A refused upload", ["", "server", "answer", "MB sent", "seconds", "CPU s"], rows)
    bench.report.goal("MB sent of 1 GiB without key and Expect", float(rows[1][3] or 0), at_most=4.2)


async def near_boundary(bench: Bench) -> None:
    """A body that imitates its boundary: what it costs, and what others feel."""
    rows: list[Sequence[harness.Cell]] = []
    async with bench.service() as ours, bench.stock() as stock:
        for server, name, size in ((ours, "turnwire", 50_000_000), (stock, "stock", 5_000_000)):
            near = b"\r\n--b_" * (size // 6)
            body = FORM + riff(fmt(), b"data" + size.to_bytes(4, "little")) + near + b"\r\n--b--\r\n"
            asked = head(
                "POST", "/jobs", AUTH, "Content-Type: multipart/form-data; boundary=b", f"Content-Length: {len(body)}"
            )
            async with asking(server.port) as quiet:
                await asyncio.sleep(2)
            async with asking(server.port) as took:
                before, began = server.cpu, time.monotonic()
                status, sent = await _send(server.port, asked + body)
                seconds = time.monotonic() - began
                cpu = server.cpu - before
                await asyncio.sleep(0.5)
            rows.append([name, size / 1e6, status or "cut", sent / 1e6, seconds, cpu, cpu * 50e6 / size,
                         1e3 * harness.percentile(quiet, 0.99), 1e3 * harness.percentile(took, 0.99), 1e3 * max(took)])  # fmt: skip
    columns = [
        "server",
        "MB",
        "answer",
        "MB sent",
        "seconds",
        "CPU s",
        "CPU s for 50 MB",
        "p99 quiet ms",
        "p99 ms",
        "max ms",
    ]
    bench.report.table("A body of near-boundary bytes (the cost of stock scaled from 5 MB)", columns, rows)
    bench.report.goal("CPU s of 50 MB near its boundary", float(rows[0][5] or 0), at_most=1)
    bench.report.goal("p99 ms of other requests meanwhile", float(rows[0][8] or 0), at_most=100)


async def _send(port: int, data: bytes) -> tuple[int, int]:
    """Send all that is taken; the status of the answer, and the bytes sent."""
    loop, sent = asyncio.get_running_loop(), 0
    client = await connect(port)
    answer = asyncio.ensure_future(loop.sock_recv(client, 65536))
    try:
        while sent < len(data) and not answer.done():
            await loop.sock_sendall(client, data[sent : sent + 65536])
            sent += 65536
        status = int((await asyncio.wait_for(answer, 120)).split()[1])
    except (OSError, IndexError):
        status = 0
    client.close()
    return status, min(sent, len(data))


# --- the slow --------------------------------------------------------------------------------------------------------


def slow_ways(path: str) -> dict[str, bytes]:
    """What each kind of slow client sends, and then nothing."""
    return {
        "half a head": b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nX-Slow:",
        "half a body": head("POST", "/jobs", AUTH, path, "Content-Length: 100000") + wav(0.05),
        "silent": b"",
    }


async def slowloris(bench: Bench) -> None:
    """A thousand of each kind at once: when they are gone, and uploads meanwhile."""
    rows: list[Sequence[harness.Cell]] = []
    async with bench.service(max_queue="10000", max_streams="1") as ours:
        await ours.upload(wav(60))
        await _slow(ours, "turnwire", "Content-Type: audio/wav", 40, rows)
    async with bench.stock() as stock:
        await _slow(stock, "stock", "Content-Type: multipart/form-data; boundary=b", 20, rows)
    columns = ["server", "", "all gone s", "left", "uploads", "refused", "p50 ms", "p99 ms", "fds after"]
    bench.report.table(
        f"{SLOW} slow connections of each kind; uploads meanwhile (a second of audio, to the 202)", columns, rows
    )
    bench.report.goal("p99 ms of an upload meanwhile", float(rows[0][7] or 0), at_most=500)
    bench.report.goal("uploads refused meanwhile", float(rows[0][5] or 0), at_most=0)


async def _slow(server: Server, name: str, kind: str, patience: float, rows: list[Sequence[harness.Cell]]) -> None:
    loop, fds, took, refused = asyncio.get_running_loop(), server.descriptors, [], 0
    lingering: dict[str, list[socket.socket]] = {}
    began = time.monotonic()
    for way, data in slow_ways(kind).items():
        lingering[way] = []
        for _ in range(SLOW):
            client = await connect(server.port)
            await loop.sock_sendall(client, data)
            lingering[way].append(client)
    opened = time.monotonic() - began
    gone_at: dict[str, float | None] = dict.fromkeys(lingering)
    while (now := time.monotonic() - began) < opened + patience and None in gone_at.values():
        start = time.monotonic()
        answer = await server.call("POST", "/jobs", files={"file": ("a.wav", wav(1))})
        took.append(time.monotonic() - start)
        refused += answer.status_code != 202
        for way, clients in lingering.items():
            if gone_at[way] is None and not any(map(_open, clients)):
                gone_at[way] = now
        await asyncio.sleep(0.1)
    left = {way: sum(map(_open, clients)) for way, clients in lingering.items()}
    await asyncio.sleep(1)
    for way, clients in lingering.items():
        first = way == next(iter(lingering))
        rows.append([name, way, gone_at[way], left[way], *([len(took), refused, 1e3 * harness.percentile(took, 0.5),
                     1e3 * harness.percentile(took, 0.99), f"{server.descriptors} ({fds} before)"] if first else [None] * 5)])  # fmt: skip
        for client in clients:
            client.close()


def _open(client: socket.socket) -> bool:
    """Whether the server still holds the connection; an answer on it is read away."""
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


async def stop(bench: Bench) -> None:
    """SIGTERM with all of them there."""
    rows: list[Sequence[harness.Cell]] = []
    loop = asyncio.get_running_loop()

    async def measure(name: str, server: Server, path: str, kind: str) -> None:
        crowd = await listen(server.port, path, READERS + CROWD)
        still = [await frozen(server.port, path) for _ in range(DEAF)]
        slow = [await connect(server.port) for _ in range(300)]
        for client, data in zip(slow, 100 * list(slow_ways(kind).values()), strict=True):
            await loop.sock_sendall(client, data)
        await asyncio.sleep(4)
        code, seconds = await server.end(signal.SIGTERM, within=30)
        rows.append([name, "still there after 30 s" if code is None else code, seconds])
        for client in still + slow:
            client.close()
        for one in crowd:
            one.close()

    async with bench.service() as ours:
        jobs = [await ours.upload(wav(60)) for _ in range(20)]
        await measure("turnwire", ours, f"/jobs/{jobs[0]}/events", "Content-Type: audio/wav")
    async with bench.stock() as stock:
        await stock.call("POST", "/talk")
        await measure("stock", stock, "/jobs/it/events", "Content-Type: multipart/form-data; boundary=b")
    title = (
        f"SIGTERM with {READERS + CROWD} followers, {DEAF} that never read, 300 slow ones (and 20 running jobs in ours)"
    )
    bench.report.table(title, ["server", "exit code", "seconds"], rows)
    bench.report.goal("seconds from SIGTERM to the end", float(rows[0][2] or 0), at_most=10)
    bench.report.goal("exit code", float("nan") if isinstance(rows[0][1], str) else float(rows[0][1] or 0), at_most=0)


ALL = {one.__name__: one for one in (refusals, near_boundary, idle, deaf, storm, slowloris, stop)}


async def main(only: str | None, out: Path) -> None:
    """Measure all, or one."""
    report = harness.Report("edge", ["fastapi", "uvicorn", "sse-starlette", "python-multipart"])
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        upstreams = []
        for name, every_ms, words in (("chatty", 100, 50), ("calm", 2000, 8)):
            talk = script(directory / f"{name}.json", every_ms, words)
            command = harness.python("service", "sandbox", "--port", "PORT", "--script", str(talk))
            upstreams.append(await stack.enter_async_context(running(directory, command, {}, harness.cores()[0])))
        bench = Bench(directory, report, *upstreams)
        for name, measure in ALL.items():
            if only in (None, name):
                await measure(bench)
    report.write(out)


if __name__ == "__main__":
    parser = harness.arguments(__doc__, "edge")
    parser.add_argument("--only", choices=list(ALL), help="one measurement")
    given = parser.parse_args()
    asyncio.run(main(given.only, given.out))
