"""The `Upstream` port over real sockets: what a session yields, how it ends, and that leaving it is always bounded."""

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import pytest

from service.backends.assemblyai import AssemblyAI, Session
from service.backends.websocket import Limits
from service.core.protocol import (
    TERMINATE,
    Begin,
    Message,
    SessionEnd,
    SessionEnded,
    Termination,
    Turn,
    Unknown,
)
from tests.raw_upstream import (
    BEGIN,
    BINARY,
    CERTIFICATE,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TERMINATION,
    TEXT,
    Peer,
    RawUpstream,
    Script,
    close,
    frame,
    raw_upstream,
    text,
    turn,
)

FAST = Limits(connect=1, handshake=1, write=0.5, close=0.15, ping=0.2, pong=0.2)
PATIENT = replace(FAST, ping=10, pong=10)
TRUSTING = ssl.create_default_context(cafile=CERTIFICATE)
AUDIO = bytes(range(250)) * 12 + b"audio!" * 20  # 3,120 bytes


@contextlib.asynccontextmanager
async def session(
    script: Script, *, limits: Limits = PATIENT, **kwargs: Any
) -> AsyncIterator[tuple[Session, RawUpstream]]:
    with raw_upstream(script, **kwargs) as server:
        async with (
            AssemblyAI(server.url, "key", limits=limits, tls=TRUSTING) as upstream,
            upstream.connect("sample_rate=16000") as live,
        ):
            yield live, server


async def ended(live: Session, seconds: float = 5) -> tuple[list[Message], SessionEnd]:
    """Everything a session yields, and its end."""
    messages = []
    async with asyncio.timeout(seconds):
        while True:
            try:
                messages.append(await live.receive())
            except SessionEnded as exc:
                return messages, exc.end


async def end_of(script: Script, **kwargs: Any) -> SessionEnd:
    """The end of a session with this peer, refused or not, and none of the exceptions that must not leave."""
    try:
        async with session(script, **kwargs) as (live, _):
            return (await ended(live))[1]
    except SessionEnded as exc:
        return exc.end


def error(code: int | None, message: str) -> bytes:
    return text({"type": "Error", "error_code": code, "error": message} if code else {"error": message})


ERROR = error(3008, "Session Expired: Maximum session duration exceeded")
EXPIRED = SessionEnd(kind="closed", code=3008, reason="Session Expired: Maximum session duration exceeded")
SEE = close(3005, "See Error message for details")


def saying(*data: bytes, then: Callable[[Peer], object] = Peer.hold) -> Script:
    def script(peer: Peer) -> None:
        peer.upgrade(*data)
        then(peer)

    return script


def answer_close(peer: Peer) -> None:
    peer.send(frame(CLOSE, peer.read_until(CLOSE)))


def hang_up(_: Peer) -> None:
    """The script's end closes the socket."""


# --- a session that goes well ----------------------------------------------------------------------------------------


async def test_a_session_from_begin_to_close() -> None:
    heard: list[tuple[int, bytes]] = []

    def script(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        while (read := peer.read())[0] == BINARY:
            heard.append(read)
        heard.append(read)
        peer.send(text(turn(0)), text({"type": "Later", "x": 1}), text(TERMINATION), close(1000, "Session Ended"))
        heard.append(peer.read())

    async with session(script) as (live, server):
        assert isinstance(await live.receive(), Begin)
        live.send(AUDIO)
        live.send(AUDIO[::-1])
        live.finish()
        messages, end = await ended(live)
        assert live.failed
    assert [type(message) for message in messages] == [Turn, Unknown, Termination]
    assert end == SessionEnd(kind="closed", code=1000, reason="Session Ended")
    assert heard == [
        (BINARY, AUDIO),
        (BINARY, AUDIO[::-1]),
        (TEXT, TERMINATE.encode()),
        (CLOSE, struct.pack("!H", 1000) + b"Session Ended"),
    ]
    head = server.peers[0].request.decode().lower()
    assert head.startswith("get /v3/ws?sample_rate=16000 http/1.1")
    assert "authorization: key\r\n" in head
    assert "assemblyai-version: 2025-05-12\r\n" in head
    assert "extensions" not in head


async def test_what_comes_after_the_end_is_dropped() -> None:
    heard: list[int] = []

    def script(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        peer.read_until(BINARY)
        peer.send(close(3005))
        with contextlib.suppress(EOFError):
            while True:
                heard.append(peer.read()[0])

    async with session(script) as (live, _):
        live.send(AUDIO)
        await ended(live)
        assert not live.ready
        live.send(AUDIO)
        live.finish()
        with pytest.raises(SessionEnded):  # asking again neither hangs nor says something else
            await live.receive()
    assert heard == [CLOSE]


async def test_a_cancelled_receive_loses_nothing() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        for order in range(200):
            peer.send(text(turn(order)))
            time.sleep(0.001)
        peer.send(close(1000))

    orders: list[int] = []
    async with session(script) as (live, _):
        with contextlib.suppress(SessionEnded):
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.0005):
                        message = await live.receive()
                        assert isinstance(message, Turn)
                        orders.append(message.turn_order)
    assert orders == list(range(200))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 125, 126, 127, 1000])
