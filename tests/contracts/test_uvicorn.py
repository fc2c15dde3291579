"""What the server takes for granted of uvicorn's own parts: it is pinned, and this tells what a newer one has changed."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.web.server import _Connection, _Protocol, _write
from tests.kit import eventually

Answer = Callable[[Send, RequestResponseCycle], Awaitable[None]]


class Recording(_Connection):
    """The connection of the service; keeps what it reads requests with."""

    last: _Protocol

    def __init__(self, **given: object) -> None:
        super().__init__(**given)
        Recording.last = self._http


@asynccontextmanager
async def asked(
    answer: Answer, request: bytes = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
) -> AsyncIterator[asyncio.StreamReader]:
    """What comes back from a server that answers one request so."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await answer(send, Recording.last.cycle)

    app_: ASGIApp = app
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app_, ws="none", lifespan="off", log_config=None, http=Recording)  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    await eventually(lambda: server.started)
    reader, writer = await asyncio.open_connection(*listening.getsockname(), limit=1024)
    try:
        writer.write(request)
        yield reader
    finally:
        writer.transport.abort()
        server.should_exit = True
        await serving


def start(*headers: tuple[bytes, bytes]) -> dict[str, object]:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def body(data: bytes, *, more: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def test_what_is_written_past_it_looks_as_if_it_had_been_sent() -> None:
    wrote = []

    async def answer(send: Send, cycle: RequestResponseCycle) -> None:
        wrote.append(_write(cycle, b"too early"))
        await send(start())
        await send(body(b"sent"))
        wrote.append(_write(cycle, b"written"))
        await send(body(b"", more=False))
        wrote.append(_write(cycle, b"too late"))

    async with asked(answer) as reader:
        head, _, rest = (await reader.readuntil(b"0\r\n\r\n")).partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert rest == b"4\r\nsent\r\n7\r\nwritten\r\n0\r\n\r\n"
    assert wrote == [False, True, False]


async def test_a_body_of_known_length_is_left_alone() -> None:
    wrote = []

    async def answer(send: Send, cycle: RequestResponseCycle) -> None:
        await send(start((b"content-length", b"4")))
        wrote.append(_write(cycle, b"more"))
        await send(body(b"sent", more=False))

    async with asked(answer) as reader:
        assert (await reader.readuntil(b"sent")).endswith(b"\r\n\r\nsent")
    assert wrote == [False]


async def test_a_client_that_does_not_read_is_told_by_the_flow() -> None:
    took, done = [], asyncio.Event()

    async def answer(send: Send, cycle: RequestResponseCycle) -> None:
        await send(start())
        while _write(cycle, bytes(65_536)):
            took.append(65_536)
            assert sum(took) < 1 << 28
        done.set()

    async with asked(answer) as reader:
        await done.wait()
        flow = Recording.last.cycle.flow
        paused = [flow.write_paused]
        while flow.write_paused:
            await reader.read(65_536)
        assert paused == [True]
    assert took


async def test_a_body_is_handed_on_as_it_came() -> None:
    """`on_body` leaves the pieces where uvicorn looks for them, in order and each once."""
    sent, got = bytes(range(256)) * 4096, bytearray()

    async def answer(send: Send, cycle: RequestResponseCycle) -> None:
        while True:
            message = await cycle.receive()
            got.extend(message["body"])  # type: ignore[typeddict-item]
            if not message["more_body"]:  # type: ignore[typeddict-item]
                break
        await send(start((b"content-length", b"2")))
        await send(body(b"ok", more=False))

    head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(sent)
    async with asked(answer, head + sent) as reader:
        await reader.readuntil(b"ok")
    assert got == sent
