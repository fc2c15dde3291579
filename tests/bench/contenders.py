"""The ways to hold N streams that `tests.bench.streams` compares; each runs in a process of its own.

`python -m tests.bench.contenders NAME URL STREAMS CHUNK_MS` connects, says `ready` and streams until it is killed. All send the
same chunks to the same schedule and read five turns a second per stream. Each turn is decoded: by this service's decoder where
ways to move bytes are compared (`edge`, `stock`, `websockets`, `picows`), as their authors do it by the guide's script and the SDK,
not at all by `raw`, which is the floor. All run on uvloop but those that have no event loop.
"""

import asyncio
import json
import logging
import os
import ssl
import sys
import threading
import time
import warnings
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import uvloop

from service.backends.assemblyai import AssemblyAI
from service.backends.frames import BINARY, encode
from service.core.protocol import decode
from service.pacer import Pacer
from service.runtime import SystemClock
from tests.raw_upstream import CERTIFICATE


class Schedule:
    """What is sent when: the streams are spread over the length of a chunk."""

    def __init__(self, streams: int, chunk_ms: int) -> None:
        self.chunk = os.urandom(32 * chunk_ms)  # 16 kHz
        self.interval = chunk_ms / 1000
        self.start = time.monotonic() + 0.2
        self.offsets = [self.interval * n / streams for n in range(streams)]

    async def a_task_each(self, sends: Sequence[Callable[[bytes], Awaitable[Any]]]) -> None:
        """One task per stream, as one would write it."""

        async def stream(due: float, send: Callable[[bytes], Awaitable[Any]]) -> None:
            while True:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await send(self.chunk)
                due += self.interval

        print("ready", flush=True)
        async with asyncio.TaskGroup() as group:
            for offset, send in zip(self.offsets, sends, strict=True):
                group.create_task(stream(self.start + offset, send))

    async def wheel(self, sends: Sequence[Callable[[bytes], Any]]) -> None:
        """The service's own wheel."""
        pacer = Pacer(SystemClock())
        for offset, send in zip(self.offsets, sends, strict=True):
            pacer.add(self.start + offset, self._ticker(self.start + offset, send))
        print("ready", flush=True)
        await asyncio.Event().wait()

    def _ticker(self, due: float, send: Callable[[bytes], Any]) -> Callable[[float], float]:
        def tick(_now: float) -> float:
            nonlocal due
            send(self.chunk)
            due += self.interval
            return due

        return tick


def trust() -> ssl.SSLContext:
    """The far end's certificate."""
    return ssl.create_default_context(cafile=CERTIFICATE)


async def edge(url: str, streams: int, chunk_ms: int) -> None:
    """This service's upstream edge."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(AssemblyAI(url, None, tls=trust()))
        live = [await stack.enter_async_context(upstream.connect("sample_rate=16000")) for _ in range(streams)]

        async def receive(session: Any) -> None:
            while True:
                await session.receive()

        tasks = [asyncio.create_task(receive(session)) for session in live]
        await Schedule(streams, chunk_ms).wheel([session.send for session in live])
        del tasks


async def stock(url: str, streams: int, chunk_ms: int) -> None:
    """httpx-ws as it comes, one shared client."""
    import httpx
    from httpx_ws import AsyncWebSocketSession, aconnect_ws

    async with AsyncExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        client = await stack.enter_async_context(httpx.AsyncClient(limits=limits, verify=trust(), trust_env=False))
        live: list[AsyncWebSocketSession] = [
            await stack.enter_async_context(aconnect_ws(url, client)) for _ in range(streams)
        ]

        async def receive(session: AsyncWebSocketSession) -> None:
            while True:
                decode(await session.receive_text())

        tasks = [asyncio.create_task(receive(session)) for session in live]
        await Schedule(streams, chunk_ms).a_task_each([session.send_bytes for session in live])
        del tasks


async def websockets(url: str, streams: int, chunk_ms: int) -> None:
    """websockets, a task per stream and direction."""
    from websockets.asyncio.client import connect

    tls = trust() if url.startswith("wss") else None
    live = [await connect(url, ssl=tls, compression=None, proxy=None) for _ in range(streams)]

    async def receive(session: Any) -> None:
        async for message in session:
            decode(message)

    tasks = [asyncio.create_task(receive(session)) for session in live]
    await Schedule(streams, chunk_ms).a_task_each([session.send for session in live])
    del tasks


async def picows(url: str, streams: int, chunk_ms: int) -> None:
    """picows on the wheel."""
    from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

    class Listener(WSListener):
        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type == WSMsgType.TEXT:
                decode(frame.get_payload_as_bytes())

    tls = trust() if url.startswith("wss") else None
    live = [(await ws_connect(Listener, url, ssl_context=tls))[0] for _ in range(streams)]
    await Schedule(streams, chunk_ms).wheel([partial(transport.send, WSMsgType.BINARY) for transport in live])


async def raw(url: str, streams: int, chunk_ms: int) -> None:
    """The floor: a ready-masked frame written to the transport, what comes in thrown away."""
    host, port = url.split("/")[2].split(":")
    tls = trust() if url.startswith("wss") else None

    class Dropping(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            """Thrown away."""

    loop = asyncio.get_running_loop()
    writes = []
    for _ in range(streams):
        transport, _protocol = await loop.create_connection(Dropping, host, int(port), ssl=tls)
        key = b64encode(os.urandom(16)).decode()
        head = f"GET / HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        transport.write(f"{head}Sec-WebSocket-Key: {key}\r\n\r\n".encode())
        writes.append(transport.write)
    schedule = Schedule(streams, chunk_ms)
    schedule.chunk = encode(BINARY, schedule.chunk)
    await schedule.wheel(writes)


def _sdk_options(url: str) -> tuple[Any, Any]:
    from assemblyai.streaming.v3 import RealTimeParameters, RealTimeTranscriberOptions

    options = RealTimeTranscriberOptions(api_key="k", api_host=url.rstrip("/"), connect_timeout=20)
    return options, RealTimeParameters.model_validate({"sample_rate": 16000, "speech_model": "u3-rt-pro"})


async def sdk_async(url: str, streams: int, chunk_ms: int) -> None:
    """AssemblyAI's SDK, its asyncio client, a task per stream that hands it the audio."""
    from assemblyai.streaming.v3 import AsyncRealTimeTranscriber, RealTimeEvents

    options, parameters = _sdk_options(url)
    live = []
    for _ in range(streams):
        client = AsyncRealTimeTranscriber(options)
        client.on(RealTimeEvents.Turn, lambda _client, _turn: None)
        await client.connect(parameters)
        live.append(client)
    await Schedule(streams, chunk_ms).a_task_each([client.stream for client in live])


