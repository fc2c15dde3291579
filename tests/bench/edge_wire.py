"""Servers as processes on the measured core, and clients that send and read exactly what they are told."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.bench import harness

KEY = "a-key-of-the-benchmark"
AUTH = f"Authorization: Bearer {KEY}"
ENDS = frozenset({"job.completed", "job.failed", "job.canceled"})


class Server:
    """One server on the measured core; what it says goes to a file."""

    def __init__(self, directory: Path, command: list[str], environment: Mapping[str, str], core: int) -> None:
        """Not started."""
        self._directory, self._command, self._core = directory, command, core
        self._environment = {"PATH": os.defpath, "HOME": str(directory), **environment}
        self._errors = directory / f"{command[-1].strip('-')}-{id(self)}.stderr"
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    async def start(self) -> None:
        """Until it says where it serves; again on the same port."""
        said = self._errors.stat().st_size if self._errors.exists() else 0
        with self._errors.open("ab") as errors:
            port = [str(self.port) if part == "PORT" else part for part in self._command]
            self._process = harness.start(
                port, self._core, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                env=self._environment,
            )  # fmt: skip
        async with asyncio.timeout(60):
            while not (found := re.search(rb"//127\.0\.0\.1:(\d+)", self._errors.read_bytes()[said:])):
                assert self._process.poll() is None, self._errors.read_text()[-2000:]
                await asyncio.sleep(0.01)
        self.port = int(found[1])

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def descriptors(self) -> int:
        """Open files and sockets of the process."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    @property
    def rss(self) -> int:
        """Resident bytes."""
        return harness.rss_bytes(self.pid)

    @property
    def cpu(self) -> float:
        """Seconds used."""
        return harness.cpu_seconds(self.pid)

    async def end(self, number: signal.Signals = signal.SIGKILL, within: float = 60) -> tuple[int | None, float]:
        """Send the signal; exit code (None: it did not end) and seconds until it had ended."""
        assert self._process is not None
        began = time.monotonic()
        self._process.send_signal(number)
        while (code := self._process.poll()) is None and time.monotonic() - began < within:
            await asyncio.sleep(0.005)
        if code is None:
            self._process.kill()
            self._process.wait()
        return code, time.monotonic() - began

    async def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """One request of somebody who may call."""
        headers = {"Authorization": f"Bearer {KEY}"} | request.pop("headers", {})
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            return await client.request(method, f"http://127.0.0.1:{self.port}{path}", headers=headers, **request)

    async def upload(self, wav: bytes, **options: str) -> str:
        """A job's id."""
        answer = await self.call("POST", "/jobs", content=wav, params=options, headers={"Content-Type": "audio/wav"})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])


@asynccontextmanager
async def running(
    directory: Path, command: list[str], environment: Mapping[str, str], core: int
) -> AsyncIterator[Server]:
    """A server while the context lasts."""
    server = Server(directory, command, environment, core)
    await server.start()
    try:
        yield server
    finally:
        await server.end()


# --- clients ---------------------------------------------------------------------------------------------------------


async def connect(port: int, *, receive_buffer: int = 0) -> socket.socket:
    """A plain socket that does not block."""
    client = socket.socket()
    client.setblocking(False)
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    return client


