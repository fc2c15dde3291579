"""Real servers for tests and benchmarks, each a process of its own with its data in a directory of its own.

They can be hurt: `stop`, `kill`, `wipe` and `paused` are what happens to a server in production, and `start` brings it
back on the same port. Everything blocks, for plain scripts; from a test with an event loop go through
`asyncio.to_thread`. Nothing outlives the process that made it, even when that is killed: a watchdog holds the other end
of a pipe and, when it closes, kills the server and removes its data.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

READY_SECONDS = 60.0
STOP_SECONDS = 2.0
_given: set[int] = set()  # ports, by this process
WATCHDOG = 'read pid; read _; kill -9 "$pid" 2>/dev/null; rm -rf "$0"'


class Engine(ABC):
    """A server. Made is not started; leaving the context ends it for good and removes its data."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self.directory = Path(tempfile.mkdtemp(prefix="turnwire-engine-"))
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str]:
        """What is run; its data goes to `self.data`."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether it serves; may raise OSError while it does not."""

    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the process that runs."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Run it on what data there is; returns when it serves."""
        assert not self.running()
        self.data.mkdir(exist_ok=True)
        # Before the server, so that there is no moment in which it would be left alone.
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, self.directory], stdin=subprocess.PIPE, start_new_session=True
        )
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory,
                start_new_session=True,
            )  # fmt: skip
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(b"%d\n" % self._process.pid)
        self._watchdog.stdin.flush()
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            if not self.running() or time.monotonic() > deadline:
                raise RuntimeError(f"{self.command()[0]} does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return self.ready()
        except OSError:
            return False

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that takes its time."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: nothing is said to anybody."""
        self._end(signal.SIGKILL)

    def wipe(self) -> None:
        """Kill it and take its data; `start` begins anew."""
        self.kill()
        shutil.rmtree(self.data, ignore_errors=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP: connections stay, nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.wait()
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def installed(name: str) -> str:
    """The path of a server that came with a package of the environment."""
    path = Path(sys.executable).parent / name
    found = str(path) if path.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is missing: pip install -e '.[dev]'")
    return found


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on and nobody was given, outside the range the kernel gives to clients, so that they stay
    free over restarts.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    candidate = 10_000 + os.getpid() * 97 % (low - 11_000)
    while len(found) < count:
        candidate = candidate + 1 if candidate < low - 1 else 10_000
        if candidate in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            found.append(candidate)
    _given.update(found)
    return found
