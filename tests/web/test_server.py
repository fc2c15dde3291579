"""The server: its socket, its bounds, and how it stops, in this process and, for signals, in one of its own."""

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from service.runtime import open_runtime
from service.settings import load_settings
from service.web import server as web_server
from service.web.app import create_app
from service.web.server import HttpServer
from tests.kit import eventually
from tests.web.served import Raw, Served, head, raw, serving, wav


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


async def test_options_of_the_socket(idle: Served) -> None:
    listening = idle.server._socket
    assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    async with raw(idle) as client:
        client.send(head(method="GET", path="/healthz"))
        await client.answer()
        (protocol,) = idle.server._server.server_state.connections
        accepted = protocol.transport.get_extra_info("socket")
        for name, value in web_server._TCP_OPTIONS.items():
            assert accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


async def test_addresses(tmp_path: Path) -> None:
    hosts = {"127.0.0.1": "http://127.0.0.1:", "localhost": "http://127.0.0.1:", "::1": "http://[::1]:", "0.0.0.0": "http://127.0.0.1:",
             "::": "http://[::1]:"}  # fmt: skip
    for number, (host, url) in enumerate(hosts.items()):
        async with serving(tmp_path / str(number), host=host) as served:
            assert served.server.url.startswith(url)
            assert (await served.http.get("/healthz")).status_code == 200
    async with AsyncExitStack() as stack:
        settings = load_settings(
            data_dir=tmp_path / "x", host="127.0.0.1", port=int(served.server.url.rpartition(":")[2])
        )
        runtime = await stack.enter_async_context(open_runtime(settings))
        first = HttpServer(runtime, create_app(runtime))
        with pytest.raises(OSError, match="in use"):
            HttpServer(runtime, create_app(runtime))
        first.stop()
        await first.serve(_nothing)


async def _nothing() -> None:
    pass


@pytest.mark.parametrize("begun", [b"", b"GET", b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n"])
async def test_a_head_that_never_ends_is_cut(idle: Served, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(web_server, "HEAD_SECONDS", 0.3)
    async with raw(idle) as client:
        client.send(begun)
        began = time.monotonic()
        assert await ended(client, b"x" if begun else b"")  # cut, however it trickles on
        assert time.monotonic() - began < 2
    async with raw(idle) as client:  # a connection at rest between two requests is not
        for _ in range(2):
            client.send(head(method="GET", path="/healthz"))
            assert (await client.answer())[0] == 200
            await asyncio.sleep(0.5)


async def ended(client: Raw, trickle: bytes) -> bool:
    """Sends a little now and then until the connection is gone."""
    with contextlib.suppress(ConnectionError):
        while not client.reader.at_eof():
            client.send(trickle)
            await client.writer.drain()
            await asyncio.sleep(0.05)
    return True


async def test_a_head_that_is_too_long(idle: Served) -> None:
    async with raw(idle) as client:
        client.send(b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n" + b"X-Long: " + b"x" * 70_000)
        status, _, body = await client.answer()
        assert (status, b"too long" in body) == (400, True)
    async with raw(idle) as client:
        client.send(head("X-Long: " + "x" * 20_000, path="/healthz", method="GET"))
        assert (await client.answer())[0] == 200


async def test_order_of_stopping(tmp_path: Path) -> None:
    """Not ready first; what runs goes on; streams bring what the workers still say; then all ends."""
    seen: list[str] = []
    async with AsyncExitStack() as stack:
        settings = load_settings(data_dir=tmp_path, port=0, upstream_url="ws://127.0.0.1:9/")
        runtime = await stack.enter_async_context(open_runtime(settings))
        server = HttpServer(runtime, create_app(runtime))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, trust_env=False))

        async def drain() -> None:
            assert (await http.get("/readyz")).status_code == 503
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.post("/jobs", content=wav())).status_code == 202
            await http.post(f"/jobs/{job['id']}/cancel")
            seen.append("drained")

        task = asyncio.create_task(server.serve(drain))
        job = (await http.post("/jobs", content=wav())).json()
        other = (await http.post("/jobs", content=wav())).json()
        streams = [asyncio.create_task(http.get(f"/jobs/{j['id']}/events")) for j in (job, other)]
        await asyncio.sleep(0.2)
        server.stop()
        last, cut = [(await stream).text for stream in streams]
        await task
        assert seen == ["drained"]
        assert "event: job.canceled" in last
        assert cut.count("retry: ") == 2
        with pytest.raises(httpx.ConnectError):
            await http.get("/healthz")


async def test_an_upload_under_way_is_cut_by_the_stop_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, raw(served) as client:
        client.send(head("Content-Length: 1000000") + wav(1))
        await eventually(lambda: list((tmp_path / "data" / "audio").iterdir()))
        began = time.monotonic()
        served.server.stop()
        status, _, body = await client.answer()
        assert (status, b"unavailable" in body) == (503, True)
        assert time.monotonic() - began < 3
    assert not list((tmp_path / "data" / "audio").iterdir())


SCRIPT = """
import asyncio, sys
from pathlib import Path
import uvloop
from service.runtime import open_runtime
from service.settings import load_settings
from service.web.app import create_app
from service.web.server import HttpServer

async def main():
    settings = load_settings(data_dir=Path(sys.argv[1]), port=0, upstream_url="ws://127.0.0.1:9/")
    async with open_runtime(settings) as runtime:
        server = HttpServer(runtime, create_app(runtime))
        print(server.url, flush=True)
        await server.serve_until_signal(lambda: asyncio.sleep(float(sys.argv[2])))

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


async def started(directory: Path, drain: float) -> tuple[asyncio.subprocess.Process, httpx.AsyncClient]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, str(directory), str(drain), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    return process, httpx.AsyncClient(base_url=(await process.stdout.readline()).decode().strip(), trust_env=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    process, http = await started(tmp_path, 0.3)
    async with http:
        job = (await http.post("/jobs", content=wav())).json()
        following = asyncio.create_task(http.get(f"/jobs/{job['id']}/events"))
        await asyncio.sleep(0.3)
        process.send_signal(number)
        began = time.monotonic()
        answer = await following
        assert await asyncio.wait_for(process.wait(), 5) == 0
        assert 0.3 <= time.monotonic() - began < 4
        assert answer.text.count("retry: ") == 2


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process, http = await started(tmp_path, 60)
    async with http:
        await http.get("/healthz")
        process.send_signal(signal.SIGTERM)
        while (await http.get("/readyz")).status_code != 503:
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 2) == -signal.SIGINT