def head(method: str, path: str, *headers: str) -> bytes:
    """The head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


async def send_until_answered(
    port: int, request: bytes, total: int, *, expect: bool, first: bytes, last: bytes
) -> tuple[int, int, float]:
    """Send a body as curl does, looking for the answer meanwhile: status, bytes of body sent, seconds.

    The body is `first`, zeros and `last`, `total` bytes. With `expect` nothing is sent before 100, or one second
    without it.
    """
    loop, began = asyncio.get_running_loop(), time.monotonic()
    client = await connect(port)
    await loop.sock_sendall(client, request)
    answer = asyncio.ensure_future(loop.sock_recv(client, 65536))
    sent, piece = 0, bytes(1 << 18)
    if expect:
        await asyncio.wait([answer], timeout=1)
        if answer.done() and answer.result().startswith(b"HTTP/1.1 100"):
            answer = asyncio.ensure_future(loop.sock_recv(client, 65536))
    try:
        while sent < total and not answer.done():
            left = total - sent - len(last)
            data = first if sent == 0 < len(first) else piece[:left] if left > 0 else last
            await loop.sock_sendall(client, data)
            sent += len(data)
            await asyncio.sleep(0)
    except OSError:
        pass
    status = 0
    with contextlib.suppress(OSError, TimeoutError, IndexError):
        async with asyncio.timeout(60):
            status = int((await answer).split()[1])
    client.close()
    return status, sent, time.monotonic() - began


class Listener(asyncio.Protocol):
    """A client of server-sent events: the ids and delays of what it is told, and what it needs to come back."""

    def __init__(self, path: str) -> None:
        """`connect` begins."""
        self.path = path
        self.last = 0
        self.ids: list[int] = []
        self.frames: dict[int, bytes] = {}
        self.delays: list[float] = []  # of each event, since it was made
        self.answered = self.ended = False
        self.gone = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._chunks = self._text = b""

    async def connect(self, port: int) -> "Listener":
        """Listen, after what has been heard before. Raises OSError."""
        self._chunks = self._text = b""
        self.gone = asyncio.Event()
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        after = [f"Last-Event-ID: {self.last}"] if self.last else []
        transport.write(head("GET", self.path, AUTH, *after))

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self.gone.set()

    def close(self) -> None:
        """Leave, as a broken network does."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Chunks hold pieces of frames; frames have no CR in them."""
        self._chunks += data
        if self._chunks.startswith(b"HTTP/"):
            answered, found, rest = self._chunks.partition(b"\r\n\r\n")
            if not found:
                return
            assert answered.split(None, 2)[1] in (b"200", b"204"), answered
            self._chunks, self.answered = rest, True
        while (at := self._chunks.find(b"\r\n")) >= 0:
            size = int(self._chunks[:at] or b"0", 16)
            if len(self._chunks) < at + size + 4:
                break
            self._text += self._chunks[at + 2 : at + 2 + size]
            self._chunks = self._chunks[at + size + 4 :]
        *frames, self._text = re.split(rb"\r?\n\r?\n", self._text)
        now = time.time()
        for frame in frames:
            self._take(frame, now)

    def _take(self, frame: bytes, now: float) -> None:
        found = re.search(rb"^data: (.*)$", frame, re.MULTILINE)
        if found is None:
            return
        event = msgspec.json.decode(found[1])
        assert event.get("type") != "stream.reset", "every id that was seen is known"
        if event.get("id"):
            self.last = event["id"]
            self.ids.append(self.last)
            self.frames[self.last] = found[1]
        self.ended = event.get("type") in ENDS
        at = event["at"]
        self.delays.append(now - (at if isinstance(at, float) else datetime.fromisoformat(at).timestamp()))


async def listen(port: int, path: str, count: int) -> list[Listener]:
    """So many listeners, all connected."""
    found: list[Listener] = []
    for _ in range(0, count, 50):
        found += await asyncio.gather(*(Listener(path).connect(port) for _ in range(min(50, count - len(found)))))
    return found


async def until(condition: Callable[[], bool], within: float = 60) -> float:
    """Seconds until it holds; raises TimeoutError."""
    began = time.monotonic()
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)
    return time.monotonic() - began


@asynccontextmanager
async def asking(port: int, path: str = "/healthz") -> AsyncIterator[list[float]]:
    """Another client, that asks for `path` every 10 ms on one connection: how long each answer took, in seconds."""
    took: list[float] = []
    async with httpx.AsyncClient(trust_env=False, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:

        async def ask() -> None:
            while True:
                began = time.monotonic()
                assert (await client.get(f"http://127.0.0.1:{port}{path}")).status_code == 200
                took.append(time.monotonic() - began)
                await asyncio.sleep(0.01)

        task = asyncio.create_task(ask())
        try:
            yield took
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
