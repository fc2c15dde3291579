"""A websocket that cannot hang, lose a close code or grow unbounded: the session for httpx-ws's handshake. FLOOR 3.

httpx-ws connects, wsproto minds the close. What httpx-ws's own session does otherwise is pinned by tests in
tests/contracts/test_httpx_ws.py: receiving (frames are parsed as bytes arrive and wait for the consumer here, so pings
are answered whatever it does), sending (masked in C and written at once, never awaited), closing (bounded), keepalive
(a timer; any frame is life) and what is held meanwhile. Invariants: the first `SessionEnd` set is the one reported; a
failed write does not stop the reading, which may still find the reason; nothing is sent after `failed` but the Close
frame.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import httpcore
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import CloseConnection

from service.backends.frames import BINARY, CLOSE, PING, PONG, TEXT, Parser, Unreadable, encode
from service.backends.stream import Stream
from service.core.protocol import EndKind, SessionEnd
from service.flag import Flag

_CLOSE_CODES: dict[EndKind, int] = {"oversized": 1009, "invalid": 1002, "malformed": 1008}


@dataclass(frozen=True, slots=True)
class Limits:
    """Every bound of an upstream connection; seconds unless named otherwise."""

    connect: float = 5
    handshake: float = 10
    write: float = 5
    close: float = 2
    ping: float = 10
    pong: float = 10
    message_bytes: int = 1 << 20
    inbox_messages: int = 1000
    inbox_bytes: int = 1 << 20
    control_frames: int = 100  # a second
    malformed_messages: int = 10
    refusal_bytes: int = 8192


class Channel:
    """One open websocket: `push` sends, `pull` takes what came in, `end` says why it is over."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, *, limits: Limits, **_: object) -> None:
        """As httpx-ws calls it, and our limits."""
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._wire: Stream = stream.get_extra_info("stream")
        self.end: SessionEnd | None = None
        self.failed = False
        self.stuck = False  # more was pushed than the peer takes
        self._hung_up = Flag()  # the peer's Close was read, or nothing it says can be
        self._inbox: deque[bytes | str] = deque()
        self._inbox_bytes = 0
        self._paused = False
        self._arrival: asyncio.Future[None] | None = None
        self._parser = Parser(self._take, limits.message_bytes)
        self._heard = self._controls_since = self._loop.time()
        self._controls = 0
        self._pinged = 0.0  # what `_heard` was at the last ping
        self._life = self._loop.call_later(limits.ping, self._check_life)
        self._patience: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        """The handshake's context. The session outlasts it, so that nothing of it lasts as long as the session."""
        return self

    async def __aexit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
        """Close what could not be started."""
        if exc is not None:
            await self.close()

    @cached_property
    def _closing(self) -> Connection:
        """Minds the close, and is not made before it."""
        return Connection(ConnectionType.CLIENT)

    async def start(self) -> None:
        """Take the stream over, with what came in one packet with the upgrade."""
        try:
            while data := await self._stream.read(65_536, timeout=0):
                self.data(data)
        except (httpcore.ReadTimeout, httpcore.ReadError):
            pass  # an end is told by `listen`
        self._wire.listen(self)

    # --- out ---------------------------------------------------------------------------------------------------------

    def push(self, message: bytes | str) -> None:
        """Send one message; dropped once `failed`."""
        if not self.failed:
            self._wire.send(encode(TEXT, message.encode()) if isinstance(message, str) else encode(BINARY, message))

    def blocked(self, blocked: bool) -> None:
        """The stream's high-water mark was passed, or is no longer."""
        self.stuck = blocked
        if self._patience is not None:
            self._patience.cancel()
        if blocked:
            reason = f"nothing could be sent for {self._limits.write:g} s"
            self._patience = self._loop.call_later(self._limits.write, self.fail, "stalled", reason)

    def expect_end(self, otherwise: SessionEnd) -> None:
        """Send no more; unless the peer's own words arrive within the close limit, the end is `otherwise`."""
        self.failed = True
        self._loop.call_later(self._limits.close, self._finish, otherwise)

    # --- in ----------------------------------------------------------------------------------------------------------

    async def pull(self) -> bytes | str | None:
        """The next message in order of arrival; None when all were taken and the connection is over."""
        while not self._inbox:
            if self.end is not None:
                return None
            self._arrival = self._loop.create_future()
            await self._arrival
        message = self._inbox.popleft()
        self._inbox_bytes -= len(message)
        if self._paused and len(self._inbox) * 2 <= self._limits.inbox_messages:
            self._pause(self._inbox_bytes * 2 > self._limits.inbox_bytes)
        return message

    def _put(self, message: bytes | str) -> None:
        if self.end is not None:
            return
        self._inbox.append(message)
        self._inbox_bytes += len(message)
        if len(self._inbox) >= self._limits.inbox_messages or self._inbox_bytes >= self._limits.inbox_bytes:
            self._pause(True)
        self._wake()

    def _pause(self, paused: bool) -> None:
        if paused is not self._paused:
            self._paused = paused
            self._heard = self._loop.time()  # while nothing was read, the silence was ours
            self._wire.pause(paused)

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def data(self, data: bytes) -> None:
        """Bytes have arrived."""
        try:
            if self._parser.feed(data):
                self._heard = self._loop.time()
        except Unreadable as exc:
            self._unreadable(exc)

    def _unreadable(self, exc: Unreadable) -> None:
        self.fail(exc.kind, exc.reason)
        self._hung_up.set()

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == TEXT:
            try:
                self._put(payload.decode())
            except UnicodeDecodeError:
                raise Unreadable("invalid", "text that is not UTF-8") from None
        elif opcode == BINARY:
            self._put(payload)
        elif opcode == CLOSE:
            self._closed(payload)
        else:
            self._count_control()
            if opcode == PING and not self.failed:
                self._wire.send(encode(PONG, payload))

    def _count_control(self) -> None:
        now = self._loop.time()
        if now - self._controls_since >= 1:
            self._controls, self._controls_since = 0, now
        self._controls += 1
        if self._controls > self._limits.control_frames:
            raise Unreadable("invalid", f"more than {self._limits.control_frames} control frames in a second")

    def _closed(self, payload: bytes) -> None:
        self._closing.receive_data(bytes((0x80 | CLOSE, len(payload))) + payload)
        (event,) = self._closing.events()
        assert isinstance(event, CloseConnection)
        if self._closing.state in (ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING):
            raise Unreadable("invalid", f"a Close frame that is none: {event.reason}")  # wsproto's verdict
        self._finish(SessionEnd(kind="closed", code=int(event.code), reason=event.reason or ""))
        if self._closing.state is ConnectionState.REMOTE_CLOSING:
            self._wire.send(self._closing.send(event.response()))
        self._hung_up.set()

    # --- the end -----------------------------------------------------------------------------------------------------

    def ended(self, error: Exception | None) -> None:
        """The stream is over."""
        how = "ended without a close frame" if error is None else "was reset"
        self.fail("lost", f"the connection {how}")
        self._hung_up.set()

    def fail(self, kind: EndKind, reason: str) -> None:
        """Our own verdict: the connection is of no more use."""
        self._finish(SessionEnd(kind=kind, reason=reason))

    def _finish(self, end: SessionEnd) -> None:
        if self.end is None:
            self.end = end
        self.failed = True
        self._life.cancel()
        self.blocked(False)
        self._pause(False)  # whatever else comes is thrown away
        self._wake()

    def _check_life(self) -> None:
        limits, now = self._limits, self._loop.time()
        if self._paused:
            self._heard = now
        idle = now - self._heard
        if idle >= limits.ping + limits.pong:
            self.fail("silent", f"no frame for {limits.ping + limits.pong:g} s")
            return
        due = limits.ping
        if idle >= limits.ping:
            due += limits.pong
            if self._pinged != self._heard and not self.failed:
                self._pinged = self._heard
                self._wire.send(encode(PING, b""))
        self._life = self._loop.call_at(self._heard + due, self._check_life)

    async def close(self) -> None:
        """Say goodbye and wait for the answer, bounded. Whoever has a channel calls it in the end."""
        self.fail("lost", "closed by this side")
        assert self.end is not None
        try:
            async with asyncio.timeout(0 if self.end.kind in ("silent", "stalled") else self._limits.close):
                if self._closing.state is ConnectionState.OPEN:
                    goodbye = CloseConnection(_CLOSE_CODES.get(self.end.kind, 1000))
                    self._wire.send(self._closing.send(goodbye))
                await self._hung_up.wait()
                await self._wire.finish()
        except TimeoutError:
            pass
        finally:
            await self._stream.aclose()
