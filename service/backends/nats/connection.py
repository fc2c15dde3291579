"""One connection to a NATS server, and keeping one. FLOOR 3.

Parts of nats-py that are not public are used here only; its minor version is pinned, and `tests/contracts` runs all of
this against real servers that are killed, stopped and wiped.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol
from urllib.parse import unquote, urlsplit

import structlog
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.errors import Error as NatsError
from nats.js.errors import ServiceUnavailableError

CONNECT_SECONDS = 2.0
RETRY_SECONDS = 0.5
BEAT_SECONDS = 2.0  # between two questions whether the server is there, which it has SILENT_SECONDS to answer
SILENT_SECONDS = 6.0
BUFFER_BYTES = 4 << 20  # unsent, then what is published is dropped

log = structlog.get_logger(__name__)

Handler = Callable[[str, str, bytes, bytes | None], None]  # subject, reply, data, headers


class Connection(Client):
    """One connection, from its handshake to its first fault; never twice.

    What we send is written by `send` at the end of the loop's turn, without a task, a future or a wait; what arrives
    goes straight to its handler. The library does the handshake, the parsing and the requests.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lost = asyncio.Event()
        self.problem: BaseException | None = None
        self._handlers: dict[int, Handler] = {}
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._awaiting: deque[asyncio.Future[None]] = deque()
        self._needs_tls = False

    async def open(self, servers: list[str], login: dict[str, str]) -> None:
        """Connect to one of `servers`, however long that takes."""
        self._needs_tls = servers[0].startswith("tls:")
        await self.connect(
            servers, error_cb=self._note, allow_reconnect=False, max_reconnect_attempts=-1,
            connect_timeout=CONNECT_SECONDS, reconnect_time_wait=RETRY_SECONDS,  # type: ignore[arg-type]
            ping_interval=1 << 30, **login,  # type: ignore[arg-type]  # any seconds; it is asked by `round_trip`
        )  # fmt: skip

    async def bury(self) -> None:
        """Leave at once, whatever the peer does; what is unsent is lost."""
        self.lost.set()
        self._pending.clear()
        self._pending_data_size = 0
        if (socket := self._socket()) is not None:
            socket.abort()
        with suppress(Exception):
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.close()

    def send(self, subject: str, data: bytes = b"", reply: str = "") -> bool:
        """Publish; False when it is dropped. Subjects are ours or the server's: never a user's text."""
        return self._write(b"PUB %s %s %d\r\n%s\r\n" % (subject.encode(), reply.encode(), len(data), data))

    def listen(self, subject: str, handler: Handler) -> int:
        """Subscribe; the number to leave with."""
        self._sid += 1
        self._handlers[self._sid] = handler
        self._write(b"SUB %s %d\r\n" % (subject.encode(), self._sid))
        return self._sid

    def leave(self, sid: int) -> None:
        """Unsubscribe."""
        if self._handlers.pop(sid, None) is not None:
            self._write(b"UNSUB %d\r\n" % sid)

    async def round_trip(self, seconds: float) -> None:
        """Until the server has read everything sent so far. Raises TimeoutError."""
        answer = asyncio.get_running_loop().create_future()
        self._awaiting.append(answer)
        self._write(b"PING\r\n", always=True)  # every one is answered, or the answers would be mistaken
        async with asyncio.timeout(seconds):
            await answer

    def _write(self, command: bytes, *, always: bool = False) -> bool:
        socket = self._socket()
        if self.lost.is_set() or socket is None:
            return False
        if socket.get_write_buffer_size() + self._unsent_bytes > BUFFER_BYTES and not always:
            return False
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush_unsent)
        self._unsent.append(command)
        self._unsent_bytes += len(command)
        return True

    def _flush_unsent(self) -> None:
        commands, self._unsent, self._unsent_bytes = self._unsent, [], 0
        socket = self._socket()
        if socket is not None and not self.lost.is_set():
            socket.write(b"".join(commands))

    def _socket(self) -> asyncio.WriteTransport | None:
        writer = self._transport._io_writer if isinstance(self._transport, TcpTransport) else None  # noqa: SLF001
        return writer.transport if writer is not None else None

    # --- what the library calls ---------------------------------------------------------------------------------------

    async def _note(self, exc: BaseException) -> None:
        self.problem = exc

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        handler = self._handlers.get(sid)
        if handler is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            handler(subject.decode(), reply.decode(), data, headers)

    async def _process_pong(self) -> None:
        if self._awaiting and not (answer := self._awaiting.popleft()).done():
            answer.set_result(None)

    async def _process_op_err(self, e: Exception) -> None:
        self.problem = e
        self.lost.set()

    async def _process_err(self, err_msg: str) -> None:
        self.problem = NatsError(err_msg)
        if "permissions violation" not in err_msg:  # after any other the server hangs up
            self.lost.set()

    def _connect_command(self) -> bytes:
        """The first that tells our credentials."""
        if self._needs_tls and not self._server_info.get("tls_required"):
            raise NatsError("tls is not offered")
        return super()._connect_command()


