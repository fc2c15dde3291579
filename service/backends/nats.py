"""JobQueue over NATS JetStream and Bus over core NATS, on one connection a process. FLOOR 3.

Invariants:
- Nothing here is truth. What cannot be sent now is dropped, never kept and never waited for: the reconciler rings
  again, followers read the store. A process starts, serves and works with NATS away, from the start too.
- The connection is made anew each time it is lost, by a new client, and with it every subscription, stream and
  consumer. nats-py's own reconnection is not used: it keeps publishes while away, waits for a peer that has stopped
  reading, leaves waiting pulls behind (nats.py #504) and gives up for good after some errors of the server.
- A job rings at most once per epoch: the subject names both, and the stream takes one message per subject. So ringing
  costs nothing however often it is done, and no duplicate window can swallow a ring that is needed. A delivery that
  is lost with its worker comes again `ACK_SECONDS` after its last sign of life, when the lease has just run out.

Parts of nats-py that are not public are used below in `_Connection` only; its minor version is pinned, and
`tests/contracts` runs all of this against real servers that are killed, stopped and wiped.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Self
from urllib.parse import unquote, urlsplit

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.errors import Error as NatsError
from nats.js.api import ConsumerConfig, DiscardPolicy, RetentionPolicy, StreamConfig
from nats.js.errors import BadRequestError, NotFoundError, ServiceUnavailableError

from service.core.errors import Unavailable
from service.core.job import BEHIND, Event, hint
from service.ports import Delivery, Subscription

ACK_SECONDS = 16.0  # just longer than the lease of a claim
PULL_SECONDS = 5.0
CONNECT_SECONDS = 2.0
RETRY_SECONDS = 0.5
BEAT_SECONDS = 2.0  # between two questions whether the server is there, which it has SILENT_SECONDS to answer
SILENT_SECONDS = 6.0
ASK_SECONDS = 2.0
BUFFER_BYTES = 4 << 20  # unsent, then what is published is dropped
BACKLOG = 1000  # events kept for a subscriber who does not read
DIFFERENT = 10058  # the stream is there with another configuration: its operator's, for replicas above all

log = structlog.get_logger(__name__)


class _Wire(msgspec.Struct, array_like=True, gc=False):
    """An event between processes. Fields may be added at the end: old and new run side by side during an upgrade."""

    job_id: str
    seq: int | None
    type: str
    json: bytes
    after_seq: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Wire).decode

Handler = Callable[[str, str, bytes, bytes | None], None]  # subject, reply, data, headers


class _Connection(Client):
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
            connect_timeout=int(CONNECT_SECONDS), reconnect_time_wait=RETRY_SECONDS,  # type: ignore[arg-type]
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


class NatsBroker:
    """The connection; `queue` and `bus` work on it. Enter it before use."""

    def __init__(self, url: str, *, prefix: str = "turnwire") -> None:
        """`url`: `nats://` or `tls://`, user and password or a token in it, several comma-separated. `prefix` begins
        the names of everything of this service on the server.
        """
        self._servers, self._login = _parts(url)
        self._keeper: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._why: BaseException | None = None
        self.connection: _Connection | None = None
        self.queue = NatsQueue(self, prefix)
        self.bus = NatsBus(self, prefix)

    async def __aenter__(self) -> Self:
        """Connect, or go on trying in the background when that takes longer."""
        self._keeper = asyncio.create_task(self._keep(), name="nats")
        with suppress(TimeoutError):
            await self.connected(CONNECT_SECONDS)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Let what is sent arrive, within a second, and disconnect."""
        if self.connection is not None:
            with suppress(TimeoutError):
                await self.connection.round_trip(1.0)
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    async def connected(self, seconds: float | None = None) -> _Connection:
        """The connection, once there is one. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while self.connection is None:
                await self._up.wait()
        return self.connection

    def send(self, subject: str, data: bytes = b"", reply: str = "") -> bool:
        """Publish now or never; whether it was sent."""
        return self.connection is not None and self.connection.send(subject, data, reply)

    def problem(self) -> str:
        """Why there is no connection, in words that name no credentials."""
        connection_problem = self.connection.problem if self.connection is not None else None
        return _reason(connection_problem or self._why)

    async def _keep(self) -> None:
        while True:
            connection = _Connection()
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
                self.queue.disconnected()
                await connection.bury()
            if before is not None:
                log.warning("broker lost", reason=_reason(connection.problem))
            await asyncio.sleep(RETRY_SECONDS)

    async def _live(self, connection: _Connection) -> None:
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
        self._begin(connection)
        while not connection.lost.is_set():
            await connection.round_trip(SILENT_SECONDS)
            await self.queue.keep(connection)
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await connection.lost.wait()

    def _begin(self, connection: _Connection) -> None:
        self.connection = connection
        self.bus.restore(connection)
        self.queue.restore(connection)
        self._up.set()
        log.info("broker connected")


class NatsDelivery:
    """A message of the stream, held by us until it is done or given back, or silent for `ACK_SECONDS`."""

    def __init__(self, broker: NatsBroker, job_id: str, reply: str) -> None:
        """Made by `NatsQueue.next`."""
        self.job_id = job_id
        self._broker = broker
        self._reply = reply

    async def extend(self) -> None:
        """Keep it for another `ACK_SECONDS`."""
        self._broker.send(self._reply, b"+WPI")

    async def done(self) -> None:
        """Take it out of the stream."""
        self._broker.send(self._reply, b"+ACK")

    async def give_back(self, delay_s: float = 0) -> None:
        """Have it delivered again at once, or after `delay_s`."""
        delay = b' {"delay": %d}' % int(delay_s * 1e9) if delay_s > 0 else b""
        self._broker.send(self._reply, b"-NAK" + delay)


class NatsQueue:
    """Work-queue stream `<prefix>-jobs`, consumer `workers`. Deploy it with replicas beforehand and it is left so."""

    def __init__(self, broker: NatsBroker, prefix: str) -> None:
        """Made by `NatsBroker`."""
        self._broker = broker
        self._subject = f"{prefix}.jobs"
        self._stream = f"{prefix}-jobs"
        self._inbox = ""
        self._there = False  # the stream and its consumer
        self._pulls: dict[str, asyncio.Future[NatsDelivery | str]] = {}  # by the subject its status comes on

    async def announce(self, job_id: str, epoch: int) -> None:
        """Ring; the stream refuses what it already has."""
        self._broker.send(f"{self._subject}.{job_id}.{epoch}")

    async def next(self) -> Delivery:
        """One message, asked for now. A message that comes when nobody waits any more is given back."""
        while True:
            connection = await self._broker.connected()
            got = await self._pull(connection)
            if isinstance(got, NatsDelivery):
                return got
            if got not in ("", "408"):  # nobody answers, the consumer is gone, the server stops, and the like
                self._there = False
                await self.keep(connection)
                await asyncio.sleep(RETRY_SECONDS)

    async def _pull(self, connection: _Connection) -> "NatsDelivery | str":
        """What came: a delivery, or the status that ended the request, empty when there was no answer."""
        waiting = asyncio.get_running_loop().create_future()
        reply = f"{self._inbox}.{id(waiting)}"
        self._pulls[reply] = waiting
        request = b'{"batch": 1, "expires": %d}' % int(PULL_SECONDS * 1e9)
        connection.send(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.workers", request, reply)
        try:
            async with asyncio.timeout(PULL_SECONDS + 1):
                got: NatsDelivery | str = await waiting
                return got
        except TimeoutError:
            return ""
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and isinstance(late := waiting.result(), NatsDelivery):
                await late.give_back()
            raise
        finally:
            self._pulls.pop(reply, None)

    def _arrived(self, subject: str, reply: str, _data: bytes, headers: bytes | None) -> None:
        if subject.startswith(self._inbox):
            waiting = self._pulls.get(subject)
            if waiting is not None and not waiting.done():
                waiting.set_result((headers or b"")[9:12].decode())  # NATS/1.0 408 Request Timeout
            return
        delivery = NatsDelivery(self._broker, subject.split(".")[-2], reply)
        for waiting in self._pulls.values():
            if not waiting.done():
                waiting.set_result(delivery)
                return
        self._broker.send(reply, b"-NAK")

    async def check(self) -> str:
        """How many wait and how many are worked on."""
        try:
            connection = await self._broker.connected(ASK_SECONDS)
            asked = connection.jetstream(timeout=ASK_SECONDS)
            try:
                info = await asked.consumer_info(self._stream, "workers")
            except NotFoundError:
                await self._make(connection)
                info = await asked.consumer_info(self._stream, "workers")
        except NatsError as exc:
            raise Unavailable(f"The broker cannot queue jobs: {_reason(exc)}.") from None
        except TimeoutError:
            raise Unavailable(f"The broker cannot be reached: {self._broker.problem()}.") from None
        return f"{info.num_pending} waiting, {info.num_ack_pending} taken"

    # --- the broker's -------------------------------------------------------------------------------------------------

    def restore(self, connection: _Connection) -> None:
        """A new connection: nothing is known of what is there."""
        self._there = False
        self._inbox = connection.new_inbox()
        connection.listen(f"{self._inbox}.*", self._arrived)

    def disconnected(self) -> None:
        """Whoever waits asks again on the next connection."""
        for waiting in self._pulls.values():
            if not waiting.done():
                waiting.set_result("")

    async def keep(self, connection: _Connection) -> None:
        """Make the stream and its consumer unless they are known to be there."""
        if not self._there:
            try:
                await self._make(connection)
            except NatsError as exc:
                log.warning("the stream of jobs cannot be made; trying again", reason=_reason(exc))

    async def _make(self, connection: _Connection) -> None:
        stream = StreamConfig(
            name=self._stream, subjects=[f"{self._subject}.>"], retention=RetentionPolicy.WORK_QUEUE,
            max_msgs_per_subject=1, discard=DiscardPolicy.NEW, discard_new_per_subject=True,
        )  # fmt: skip
        workers = ConsumerConfig(
            durable_name="workers", ack_wait=ACK_SECONDS, max_deliver=-1, max_ack_pending=-1, max_waiting=8192,
        )  # fmt: skip
        context = connection.jetstream(timeout=ASK_SECONDS)
        try:
            await context.add_stream(stream)
        except BadRequestError as exc:
            if exc.err_code != DIFFERENT:
                raise
        await context.add_consumer(self._stream, workers)
        self._there = True


class NatsBus:
    """One subscription of the server per topic and process, however many listen to it."""

    def __init__(self, broker: NatsBroker, prefix: str) -> None:
        """Made by `NatsBroker`."""
        self._broker = broker
        self._prefix = prefix
        self._topics: dict[str, _Topic] = {}

    async def publish(self, topic: str, event: Event) -> None:
        """Send, or drop. Of an event too large to send its followers are told that there is something to read."""
        connection = self._broker.connection
        if connection is None:
            return
        data = _encode((event.job_id, event.seq, event.type, event.json, event.after_seq))
        if len(data) > connection.max_payload:
            if event.seq is not None:
                await self.publish(topic, hint(event.job_id, BEHIND))
            return
        connection.send(f"{self._prefix}.{topic}", data)

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[Subscription]:
        """Listen until the context ends; with the broker away entered all the same, and heard from its return on."""
        subscription = NatsSubscription()
        listened = self._topics.get(topic)
        if listened is None:
            listened = self._topics[topic] = _Topic()
            if self._broker.connection is not None:
                self._listen(self._broker.connection, topic, listened)
        listened.listeners.add(subscription)
        try:
            if self._broker.connection is not None:
                with suppress(TimeoutError):
                    await self._broker.connection.round_trip(ASK_SECONDS)
            yield subscription
        finally:
            listened.listeners.discard(subscription)
            if not listened.listeners:
                del self._topics[topic]
                if self._broker.connection is not None:
                    self._broker.connection.leave(listened.sid)

    def restore(self, connection: _Connection) -> None:
        """Listen on a new connection."""
        for topic, listened in self._topics.items():
            self._listen(connection, topic, listened)

    def _listen(self, connection: _Connection, topic: str, listened: "_Topic") -> None:
        listened.sid = connection.listen(f"{self._prefix}.{topic}", listened.arrived)


class _Topic:
    def __init__(self) -> None:
        self.sid = 0
        self.listeners: set[NatsSubscription] = set()

    def arrived(self, _subject: str, _reply: str, data: bytes, _headers: bytes | None) -> None:
        try:
            wire = _decode(data)
        except msgspec.DecodeError:  # ValidationError is one
            return  # none of ours; it must not end the subscription
        event = Event(wire.job_id, wire.seq, wire.type, wire.json, wire.after_seq)
        for subscription in self.listeners:
            subscription.put(event)


class NatsSubscription:
    """A bounded buffer; the oldest goes first when it is full."""

    def __init__(self) -> None:
        """Made by `NatsBus.subscribe`."""
        self._events: deque[Event] = deque(maxlen=BACKLOG)
        self._filled = asyncio.Event()

    def put(self, event: Event) -> None:
        """Called when an event arrives."""
        self._events.append(event)
        self._filled.set()

    async def next(self) -> Event:
        """The next event."""
        while not self._events:
            self._filled.clear()
            await self._filled.wait()
        return self._events.popleft()


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


def _reason(exc: BaseException | None) -> str:
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
