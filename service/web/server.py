"""The HTTP server: a listening socket of our own, uvicorn on it, and how it all stops. FLOOR 5.

Stopping, in order: not ready any more; whatever the caller stops first (the workers hand their jobs back) while
streams still bring the last finals; the streams end; requests under way get a second; done. A second signal ends
the process at once, by the kernel. Sockets notice peers that are gone (keepalive) or do not read
(TCP_USER_TIMEOUT), and nobody holds a connection without sending a whole head in time.
"""

import asyncio
import contextlib
import gc
import signal
import socket
import uuid
from collections.abc import Awaitable, Callable, Generator, Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.runtime import Runtime
from service.web.problems import problem

KEEP_ALIVE_SECONDS = 75  # longer than the idle timeout of load balancers, or they answer 502 now and then
GRACE_SECONDS = 1
HEAD_SECONDS = 10.0
HEAD_BYTES = 64 * 1024
READ_BYTES = 512 * 1024  # what the event loop is held for by one of them is some 0.2 ms
# A peer that takes nothing is given up after 20 s; one that is silent is asked after 30 s, every 10 s, 3 times. Without
# NODELAY a response, which is two writes, takes 40 ms more; asyncio sets it only on sockets made in a certain way.
_TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_USER_TIMEOUT": 20_000,
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
}


class HttpServer:
    """One server. Listening from the start: `url` is known at once, also for port 0."""

    def __init__(self, runtime: Runtime, app: ASGIApp) -> None:
        """Raises OSError when the address cannot be had."""
        self._runtime = runtime
        self._socket = _listen(runtime.settings.host, runtime.settings.port)
        host, port, *_ = self._socket.getsockname()
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - only compared
        self.url = f"http://{f'[{here}]' if ':' in here else here}:{port}"
        self._stop = asyncio.Event()
        self._server = _Server(
            uvicorn.Config(
                app, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
                http=_Connection,  # type: ignore[arg-type]  # it is only called
                proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )  # fmt: skip

    def stop(self) -> None:
        """Begin to stop, as the first signal does."""
        self._stop.set()

    async def serve(self, on_stop: Callable[[], Awaitable[None]]) -> None:
        """Serve until `stop`; `on_stop` is awaited before the event streams end."""
        serving = asyncio.create_task(self._server.serve([self._socket]), name="http")
        stopping = asyncio.create_task(self._stop.wait(), name="http-stop")
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._runtime.draining.set()
            await on_stop()
        finally:
            stopping.cancel()
            self._runtime.feed.end()
            self._server.should_exit = True
            await serving
            await self._server.settle()

    async def serve_until_signal(self, on_stop: Callable[[], Awaitable[None]]) -> None:
        """`serve`, with SIGTERM and SIGINT to stop it; a second one kills. For a process that does nothing else."""
        _collect_seldom()
        with _signals(self.stop):
            await self.serve(on_stop)


def _collect_seldom() -> None:
    """A collection of all there is stands everything still, for 0.3 s where two thousand streams are open: what the
    process is made of is left out for good, and the rest looked through eight times as seldom.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2000, 10, 30)


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def first() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stop()

    for number in numbers:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    listening = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_OPTIONS.items():  # accepted sockets inherit them; not every system has all
        if (option := getattr(socket, name, None)) is not None:
            listening.setsockopt(socket.IPPROTO_TCP, option, value)
    return listening


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are ours."""
        yield

    async def settle(self) -> None:
        """Wait for the requests that were cut, so that what they use may be closed."""
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=GRACE_SECONDS)


class _Protocol(HttpToolsProtocol):
    """One connection, with bounds of time and size on what comes before a request's body; uvicorn has none.

    The application may cut it (`turnwire.abort`): closing waits until a client has taken what was sent, maybe for ever.
    And it may send a part of the body without a task (`turnwire.write`), where the client takes it at once.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client came."""
        super().connection_made(transport)
        self._head = 0
        self._deadline = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """It went."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something came."""
        self._head += len(data)
        super().data_received(data)
        if self._head > HEAD_BYTES and not self._deadline.cancelled():
            self.send_400_response("The head of the request is too long.")

    def on_body(self, body: bytes) -> None:
        """More of a body. uvicorn gathers it and copies that out again; a piece that comes alone is not copied."""
        gathered: bytes | bytearray = self.cycle.body
        if not isinstance(gathered, bytearray) or not gathered:
            self.cycle.body = bytearray(gathered) if gathered else b""  # type: ignore[assignment]
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed never reaches the application, and gets the same form of answer from here."""
        answer = problem("bad_request", msg, {"Connection": "close", "X-Request-ID": str(uuid.uuid4())})
        head = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%s\r\n%s" % (head, answer.body))
        self.transport.close()

    def on_message_begin(self) -> None:
        """The first bytes of a request."""
        super().on_message_begin()
        self.scope["extensions"] = {"turnwire.abort": self.transport.abort}  # type: ignore[dict-item]  # one of our own
        if self._deadline.cancelled():
            self._head = 0
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._deadline.cancel()
        super().on_headers_complete()
        self.scope["extensions"]["turnwire.write"] = partial(_write, self.cycle)  # type: ignore[assignment]


def _write(cycle: RequestResponseCycle, body: bytes) -> bool:
    """As `send` does in the middle of a body of unknown length; False where that has to wait or has no place."""
    if cycle.flow.write_paused or not cycle.chunked_encoding or cycle.response_complete or cycle.transport.is_closing():
        return False
    cycle.transport.write(b"%x\r\n%s\r\n" % (len(body), body))
    return True


class _Connection(asyncio.BufferedProtocol):
    """Reads for a `_Protocol`, in larger pieces than event loops do by themselves: an upload then costs fewer of them.

    All connections share the memory: what is read is parsed, and copied where it is kept, before the next read.
    """

    _read = memoryview(bytearray(READ_BYTES))

    def __init__(self, **given: Any) -> None:  # noqa: ANN401 - uvicorn's, handed on
        self._http = _Protocol(**given)
        self.connection_made = self._http.connection_made  # type: ignore[method-assign,assignment]
        self.connection_lost = self._http.connection_lost  # type: ignore[method-assign]
        self.pause_writing = self._http.pause_writing  # type: ignore[method-assign]
        self.resume_writing = self._http.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the interface's
        """Where to read to."""
        return self._read

    def buffer_updated(self, nbytes: int) -> None:
        """So much came."""
        self._http.data_received(self._read[:nbytes])  # type: ignore[arg-type]  # httptools takes any buffer
