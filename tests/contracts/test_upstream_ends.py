"""How upstream sessions end: told by the peer, decided by us, or noticed by its silence."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from service.core.protocol import (
    EndKind,
    SessionEnd,
    Turn,
)
from tests.contracts.test_upstream import (
    AUDIO,
    ERROR,
    EXPIRED,
    FAST,
    PATIENT,
    SEE,
    end_of,
    ended,
    error,
    hang_up,
    saying,
    session,
)
from tests.raw_upstream import (
    BEGIN,
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TERMINATION,
    TEXT,
    Peer,
    Script,
    close,
    frame,
    text,
    turn,
)

ENDS: dict[str, tuple[Script, SessionEnd]] = {
    "code": (saying(close(3005, "Cancelled")), SessionEnd(kind="closed", code=3005, reason="Cancelled")),
    "unknown code": (saying(close(4031, "é")), SessionEnd(kind="closed", code=4031, reason="é")),
    "no code": (saying(frame(CLOSE)), SessionEnd(kind="closed", code=1005)),
    "error, close": (saying(ERROR, SEE), EXPIRED),
    "error only": (saying(ERROR), EXPIRED),
    "error, end": (saying(ERROR, then=hang_up), EXPIRED),
    "error, reset": (saying(ERROR, then=Peer.reset), EXPIRED),
    "error, termination, close": (saying(ERROR, text(TERMINATION), SEE), EXPIRED),
    "untyped error": (saying(error(None, "No"), close(4001, "x")), SessionEnd(kind="closed", code=4001, reason="No")),
    "wordless error": (saying(error(1008, ""), close(1008, "why")), SessionEnd(kind="closed", code=1008, reason="why")),
}


@pytest.mark.parametrize("name", ENDS)
async def test_the_end_is_told_by_error_frame_and_close_code(name: str) -> None:
    script, end = ENDS[name]
    assert await end_of(script) == end


@pytest.mark.parametrize("then", [hang_up, Peer.reset])
async def test_a_connection_that_just_breaks_is_lost(then: Callable[[Peer], object]) -> None:
    async with session(saying(text(turn(0)), then=then)) as (live, _):
        messages, end = await ended(live)
    assert len(messages) == 1
    assert end.kind == "lost"
    assert end.code is None


HUGE = 30 << 20


FOREIGN: dict[str, tuple[EndKind, bytes]] = {
    "30 MB": ("oversized", frame(TEXT, b'"' + b"x" * HUGE + b'"')),
    "many parts": ("oversized", frame(TEXT, b"x", fin=False) + frame(CONTINUATION, b"x" * 65_536, fin=False) * 40),
    "binary": ("oversized", frame(BINARY, bytes(HUGE))),
    "announced": ("oversized", b"\x81\x7f\x7f\xff\xff\xff\xff\xff\xff\xff" + b"x" * (2 << 20)),
    "utf-8": ("invalid", frame(TEXT, b'{"type":"\xff\xfe"}')),
    "split utf-8": ("invalid", frame(TEXT, b"\xe2", fin=False) + frame(CONTINUATION, b"\x28\xa1")),
    "cut utf-8": ("invalid", frame(TEXT, b"\xe2\x82")),
    "masked": ("invalid", frame(TEXT, b"{}", masked=True)),
    "masked ping": ("invalid", frame(PING, b"x", masked=True)),
    "rsv": ("invalid", frame(TEXT, b"{}", rsv=4)),
    "opcode 3": ("invalid", frame(3, b"{}")),
    "opcode 11": ("invalid", frame(11, b"{}")),
    "long ping": ("invalid", frame(PING, b"x" * 126)),
    "split ping": ("invalid", frame(PING, b"x", fin=False)),
    "stray part": ("invalid", frame(CONTINUATION, b"{}")),
    "lost part": ("invalid", frame(TEXT, b"{", fin=False) + frame(TEXT, b"}")),
    "short close": ("invalid", frame(CLOSE, b"\x03")),
    "close 1006": ("invalid", close(1006)),
    "close 999": ("invalid", close(999)),
    "close utf-8": ("invalid", frame(CLOSE, b"\x03\xe8\xff")),
    "http": ("invalid", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_what_is_not_this_protocol(name: str) -> None:
    kind, data = FOREIGN[name]
    async with session(saying(text(turn(0)), data)) as (live, _):
        messages, end = await ended(live)
    assert len(messages) == 1  # what was fine before it is not lost
    assert end.kind == kind
    assert end.code is None
    assert len(end.reason) < 200


BAD = [
    frame(BINARY, AUDIO),
    frame(TEXT, b"{"),
    frame(TEXT, b"[]"),
    frame(TEXT, b""),
    text({"type": "Turn"}),
    text({"x": 1}),
]


def one_more(peer: Peer) -> None:
    peer.read()
    peer.send(BAD[0], text(turn(1)))


async def test_undecodable_messages_are_skipped_and_the_tenth_ends_it() -> None:
    nine = (BAD * 2)[:9]
    async with session(saying(*nine, text(turn(0)), then=one_more)) as (live, _):
        assert isinstance(await live.receive(), Turn)
        live.send(AUDIO)
        assert (await ended(live)) == ([], SessionEnd(kind="malformed", reason="AssemblyAI sent a binary message."))


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_a_storm_of_control_frames_is_dropped(opcode: int) -> None:
    started = time.process_time()
    assert (await end_of(saying(frame(opcode, b"x" * 100) * 20_000))).kind == "invalid"
    assert time.process_time() - started < 0.5
    assert (await end_of(saying(frame(opcode, b"x") * 100, close(1000)))).code == 1000


# --- life ------------------------------------------------------------------------------------------------------------


async def test_a_silent_peer_is_noticed() -> None:
    started = time.monotonic()
    assert (await end_of(saying(text(BEGIN)), limits=FAST)).kind == "silent"
    assert 0.3 < time.monotonic() - started < 2


async def test_a_blocked_writer_does_not_hide_a_silent_peer() -> None:
    async with session(saying(text(BEGIN)), limits=replace(FAST, write=30), receive_buffer=4096) as (live, _):
        for _ in range(3000):
            live.send(AUDIO)
        started = time.monotonic()
        assert (await ended(live))[1].kind == "silent"
    assert time.monotonic() - started < 3


async def test_pongs_are_life_and_so_are_messages_without_pongs() -> None:
    def answering_pings(peer: Peer) -> None:
        for _ in range(4):
            peer.send(frame(PONG, peer.read_until(PING)))
        peer.send(close(1000, "alive"))

    def ignoring_pings(peer: Peer) -> None:
        for _ in range(12):
            time.sleep(0.08)
            peer.send(text(turn(0)))
        peer.send(close(1000, "alive"))

    for then in (answering_pings, ignoring_pings):
        assert (await end_of(saying(then=then), limits=FAST)).reason == "alive"


async def test_a_consumer_that_takes_its_time_is_not_the_peers_fault() -> None:
    """Pings are answered while nobody receives; a full inbox stops the reading, and that silence is ours."""
    count = 5000
    done: list[float] = []

    def script(peer: Peer) -> None:
        peer.upgrade(text(turn(0)), frame(PING, b"there?"))
        assert peer.read() == (PONG, b"there?")
        for order in range(1, count):
            peer.send(text(turn(order, "x" * 2000)))
        done.append(time.monotonic())
        peer.send(close(1000))

    async with session(script, limits=FAST, receive_buffer=4096) as (live, _):
        await asyncio.sleep(1.2)  # three times what would make a silent peer
        assert not done
        resumed = time.monotonic()
        assert len(live._channel._inbox) <= 1000 + 65_536 // 2000
        messages, end = await ended(live, 20)
    assert done[0] > resumed
    assert [message.turn_order for message in messages if isinstance(message, Turn)] == list(range(count))
    assert end.code == 1000


async def test_a_peer_that_stops_reading_is_stalled_within_the_write_limit() -> None:
    async with session(saying(text(BEGIN)), limits=replace(PATIENT, write=0.5), receive_buffer=4096) as (live, _):
        await live.receive()
        started = time.monotonic()
        while live.ready:
            live.send(AUDIO * 40)
            await asyncio.sleep(0.01)
        assert not live.failed, "it may go on yet"
        assert (await ended(live))[1].kind == "stalled"
    assert time.monotonic() - started < 3