class Part(Protocol):
    """What lives on the connection."""

    def restore(self, connection: Connection) -> None:
        """A new connection, on which nothing is subscribed yet."""

    def disconnected(self) -> None:
        """It was lost."""

    async def keep(self, connection: Connection) -> None:
        """After `restore`, and every `BEAT_SECONDS`."""


class Keeper:
    """Keeps one connection at a time, for as long as it is open."""

    def __init__(self, url: str) -> None:
        """See `NatsBroker`."""
        self.connection: Connection | None = None
        self.parts: list[Part] = []
        self._servers, self._login = _parts(url)
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._why: BaseException | None = None

    async def open(self) -> None:
        """Connect, or go on trying in the background when that takes longer."""
        self._task = asyncio.create_task(self._keep(), name="nats")
        with suppress(TimeoutError):
            await self.connected(CONNECT_SECONDS)

    async def close(self) -> None:
        """Let what is sent arrive, within a second, and disconnect."""
        if self.connection is not None:
            with suppress(TimeoutError):
                await self.connection.round_trip(1.0)
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def connected(self, seconds: float | None = None) -> Connection:
        """The connection, once there is one and all is kept that has to be. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while self.connection is None or not self._up.is_set():
                await self._up.wait()
        return self.connection

    def send(self, subject: str, data: bytes = b"", reply: str = "") -> bool:
        """Publish now or never; whether it was sent."""
        return self.connection is not None and self.connection.send(subject, data, reply)

    def problem(self) -> str:
        """Why there is no connection, in words that name no credentials."""
        return reason((self.connection.problem if self.connection is not None else None) or self._why)

    async def _keep(self) -> None:
        while True:
            connection = Connection()
            try:
                await self._live(connection)
            except (OSError, NatsError) as exc:
                connection.problem = connection.problem or exc
            except Exception as exc:
                log.exception("the broker's connection failed")
                connection.problem = exc
            finally:
                before, self.connection, self._why = self.connection, None, connection.problem
                self._up.clear()
                for part in self.parts:
                    part.disconnected()
                await connection.bury()
            if before is not None:
                log.warning("broker lost", reason=reason(connection.problem))
            await asyncio.sleep(RETRY_SECONDS)

    async def _live(self, connection: Connection) -> None:
        """Until the connection fails."""
        opening = asyncio.create_task(connection.open(self._servers, self._login), name="nats-open")
        try:
            while not opening.done():
                await asyncio.wait([opening], timeout=RETRY_SECONDS)
                self._why = connection.problem or self._why
            opening.result()
        finally:
            opening.cancel()
        connection.problem = None
        self.connection = connection
        for part in self.parts:
            part.restore(connection)
        while not connection.lost.is_set():
            await connection.round_trip(SILENT_SECONDS)
            for part in self.parts:
                await part.keep(connection)
            if not self._up.is_set():
                self._up.set()
                log.info("broker connected")
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await connection.lost.wait()


def _parts(url: str) -> tuple[list[str], dict[str, str]]:
    """Addresses without credentials, and these as nats-py's options: what it is not given it cannot tell."""
    servers: list[str] = []
    login: dict[str, str] = {}
    for one in url.split(","):
        parts = urlsplit(one.strip() if "://" in one else f"nats://{one.strip()}")
        servers.append(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
        if parts.password is not None:
            login = {"user": unquote(parts.username or ""), "password": unquote(parts.password)}
        elif parts.username:
            login = {"token": unquote(parts.username)}
    return servers, login


def reason(exc: BaseException | None) -> str:
    """A few words; no text of the library's, which may hold an address with its credentials."""
    text = str(exc).lower()
    if "authorization" in text or "authentication" in text:
        return "it refuses the user, password or token"
    if isinstance(exc, ssl.SSLError) or "tls" in text:
        return "TLS fails"
    if isinstance(exc, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(exc, OSError) and not isinstance(exc, TimeoutError):
        return exc.strerror or "the connection was lost"
    if isinstance(exc, ServiceUnavailableError) or "no responders" in text or "not enabled" in text:
        return "JetStream is not enabled there"
    return "it does not answer"
