"""`python -m tests.e2e.failpoints ARM serve …`: the command line, in a process that kills itself where it is told to.

Nothing happens until the file ARM appears. It names a point and a number: `commit.before 7` is SIGKILL in front of the
seventh commit from then on. Production code knows nothing of it: what is killed at is wrapped here.
"""

import os
import signal
import sys
from collections.abc import Callable
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

from service.backends import local
from service.backends.memory import MemoryBus, MemoryQueue
from service.store.engines import _SqliteConnection
from service.store.writer import Writer

POINTS = (
    "put.before", "fsync.before", "fsync.after", "rename.before", "rename.after", "put.after", "commit.before",
    "commit.after", "publish.before", "publish.after", "announce.before", "announce.after",
)  # fmt: skip


class Failpoints:
    """Counts visits from the moment it is armed."""

    def __init__(self, arm: Path) -> None:
        """`arm`: the file that arms it."""
        self._arm = arm
        self._name = ""
        self._left = 0

    def at(self, name: str) -> None:
        """A point is passed."""
        if not self._name:
            try:
                self._name, count = self._arm.read_text().split()
            except (FileNotFoundError, ValueError):  # not there, or being written
                return
            self._left = int(count)
        if name == self._name:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function, plain or of coroutines, with a point on either side."""

        def plain(*args: Any, **more: Any) -> Any:
            self.at(f"{name}.before")
            result = function(*args, **more)
            self.at(f"{name}.after")
            return result

        async def awaited(*args: Any, **more: Any) -> Any:
            self.at(f"{name}.before")
            result = await function(*args, **more)
            self.at(f"{name}.after")
            return result

        return awaited if iscoroutinefunction(function) else plain


def install(points: Failpoints) -> None:
    """Wrap what makes things durable or visible."""
    patches: list[tuple[Any, str, str]] = [
        (local.LocalBlobs, "put", "put"),
        (local.LocalBlobs, "_commit", "rename"),
        (os, "fsync", "fsync"),
        (MemoryBus, "publish", "publish"),
        (MemoryQueue, "announce", "announce"),
    ]
    for owner, attribute, name in patches:
        setattr(owner, attribute, points.around(name, getattr(owner, attribute)))
    commit, transact = _SqliteConnection.commit, Writer._transact

    async def committing(self: _SqliteConnection) -> None:
        points.at("commit.before")
        await commit(self)

    async def committed(self: Writer, group: Any) -> None:
        await transact(self, group)
        points.at("commit.after")

    _SqliteConnection.commit = committing  # type: ignore[method-assign]
    Writer._transact = committed  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Failpoints(Path(sys.argv.pop(1))))
    from service.cli import main

    main()
