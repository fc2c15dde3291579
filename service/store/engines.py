"""Connections: to SQLite one that writes and some that read, to PostgreSQL a pool for each. FLOOR 2, part of the store.

Nothing here waits for long: a server that is unreachable, frozen or cut off is noticed in seconds, and a process that
is frozen in the middle of a transaction loses its locks to the others.
"""

import asyncio
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

T = TypeVar("T")

# With these a process holds at most five connections; PostgreSQL gives a hundred where nobody says otherwise.
READERS = 4
CONNECT_SECONDS = 3.0
SILENCE_SECONDS = 5.0  # without an acknowledgement of what was sent: the other side is gone
BEGIN = "BEGIN IMMEDIATE"
BUSY_MS = 200  # for another process that writes
YIELD_SECONDS = 0.001  # a group of writes must not hold up the pacer
COMMAND_SECONDS = 5.0  # of one statement: the other side is frozen
# For the case that this process is the one that is frozen or cut off; told to the server, which then ends the session.
SESSION = {
    "application_name": "turnwire",
    "lock_timeout": "500ms",
    "idle_in_transaction_session_timeout": "5s",
    "tcp_user_timeout": "5s",
}


def open_engine(url: str, *, writing: bool, command_seconds: float | None = COMMAND_SECONDS) -> AsyncEngine:
    """For one writer, or for readers. Connects when it is first used."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed, writing=writing)
    return _postgresql(parsed, writing, command_seconds)


def open_writer(url: str) -> "AsyncEngine | SqliteWriter":
    """As `open_engine` for one writer, but to SQLite without a thread's answer per statement."""
    if make_url(url).get_backend_name() == "sqlite":
        return SqliteWriter(url)
    return open_engine(url, writing=True)


def _postgresql(url: URL, writing: bool, command_seconds: float | None) -> AsyncEngine:
    options: dict[str, Any] = {"timeout": CONNECT_SECONDS, "command_timeout": command_seconds}
    query = dict(url.query)
    if "sslmode" in query:  # as every other client of PostgreSQL calls it
        query["ssl"] = query.pop("sslmode")
    if {query.pop(name, "") for name in ("statement_cache_size", "prepared_statement_cache_size")} != {""}:
        # A pooler that hands each transaction to another server connection knows no statement prepared before, no name
        # twice, and no parameters of a session.
        options |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
        options["prepared_statement_name_func"] = lambda: f"turnwire_{uuid4().hex}"
    else:
        options["server_settings"] = SESSION
    # No ping before each use: who finds a connection dead tries again on a new one (`Reader._read`, `Writer`).
    engine = create_async_engine(
        url.set(query=query),
        pool_size=1 if writing else READERS,
        max_overflow=0,
        pool_timeout=CONNECT_SECONDS,
        connect_args=options,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver's connection
        transport = connection.driver_connection._transport  # noqa: SLF001 - asyncpg has no setting for this
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (
                ("TCP_KEEPIDLE", 5),
                ("TCP_KEEPINTVL", 2),
                ("TCP_KEEPCNT", 3),
                ("TCP_USER_TIMEOUT", int(SILENCE_SECONDS * 1000)),
            ):
                if hasattr(socket, name):  # Linux has them all
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    return engine


def _sqlite(url: URL, *, writing: bool) -> AsyncEngine:
    if writing:
        engine = create_async_engine(url, poolclass=StaticPool)
    else:
        engine = create_async_engine(url, pool_size=READERS, max_overflow=0)
    _prepare(engine.sync_engine, f"busy_timeout={BUSY_MS if writing else 5000}", f"query_only={int(not writing)}")

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:  # noqa: ANN401
        connection.exec_driver_sql(BEGIN if writing else "BEGIN")

    return engine


def _prepare(engine: Engine, *pragmas: str) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver's connection
        connection.isolation_level = None  # transactions are begun by us, not by the driver
        cursor = connection.cursor()
        # FULL: a commit survives power loss. A cache of 512 KB is as fast as the usual four times as much: behind it is
        # the kernel's.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-512", *pragmas):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


class SqliteWriter:
    """What the writer uses of an `AsyncEngine`, on one connection.

    Committing (which waits for the disk), looking and deleting (which may go over many rows) happen in a thread of its
    own, and so does waiting for another process that writes. To begin takes microseconds, and so does an insert or an
    update by key; going to a thread and back takes several times that: they happen at once.
    """

    def __init__(self, url: str) -> None:
        """Connects when it is first used."""
        sync = make_url(url).set(drivername="sqlite")
        self._engine = create_engine(sync, poolclass=StaticPool, connect_args={"check_same_thread": False})
        _prepare(self._engine, "busy_timeout=0")
        self._thread = ThreadPoolExecutor(1, "sqlite-writer")
        self._connection: Connection | None = None  # what SQLAlchemy runs goes through it; transactions do not

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A transaction has begun; what is not committed is rolled back."""
        if self._connection is None:
            self._connection = await self.away(self._engine.connect)
        driver: Any = self._connection.connection.driver_connection
        try:
            driver.execute(BEGIN)
        except sqlite3.OperationalError:
            await self.away(_wait_and_begin, driver)
        try:
            yield cast("AsyncConnection", _SqliteConnection(self, self._connection, driver))
        finally:
            if driver.in_transaction:
                await self.away(driver.rollback)

    async def away(self, call: Callable[..., T], *arguments: object) -> T:
        """Call in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    async def dispose(self) -> None:
        """Close, after whatever is still running."""
        await self.away(self._engine.dispose)
        self._thread.shutdown()


def _wait_and_begin(driver: sqlite3.Connection) -> None:
    """Not for long: the writer tries again, and must notice uploads giving up."""
    driver.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    try:
        driver.execute(BEGIN)
    finally:
        driver.execute("PRAGMA busy_timeout=0")


class _SqliteConnection:
    """What operations use of an `AsyncConnection`."""

    def __init__(self, writer: SqliteWriter, connection: Connection, driver: sqlite3.Connection) -> None:
        self._writer = writer
        self._connection = connection
        self._driver = driver
        self._yielded = time.perf_counter()
        self.dialect = connection.dialect

    async def execute(self, statement: Any, parameters: Any = None) -> Any:  # noqa: ANN401 - as SQLAlchemy's
        if not statement.is_dml or statement.is_delete:
            return await self._writer.away(self._connection.execute, statement, parameters)
        result = self._connection.execute(statement, parameters)
        await self._let_others_run()
        return result

    async def exec_driver_sql(self, statement: str, parameters: Any) -> sqlite3.Cursor:  # noqa: ANN401 - as SQLAlchemy's
        run = self._driver.executemany if isinstance(parameters, list) else self._driver.execute
        cursor = run(statement, parameters)
        await self._let_others_run()
        return cursor

    async def _let_others_run(self) -> None:
        if time.perf_counter() - self._yielded > YIELD_SECONDS:
            await asyncio.sleep(0)
            self._yielded = time.perf_counter()

    async def commit(self) -> None:
        await self._writer.away(self._driver.commit)

    async def invalidate(self) -> None:
        """Nothing here has a time limit."""
