"""The sandbox: a local endpoint that speaks AssemblyAI's Streaming v3, so that everything runs, and is tested, without
an account.

It stands on the `websockets` library and writes its own messages: the service's client uses neither, so the two cannot
share a misunderstanding. Upgrades are accepted at once and failures told in-band, as the service does; HTTP refusals
come only from a fault plan.
"""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from weakref import WeakKeyDictionary

from websockets import http11
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from service.sandbox.clock import Clock
from service.sandbox.faults import FaultPlan, HangUpgrade, Refuse, Step, WrongAccept, load_faults
from service.sandbox.gate import WEBSOCKET_PATH, Gate, respond
from service.sandbox.mischief import Mischief
from service.sandbox.recogniser import NumberedWords, RecogniserFactory, default_recogniser
from service.sandbox.records import Credential, SessionRecord
from service.sandbox.rules import MAX_MESSAGE_BYTES
from service.sandbox.script import load_script
from service.sandbox.session import Session
from service.sandbox.speaker import House

KEPT_HEADERS = ("User-Agent", "AssemblyAI-Version", "Origin", "Sec-WebSocket-Extensions")
SECRET_PARAMETERS = frozenset({"token", "webhook_auth_header_value"})
CLOSE_TIMEOUT_S = 2.0
OPEN_TIMEOUT_S = 180.0  # above the longest planned hang

# A token of 2.5 kB beside a prompt of 1750 percent-encoded characters makes a request line beyond the library's 8 kB.
http11.MAX_LINE_LENGTH = max(http11.MAX_LINE_LENGTH, 64 * 1024)