async def test_messages_in_any_slices(size: int) -> None:
    turns = [turn(0, "a"), turn(1, "ä€😀" * 30), turn(2, "x" * 3000)]
    long = text(turns[1])[4:]
    begun = text(turns[0]) + frame(PING, b"?") + frame(TEXT, long[:51], fin=False) + frame(PING)
    more = frame(CONTINUATION, b"", fin=False) + frame(CONTINUATION, long[51:52], fin=False)
    wire = begun + more + frame(CONTINUATION, long[52:]) + text(turns[2]) + close(1000, "ä")

    def script(peer: Peer) -> None:
        peer.upgrade()
        for start in range(0, len(wire), size):
            peer.send(wire[start : start + size])
            if size < 200 and start % 20 == 0:
                time.sleep(0.0002)
        assert peer.read() == (PONG, b"?")
        assert peer.read() == (PONG, b"")

    async with session(script) as (live, _):
        messages, end = await ended(live)
    assert [message.transcript for message in messages if isinstance(message, Turn)] == [t["transcript"] for t in turns]
    assert end == SessionEnd(kind="closed", code=1000, reason="ä")


async def test_over_tls() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        assert peer.read() == (BINARY, AUDIO * 20)
        peer.send(text(turn(0, "x" * 100_000)), text(TERMINATION), close(1000))
        assert peer.read()[0] == CLOSE
        with pytest.raises(EOFError):  # close_notify
            peer.read()

    async with session(script, tls=True) as (live, server):
        await live.receive()
        live.send(AUDIO * 20)
        messages, end = await ended(live)
        assert len(messages) == 2
        assert end.code == 1000
        async with AssemblyAI(server.url, "key", limits=PATIENT) as distrustful:
            with pytest.raises(SessionEnded) as refused:
                async with distrustful.connect(""):
                    raise AssertionError
    assert refused.value.end.kind == "unreachable"
    assert "CERTIFICATE_VERIFY_FAILED" in refused.value.end.reason


# --- connecting ------------------------------------------------------------------------------------------------------


async def test_the_key_is_not_sent_in_the_clear_off_this_machine() -> None:
    with raw_upstream(lambda peer: peer.upgrade(close(1008))) as server:
        elsewhere = AssemblyAI(server.url.replace("127.0.0.1", "0.0.0.0"), "s3cret", limits=PATIENT)
        async with elsewhere as upstream, upstream.connect("a=b") as live:
            await ended(live)
    assert b"s3cret" not in server.peers[0].request
    assert b"authorization" not in server.peers[0].request.lower()


@pytest.mark.parametrize("url", ["https://api.example/v3/ws", "wss://", "streaming.example"])
def test_an_url_that_cannot_be_one(url: str) -> None:
    with pytest.raises(ValueError, match="ws://"):
        AssemblyAI(url, None)


def refusing(status: str, body: bytes = b"", extra: str = "") -> Script:
    return lambda peer: peer.refuse(status, body, extra)


