"""Leaving an upstream session is bounded and swallows nothing; storms, races and broken frames leave nothing behind."""

import asyncio
import contextlib
import json
import logging
import random
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service.backends.assemblyai import AssemblyAI, Session
from service.core.protocol import (
    Begin,
    Message,
    SessionEnd,
    SessionEnded,
)
from tests.contracts.conftest import BOTH
from tests.contracts.test_upstream import (
    AUDIO,
    FAST,
    PATIENT,
    SEE,
    answer_close,
    ended,
    error,
    hang_up,
    refusing,
    saying,
    session,
)
from tests.raw_upstream import (
    BEGIN,
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    TEXT,
    Peer,
    Script,
    close,
    frame,
    raw_upstream,
    text,
    turn,
)

LOOPS = BOTH


def babble(peer: Peer) -> None:
    while True:
        peer.send(text(turn(0, "x" * 500)))


def trickle(peer: Peer) -> None:
    while True:
        peer.send(b"\x00")
        time.sleep(0.05)


LEAVERS: dict[str, Script] = {
    "deaf": saying(text(BEGIN)),
    "babbling": saying(text(BEGIN), then=babble),
    "half a frame": saying(text(BEGIN) + b"\x81\x7f\0\0\0\0\0\0\xff\xff", then=trickle),
    "answering": saying(text(BEGIN), then=answer_close),
    "gone": saying(text(BEGIN), then=hang_up),
    "reset": saying(text(BEGIN), then=Peer.reset),
    "over": saying(text(BEGIN), close(3005)),
}


async def leave_by_return(_: Session) -> None:
    pass


async def leave_by_error(_: Session) -> None:
    raise LookupError


async def leave_by_end(live: Session) -> None:
    live._channel.fail("malformed", "enough")
    while True:
        await live.receive()


async def leave_by_cancel(_: Session) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.05, task.cancel)
    await asyncio.sleep(60)


async def leave_by_two_cancels(live: Session) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.15, task.cancel)
    await leave_by_cancel(live)


WAYS: dict[Callable[[Session], Awaitable[None]], type[BaseException] | None] = {
    leave_by_return: None,
    leave_by_error: LookupError,
    leave_by_end: SessionEnded,
    leave_by_cancel: asyncio.CancelledError,
    leave_by_two_cancels: asyncio.CancelledError,
}


async def leave(url: str, way: Callable[[Session], Awaitable[None]], blocked: bool, took: list[float]) -> None:
    async with AssemblyAI(url, None, limits=PATIENT) as upstream:
        left = time.monotonic()
        try:
            async with upstream.connect("a=b") as live:
                await live.receive()
                for _ in range(2000 * blocked):
                    live.send(AUDIO)
                await asyncio.sleep(0.02)
                left = time.monotonic()
                await way(live)
        finally:
            took.append(time.monotonic() - left)