def sdk(url: str, streams: int, chunk_ms: int) -> None:
    """AssemblyAI's SDK, its client of threads, three a stream; one more thread hands all of them their audio."""
    from assemblyai.streaming.v3 import RealTimeEvents, RealTimeTranscriber

    options, parameters = _sdk_options(url)
    live = []
    for _ in range(streams):
        client = RealTimeTranscriber(options)
        client.on(RealTimeEvents.Turn, lambda _client, _turn: None)
        client.connect(parameters)
        live.append(client)
    schedule = Schedule(streams, chunk_ms)
    print("ready", flush=True)
    due = schedule.start
    while True:
        for client in live:
            time.sleep(max(0.0, due - time.monotonic()))
            client.stream(schedule.chunk)
            due += schedule.interval / streams


def guide(url: str, streams: int, chunk_ms: int) -> None:
    """The vendor guide's way: websocket-client, one thread that reads and one that sends per stream."""
    import websocket

    options = {"ca_certs": str(CERTIFICATE)}
    live = [websocket.create_connection(url, sslopt=options, enable_multithread=True) for _ in range(streams)]
    schedule = Schedule(streams, chunk_ms)

    def receive(session: Any) -> None:
        while True:
            json.loads(session.recv())

    def send(session: Any, due: float) -> None:
        while True:
            time.sleep(max(0.0, due - time.monotonic()))
            session.send_binary(schedule.chunk)
            due += schedule.interval

    schedule.start = time.monotonic() + 1 + streams / 200  # once the threads are there
    for session, offset in zip(live, schedule.offsets, strict=True):
        threading.Thread(target=receive, args=[session], daemon=True).start()
        threading.Thread(target=send, args=[session, schedule.start + offset], daemon=True).start()
    time.sleep(max(0.0, schedule.start - time.monotonic()))
    print("ready", flush=True)
    threading.Event().wait()


ASYNC: dict[str, Callable[[str, int, int], Awaitable[None]]] = {
    "edge": edge, "stock": stock, "websockets": websockets, "picows": picows, "raw": raw, "sdk async": sdk_async
}  # fmt: skip
THREADED = {"guide": guide, "sdk": sdk}


def main() -> None:
    """Be one of them."""
    name, url, streams, chunk_ms = sys.argv[1:]
    warnings.simplefilter("ignore")  # the SDK's are its own business
    logging.disable()
    if name in THREADED:
        THREADED[name](url, int(streams), int(chunk_ms))
        return

    async def run() -> None:
        await ASYNC[name](url, int(streams), int(chunk_ms))

    uvloop.run(run())


if __name__ == "__main__":
    main()
