"""What httpx-ws's session does and ours instead, side by side: one test for each part.

If one of the stock halves fails after an upgrade, the library has changed there: see whether ours can go.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import h11
import httpx
import pytest
import wsproto.utilities
from httpx_ws import AsyncWebSocketSession, WebSocketDisconnect, WebSocketNetworkError, aconnect_ws

from service.core.protocol import SessionEnd
from tests.contracts.test_upstream import AUDIO, PATIENT, ended, saying, session
from tests.contracts.test_upstream_pressure import UnreadReset
from tests.raw_upstream import (
    BEGIN,
    BINARY,
    CLOSE,
    PING,
    PONG,
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


@contextlib.asynccontextmanager
async def stock(script: Script, **kwargs: Any) -> AsyncIterator[tuple[AsyncWebSocketSession, RawUpstream]]:
    with raw_upstream(script, **kwargs) as server:
        async with httpx.AsyncClient(trust_env=False) as client:
            live: AsyncWebSocketSession
            async with aconnect_ws(server.url, client) as live:
                yield live, server


async def test_reading_ahead_of_the_consumer() -> None:
    """Stock: nothing is read while one message waits, so the ping after it goes unanswered."""
    answered: list[float] = []

    def script(peer: Peer) -> None:
        peer.upgrade(text(turn(0)), text(turn(1)), frame(PING, b"?"))
        peer.socket.settimeout(0.4)
        peer.read_until(PONG)
        answered.append(time.monotonic())

    async with stock(script):
        await asyncio.sleep(0.5)
    assert not answered
    async with session(script):
        await asyncio.sleep(0.5)
    assert answered


async def test_writing_is_bounded() -> None:
    """Stock: `send` waits for ever for a peer that stopped reading."""

    def deaf(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        peer.over.wait(1.2)
        peer.reset()

    async with stock(deaf, receive_buffer=4096) as (live, _):
        started = time.monotonic()
        with contextlib.suppress(WebSocketNetworkError):  # only because this peer resets in the end
            while True:
                await live.send_bytes(AUDIO * 40)
        assert time.monotonic() - started > 1
    async with session(deaf, receive_buffer=4096) as (ours, _):
        started = time.monotonic()
        for _ in range(100):
            ours.send(AUDIO * 40)
        assert (await ended(ours))[1].kind == "stalled"
        assert time.monotonic() - started < 1


async def test_leaving_is_bounded_and_can_be_cancelled() -> None:
    """Stock: the Close frame waits, shielded, behind what the peer does not read; one cancellation does not get out."""
    stuck = asyncio.Event()

    def deaf(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        peer.over.wait(2)
        peer.reset()

    async def leave_stock() -> None:
        async with stock(deaf, receive_buffer=4096) as (live, _):
            stuck.set()
            while True:
                await live.send_bytes(AUDIO * 40)

    async def leave_ours() -> None:
        async with session(deaf, limits=replace(PATIENT, write=30), receive_buffer=4096) as (live, _):
            for _ in range(100):
                live.send(AUDIO * 40)
            stuck.set()
            await asyncio.sleep(30)

    took = []
    for leave in (leave_stock, leave_ours):
        stuck.clear()
        task = asyncio.create_task(leave())
        await stuck.wait()
        await asyncio.sleep(0.3)
        started = time.monotonic()
        task.cancel()
        await asyncio.wait([task], timeout=1)
        took.append(time.monotonic() - started)
        await asyncio.wait([task])
        with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
            task.result()
    assert took[0] >= 1
    assert took[1] < 1


async def test_an_unsolicited_pong_is_harmless() -> None:
    """Stock: RFC 6455 section 5.5.3 allows it, httpx-ws dies of it with a KeyError."""

    def script(peer: Peer) -> None:
        peer.upgrade(frame(PONG, b"heartbeat"), text(turn(0)), close(1000))
        peer.read_until(CLOSE)

    with pytest.raises(BaseExceptionGroup) as caught:
        async with stock(script) as (live, _):
            await live.receive()
    assert caught.group_contains(KeyError)
    async with session(script) as (ours, _):
        assert len((await ended(ours))[0]) == 1


async def test_the_reason_survives_a_sender_that_fails_first() -> None:
    """Stock: after the peer's Close, `send_bytes` raises, with the audio in its text, and the code is never seen."""

    def script(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        peer.read_until(BINARY)
        peer.send(close(3008, "Session Expired"))
        peer.read_until(CLOSE)

    readers: list[asyncio.Task[None]] = []
    while not (readers and readers[-1].cancelled()):  # now and then the reader is woken first
        with pytest.raises(BaseExceptionGroup) as caught:
            await send_and_read(script, readers)
        assert len(readers) < 50
    assert caught.group_contains(wsproto.utilities.LocalProtocolError, match="audio!")
    async with session(script) as (ours, _):
        while not ours.failed:
            ours.send(AUDIO)
            await asyncio.sleep(0)
        assert (await ended(ours))[1] == SessionEnd(kind="closed", code=3008, reason="Session Expired")


async def test_the_reason_survives_a_failed_write() -> None:
    """Stock: a write error closes the socket, and the event loop drops what it had received."""
    script = UnreadReset()
    async with stock(script) as (live, _):
        await live.receive()
        await live.send_bytes(AUDIO)
        script.block_until_reset()
        with contextlib.suppress(WebSocketNetworkError):
            while True:
                await live.send_bytes(AUDIO)
        with pytest.raises(WebSocketNetworkError):
            await live.receive()
    script = UnreadReset()
    async with session(script) as (ours, _):
        await ours.receive()
        ours.send(AUDIO)
        script.block_until_reset()
        ours.send(AUDIO)
        assert (await ended(ours))[1].code == 3005


async def test_a_session_costs_no_task() -> None:
    """Stock: one reads and one pings, for each session."""

    async def tasks_while(opening: contextlib.AbstractAsyncContextManager[Any]) -> int:
        before = len(asyncio.all_tasks())
        async with opening:
            await asyncio.sleep(0.01)
            return len(asyncio.all_tasks()) - before

    assert await tasks_while(stock(saying(text(BEGIN)))) == 2
    assert await tasks_while(session(saying(text(BEGIN)))) == 0


async def test_a_session_keeps_nothing_of_the_handshake() -> None:
    """Stock: the request, the response and the connection with its parser, 20 KB."""

    def kept() -> int:
        gc.collect()
        return sum(isinstance(one, httpx.Request | httpx.Response | h11.Connection) for one in gc.get_objects())

    async def kept_by(opening: contextlib.AbstractAsyncContextManager[Any]) -> int:
        before = kept()
        async with opening:
            return kept() - before

    assert await kept_by(stock(saying(text(BEGIN)))) == 3
    assert await kept_by(session(saying(text(BEGIN)))) == 0


async def send_and_read(script: Script, readers: list[asyncio.Task[None]]) -> None:
    async with stock(script) as (live, _), asyncio.TaskGroup() as group:
        readers.append(group.create_task(read_all(live)))
        while True:
            await live.send_bytes(AUDIO)
            await asyncio.sleep(0)


async def read_all(live: AsyncWebSocketSession) -> None:
    while True:
        await live.receive()


async def test_the_size_of_a_message_is_capped() -> None:
    """Stock: `max_message_size_bytes` is the size of a read, not of a message."""

    def script(peer: Peer) -> None:
        peer.upgrade(frame(TEXT, b"x" * (3 << 20)))
        peer.read_until(CLOSE)

    async with stock(script) as (live, _):
        assert len(await live.receive_text(5)) == 3 << 20
    async with session(script) as (ours, _):
        assert (await ended(ours))[1].kind == "oversized"


async def test_what_the_body_raises_leaves_as_it_is() -> None:
    """Stock: in an ExceptionGroup."""

    def script(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        peer.read_until(CLOSE)

    with pytest.raises(BaseExceptionGroup):
        async with stock(script):
            raise LookupError
    with pytest.raises(LookupError):
        async with session(script):
            raise LookupError


async def test_parsing_goes_on_after_a_message_that_cannot_be_decoded() -> None:
    """Stock tells a broken frame and a close by the peer apart only by the text: both are `WebSocketDisconnect`."""

    def script(peer: Peer) -> None:
        peer.upgrade(frame(BINARY, b"?"), text(turn(0)), frame(3))
        peer.hold()

    async with stock(script) as (live, _):
        await live.receive()
        await live.receive()
        with pytest.raises(WebSocketDisconnect):
            await live.receive()
    async with session(script) as (ours, _):
        messages, end = await ended(ours)
        assert len(messages) == 1
        assert end.kind == "invalid"