@pytest.mark.parametrize("blocked", [False, True], ids=["", "blocked"])
@pytest.mark.parametrize("way", WAYS)
async def test_leaving_is_bounded_and_swallows_nothing(
    way: Callable[[Session], Awaitable[None]], blocked: bool
) -> None:
    took: list[float] = []
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(raw_upstream(script, receive_buffer=4096)) for script in LEAVERS.values()]
        leaving = [asyncio.create_task(leave(server.url, way, blocked, took)) for server in servers]
        outcomes = await asyncio.gather(*leaving, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {WAYS[way] or type(None)}
        assert max(took) < PATIENT.close + 0.5  # a part of that is how long the ways themselves take
        assert len(asyncio.all_tasks()) == 1


async def test_the_close_frame_is_sent_and_answered() -> None:
    codes: list[int] = []

    def script(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        codes.extend(struct.unpack("!H", peer.read_until(CLOSE)[:2]))
        peer.send(text(turn(0)), close(codes[-1]))
        with pytest.raises(EOFError):  # an orderly end, not a reset
            peer.read()
        codes.append(0)

    async with session(script) as (live, _):
        await live.receive()
    assert codes == [1000, 0]


# --- under pressure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("with_error", [True, False])
async def test_a_close_while_sending_never_loses_its_code(rounds: int, with_error: bool) -> None:
    def script(peer: Peer) -> None:
        peer.upgrade(text(BEGIN))
        peer.read()
        peer.send(error(3005, "Session Cancelled") if with_error else b"", close(3005, "why"))
        if with_error:
            peer.read_until(CLOSE)
        else:
            peer.reset()

    expected = SessionEnd(kind="closed", code=3005, reason="Session Cancelled" if with_error else "why")
    with raw_upstream(script) as server:
        async with AssemblyAI(server.url, "key", limits=PATIENT) as upstream:
            for _ in range(rounds):
                async with upstream.connect("a=b") as live:
                    await live.receive()
                    while not live.failed:
                        live.send(AUDIO)
                        await asyncio.sleep(0)
                    assert (await ended(live))[1] == expected


class UnreadReset:
    """A peer that closes and resets while our loop is busy, so that the next write fails before a read."""

    def __init__(self) -> None:
        self._go, self._done = threading.Event(), threading.Event()

    def __call__(self, peer: Peer) -> None:
        """The script."""
        peer.upgrade(text(BEGIN))
        peer.read_until(BINARY)
        self._go.wait(5)
        peer.send(text(turn(0)), error(3005, "Session Cancelled"), close(3005, "why"))
        peer.reset()
        self._done.set()

    def block_until_reset(self) -> None:
        """Call this after the first audio; the loop stands still meanwhile."""
        time.sleep(0.02)
        self._go.set()
        assert self._done.wait(5)


@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
async def test_a_reset_before_anything_was_read_does_not_cost_the_code(tls: bool) -> None:
    script = UnreadReset()
    async with session(script, tls=tls) as (live, _):
        await live.receive()
        live.send(AUDIO)
        await asyncio.sleep(0)  # uvloop writes between callbacks
        script.block_until_reset()
        for _ in range(10):
            live.send(AUDIO)
        messages, end = await ended(live)
    assert len(messages) == 1
    assert end == SessionEnd(kind="closed", code=3005, reason="Session Cancelled")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("rounds", [200, pytest.param(2000, marks=pytest.mark.soak)])
async def test_cancelled_connects_leak_nothing(rounds: int) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        time.sleep(0.002)
        peer._unread = peer.request + b"\r\n\r\n"
        peer.upgrade(text(BEGIN))
        peer.read_until(CLOSE)
        peer.send(close(1000))

    async def connect(upstream: AssemblyAI) -> Message:
        async with upstream.connect("a=b") as live:
            return await live.receive()

    with raw_upstream(script) as server:
        async with AssemblyAI(server.url, "key", limits=PATIENT) as upstream:
            await connect(upstream)  # what loop and executor keep for themselves is open from here on
            before = open_files()
            for batch in range(rounds // 20):
                tasks = [asyncio.create_task(connect(upstream)) for _ in range(20)]
                for number, task in enumerate(tasks):
                    asyncio.get_running_loop().call_later((batch * 20 + number) % 97 * 0.0002, task.cancel)
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(outcome, Begin | asyncio.CancelledError)
            assert len(asyncio.all_tasks()) == 1
            assert isinstance(await connect(upstream), Begin)
            async with asyncio.timeout(2):  # for the peers to notice
                while open_files() > before:
                    await asyncio.sleep(0.01)


async def test_more_sessions_than_a_pool_would_hold() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(raw_upstream(saying(text(BEGIN), then=answer_close)))
        upstream = await stack.enter_async_context(AssemblyAI(server.url, "key", limits=replace(PATIENT, handshake=10)))
        for _ in range(150):
            live = await stack.enter_async_context(upstream.connect("a=b"))
            assert isinstance(await live.receive(), Begin)


async def test_no_log_and_no_exception_carries_audio_or_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    outcomes = []
    for script in (saying(SEE), refusing("401 No", b"s3cret-key"), saying(text(BEGIN)), saying(then=Peer.reset)):
        with raw_upstream(script, receive_buffer=4096) as server:
            async with AssemblyAI(server.url, "s3cret-key", limits=FAST) as upstream:
                try:
                    async with upstream.connect("a=b") as live:
                        for _ in range(1000):
                            live.send(AUDIO)
                        await ended(live)
                        await live.receive()
                except SessionEnded as exc:
                    outcomes.append(repr(exc) + str(exc) + repr(exc.__context__) + repr(exc.__cause__))
    assert len(outcomes) == 4
    for told in (*outcomes, caplog.text):
        assert "audio!" not in told
        assert "s3cret-key" not in told


@pytest.mark.parametrize("seeds", [150, pytest.param(10_000, marks=pytest.mark.soak)])
async def test_mutated_frames_end_sessions_and_nothing_else(seeds: int) -> None:
    wire = bytearray(
        text(BEGIN)
        + text(turn(0, "x" * 200))
        + frame(PING, b"?")
        + frame(TEXT, b"{", fin=False)
        + frame(CONTINUATION, b"}")
        + close(1000)
    )

    def script(peer: Peer) -> None:
        seed = random.Random(int(peer_seed(peer)))
        mutated = bytearray(wire)
        for _ in range(seed.randrange(1, 6)):
            mutated[seed.randrange(len(mutated))] = seed.randrange(256)
        peer.send(bytes(mutated[: seed.randrange(1, len(mutated) + 1)]))

    def peer_seed(peer: Peer) -> str:
        peer.upgrade()
        return peer.request.split(b"seed=")[1].split(b" ")[0].decode()

    with raw_upstream(script) as server:
        async with AssemblyAI(server.url, "key", limits=PATIENT) as upstream:
            for seed in range(seeds):
                async with upstream.connect(f"seed={seed}") as live:
                    _, end = await ended(live)
                assert json.dumps(end.reason)