@dataclass
class Sandbox:
    """A running sandbox. `faults` and `keep_audio` may be changed while it runs; later sessions heed them."""

    clock: Clock
    gate: Gate
    faults: FaultPlan
    keep_audio: bool
    max_records: int
    sessions: list[SessionRecord] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = 0
    knocks: int = 0
    _visits: "WeakKeyDictionary[ServerConnection, tuple[SessionRecord, list[Step]]]" = field(
        default_factory=WeakKeyDictionary
    )
    _running: set[Session] = field(default_factory=set)
    _tasks: "set[asyncio.Task[Any]]" = field(default_factory=set)

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 (told apart, not bound)
        return f"ws://{f'[{host}]' if ':' in host else host}:{self.port}{WEBSOCKET_PATH}"

    @property
    def active(self) -> int:
        """Sessions open now."""
        return len(self._running)

    async def knock(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer the HTTP request: with None the upgrade is accepted."""
        if (answer := self.gate.answer(request)) is not None:
            return answer
        self.knocks += 1
        record = _record(self.knocks, request)
        steps = self.faults.steps_for(self.knocks)
        self._visits[connection] = (record, steps)
        self._keep(record)
        mischief = Mischief(steps)
        if (hang := mischief.find(HangUpgrade)) is not None:
            with self._abandonable():
                await self.clock.sleep(hang.seconds)
        if (refuse := mischief.find(Refuse)) is None:
            return None
        record.refused_status, record.ended_by, record.closed_at = refuse.status, "refused", time.monotonic()
        extra = {"Retry-After": refuse.retry_after, "Location": refuse.location}
        return respond(
            refuse.status, refuse.body, {name: str(value) for name, value in extra.items() if value is not None}
        )

    def spoil(self, connection: ServerConnection, _: Request, response: Response) -> None:
        """Give a wrong proof of the handshake where the plan says so."""
        visit = self._visits.get(connection)
        if visit is not None and response.status_code == 101 and Mischief(visit[1]).find(WrongAccept) is not None:
            del response.headers["Sec-WebSocket-Accept"]
            response.headers["Sec-WebSocket-Accept"] = "bm90IHRoZSByaWdodCBvbmU="

    async def talk(self, connection: ServerConnection, house: House) -> None:
        """Hold one session."""
        record, steps = self._visits[connection]
        request = connection.request
        assert request is not None
        query = urlsplit(request.path).query
        cap, refusal = self.gate.admit(request.headers.get("Authorization"), dict(parse_qsl(query)).get("token"))
        session = Session(connection, house, record, steps, keep_audio=self.keep_audio)
        self._running.add(session)
        try:
            with self._abandonable():
                await session.run(query, cap, refusal)
        finally:
            self._running.discard(session)
            session.over.set()

    async def settled(self) -> None:
        """Wait until no session is open, so that records are complete: a client sees the end before the sandbox."""
        while self._running:
            await next(iter(self._running)).over.wait()

    def abandon(self) -> None:
        """Cut what is still there: a planned silence would otherwise outlast the sandbox."""
        for connection in list(self._visits):
            connection.transport.abort()
        for task in self._tasks:
            task.cancel()

    @contextmanager
    def _abandonable(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    def _keep(self, record: SessionRecord) -> None:
        self.sessions.append(record)
        del self.sessions[: max(0, len(self.sessions) - self.max_records)]


def _library_logger() -> logging.Logger:
    """The library's logger, without a traceback for every client that leaves during the handshake.

    By its name it is the library's in the log too, so that its DEBUG, frames and headers, is told at no level.
    """
    logger = logging.getLogger("websockets.sandbox")
    logger.filters = [lambda record: "handshake failed" not in str(record.msg)]
    return logger


def _record(ordinal: int, request: Request) -> SessionRecord:
    url = urlsplit(request.path)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    credential: Credential = (
        "header" if request.headers.get("Authorization") else "query" if query.get("token") else "none"
    )
    return SessionRecord(
        ordinal=ordinal,
        path=url.path,
        query={name: value for name, value in query.items() if name not in SECRET_PARAMETERS},
        headers={name: request.headers[name] for name in KEPT_HEADERS if name in request.headers},
        credential=credential,
    )


@asynccontextmanager
async def run_sandbox(
    *,
    recogniser: RecogniserFactory,
    host: str = "127.0.0.1",
    port: int = 0,
    faults: FaultPlan | None = None,
    speed: float = 1.0,
    keys: Collection[str] | None = None,
    keyless: bool = False,
    keep_audio: bool = False,
    max_records: int = 1000,
    double_finals: bool = True,
) -> AsyncIterator[Sandbox]:
    """Serve on `host`:`port` (0: any free one) while the context lasts; its end closes open sessions with 1001.
    `keyless`: sessions without a key are let in, too.
    """
    clock = Clock(speed)
    sandbox = Sandbox(
        clock, Gate(clock, keys, keyless=keyless), faults or FaultPlan(), keep_audio, max_records, host=host
    )
    house = House(clock, recogniser, double_finals)
    server = await serve(
        lambda connection: sandbox.talk(connection, house),
        host,
        port,
        process_request=sandbox.knock,
        process_response=sandbox.spoil,
        compression=None,  # audio does not deflate, and two hundred sessions would pay for trying
        server_header=None,
        max_size=MAX_MESSAGE_BYTES,
        open_timeout=OPEN_TIMEOUT_S,
        close_timeout=CLOSE_TIMEOUT_S,
        ping_interval=None,  # not known of the service; planned pings are a fault
        logger=_library_logger(),
    )
    sandbox.port = server.sockets[0].getsockname()[1]
    try:
        yield sandbox
    finally:
        server.close(code=1001)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await server.wait_closed()
        sandbox.abandon()
        await server.wait_closed()


async def serve_forever(
    host: str, port: int, script_path: Path | None, faults_path: Path | None, speed: float, *, keyless: bool = False
) -> None:
    """`turnwire sandbox`: until SIGTERM or SIGINT; raises InvalidFile for a bad file and OSError for a taken port."""
    recogniser = load_script(script_path) if script_path is not None else default_recogniser()
    faults = load_faults(faults_path) if faults_path is not None else None
    hears = (
        f"the script {script_path}"
        if script_path is not None
        else "numbered words"
        if recogniser is NumberedWords
        else "real speech, offline"
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C still raises KeyboardInterrupt
            loop.add_signal_handler(number, stop.set)
    # No records: what runs for weeks must not grow.
    async with run_sandbox(
        recogniser=recogniser, host=host, port=port, faults=faults, speed=speed, keyless=keyless, max_records=0
    ) as sandbox:
        planned = f", faults from {faults_path}" if faults_path is not None else ""
        sys.stderr.write(
            f"sandbox: {sandbox.url} hears {hears}{planned}; "
            f"to use it: TURNWIRE_UPSTREAM_URL={sandbox.url} turnwire serve\n"
        )
        sys.stderr.flush()
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)  # a second signal ends it at once