def endless(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 500 Oops\r\n\r\n")
    while True:
        peer.send(b"x" * 65_536)


@pytest.mark.parametrize(
    ("script", "code", "reason", "retry_after"),
    [
        (refusing("401 Unauthorized", b'{"error":"no"}'), 401, '{"error":"no"}', None),
        (refusing("429 Too Many", b"slow down", "Retry-After: 17\r\n"), 429, "slow down", 17),
        (refusing("503 Down", b"", "Retry-After: soon\r\n"), 503, "", None),
        (refusing("302 Found", b"", "Location: ws://127.0.0.1:1/\r\n"), 302, "", None),
        (refusing("200 OK", b"<html>"), 200, "<html>", None),
        (refusing("410 Gone", b"Authorization: key"), 410, "Authorization: ***", None),
        (endless, 500, "x" * 8192, None),
    ],
)
async def test_refused(script: Script, code: int, reason: str, retry_after: float | None) -> None:
    assert await end_of(script) == SessionEnd(kind="refused", code=code, reason=reason, retry_after=retry_after)


async def test_retry_after_may_be_a_date() -> None:
    end = await end_of(refusing("429 Too Many", b"", f"Retry-After: {formatdate(time.time() + 60, usegmt=True)}\r\n"))
    assert end.retry_after == pytest.approx(60, abs=3)


def answering(answer: bytes) -> Script:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(answer)

    return script


NO_UPGRADE: dict[str, tuple[Script, str]] = {
    "wrong accept": (lambda peer: peer.upgrade(text(BEGIN), accept="s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "invalid"),
    "wrong upgrade": (lambda peer: peer.upgrade(text(BEGIN), upgrade="h2c"), "invalid"),
    "extension": (lambda peer: peer.upgrade(extra="Sec-WebSocket-Extensions: permessage-deflate"), "invalid"),
    "another protocol": (answering(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "invalid"),
    "huge header": (answering(b"HTTP/1.1 101 Switching Protocols\r\nX: " + b"x" * 300_000), "invalid"),
    "cut": (answering(b"HTTP/1.1 101 Swi"), "unreachable"),
    "hang up": (answering(b""), "unreachable"),
    "reset": (lambda peer: peer.reset(), "unreachable"),
    "no answer": (lambda peer: peer.hold(), "unreachable"),
}


@pytest.mark.parametrize("name", NO_UPGRADE)
async def test_not_an_upgrade(name: str) -> None:
    script, kind = NO_UPGRADE[name]
    assert (await end_of(script, limits=replace(PATIENT, handshake=0.3))).kind == kind


async def test_a_trickled_handshake_is_bounded() -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        while True:
            peer.send(b"HTTP/1.1 101 Switching Protocols\r\n"[:1])
            time.sleep(0.05)

    started = time.monotonic()
    end = await end_of(script, limits=replace(PATIENT, connect=0.4, handshake=0.4))
    assert end.kind in ("unreachable", "invalid")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("url", ["ws://127.0.0.1:9/", "ws://nothing.invalid/", "wss://127.0.0.1:{port}/"])
async def test_unreachable(url: str) -> None:
    with raw_upstream(lambda peer: peer.send(b"not TLS" * 100)) as server:
        async with AssemblyAI(url.format(port=server.port), "key", limits=FAST) as upstream:
            with pytest.raises(SessionEnded) as caught:
                async with upstream.connect("x=y"):
                    raise AssertionError
    assert caught.value.end.kind == "unreachable"
    assert caught.value.end.reason


async def test_an_address_that_swallows_packets_costs_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(port: int, family: int = socket.AF_INET) -> tuple[Any, ...]:
        return family, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)

    with socket.socket() as hole, contextlib.ExitStack() as stack:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(3):  # a full backlog answers no further SYN
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        server = stack.enter_context(raw_upstream(saying(text(BEGIN), then=answer_close)))

        async def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
            return [address(9, 999), address(hole.getsockname()[1]), address(9), address(server.port)]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        started = time.monotonic()
        async with AssemblyAI("ws://several.example", None, limits=PATIENT) as upstream, upstream.connect("") as live:
            assert isinstance(await live.receive(), Begin)
        assert 0.2 < time.monotonic() - started < 0.9
    assert len(asyncio.all_tasks()) == 1
