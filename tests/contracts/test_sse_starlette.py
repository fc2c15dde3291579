"""What sse-starlette's response does with its tasks and ours without them, side by side: it must be the same.

Everything here is driven through ASGI, where both meet the server; the same over a socket is in tests/web/test_events.py.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from sse_starlette import EventSourceResponse
from starlette.types import ASGIApp, Message

from service.web import events
from service.web.edge import Edge
from tests.kit import eventually

PING, PATIENCE = 0.05, 0.2
KINDS = ("stock", "ours")


class Client:
    """One request, and what becomes of the generator behind its response."""

    def __init__(self, kind: str, *bodies: bytes, endless: bool = False, method: str = "GET") -> None:
        self.sent: list[Message] = []
        self.closed = 0
        self.reads = asyncio.Event()
        self.reads.set()
        self.gone = asyncio.Event()
        self.cut = 0
        self._bodies, self._endless = bodies, endless
        self.response = self._response(kind)
        self.scope: dict[str, Any] = {"type": "http", "method": method, "path": "/", "headers": [],
                      "extensions": {"turnwire.abort": self._abort}}  # fmt: skip
        self.task = asyncio.create_task(self._run())

    def _response(self, kind: str) -> ASGIApp:
        form = events._Frames()
        if kind == "ours":
            return events.EventStream("a-job", self._frames(), form)
        return EventSourceResponse(
            self._frames(), ping=PING, ping_message_factory=form.ping, send_timeout=PATIENCE, media_type=events.SSE
        )

    async def _run(self) -> None:
        # Inside `Edge`, which takes a cancelled request for the stop of the server; but it hides a HEAD from stock.
        head = self.scope["method"] == "HEAD"
        app = self.response if head else Edge(self.response)
        await app(self.scope | {"turnwire.head": True} if head else self.scope, self._receive, self._send)

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        try:
            for body in self._bodies:
                yield body
            if self._endless:
                await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def _receive(self) -> Message:
        if not self.sent:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def _abort(self) -> None:
        self.cut += 1

    @property
    def body(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings and patience as above, in ours too."""
    monkeypatch.setattr(events, "PING_SECONDS", PING)
    monkeypatch.setattr(events, "SEND_SECONDS", PATIENCE)


def heads(client: Client) -> tuple[int, list[tuple[bytes, bytes]]]:
    start = client.sent[0]
    return start["status"], [header for header in start["headers"] if header[0] != b"x-request-id"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_same_headers_and_bytes(method: str) -> None:
    clients = [Client(kind, b"one", b"two", method=method) for kind in KINDS]
    for client in clients:
        async with asyncio.timeout(20):
            await client.task
    stock, ours = clients
    assert heads(ours) == heads(stock)
    assert ours.body == stock.body == ([b""] if method == "HEAD" else [b"one", b"two", b""])
    assert [message["more_body"] for message in ours.sent[1:]] == [message["more_body"] for message in stock.sent[1:]]


@pytest.mark.parametrize("kind", KINDS)
async def test_signs_of_life_go_on_while_nothing_happens(kind: str) -> None:
    client = Client(kind, b"one", endless=True)
    await eventually(lambda: client.body[:4] == [b"one", *[b": ping\n\n"] * 3])
    client.gone.set()
    await client.task


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_ends_the_stream_and_is_no_stop(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(kind, b"one", endless=True)
    await eventually(lambda: b"one" in client.body)
    client.gone.set()
    async with asyncio.timeout(20):
        await client.task
    assert client.closed == 1
    assert client.cut == 0
    assert "cut short" not in capsys.readouterr().out
    seen = len(client.sent)
    await asyncio.sleep(3 * PING)
    assert len(client.sent) == seen  # no sign of life after the end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bodies", [(b"one", b"two"), (b"one",)], ids=["of an event", "of a ping"])
async def test_a_send_that_nobody_takes_ends_the_stream(
    kind: str, bodies: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(kind, *bodies, endless=True)
    put = client._send

    async def once(message: Message) -> None:
        await put(message)
        if message.get("body") == b"one":
            client.reads.clear()

    monkeypatch.setattr(client, "_send", once)
    async with asyncio.timeout(20):
        await asyncio.wait([client.task])
    assert client.closed == 1
    assert client.body == [b"one"]
    if kind == "ours":  # stock only raises; the connection would stay
        assert client.cut == 1
        client.task.result()


async def test_the_stop_of_the_server_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    client = Client("ours", b"one", endless=True)
    await eventually(lambda: b"one" in client.body)
    client.task.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait([client.task])
    assert client.closed == 1
    assert "cut short by the stop" in capsys.readouterr().out


async def test_two_tasks_a_subscriber() -> None:
    before = asyncio.all_tasks()
    client = Client("ours", b"one", endless=True)
    await eventually(lambda: b"one" in client.body)
    assert len(asyncio.all_tasks() - before) == 2
    client.gone.set()
    await client.task
    await eventually(lambda: asyncio.all_tasks() == before)
