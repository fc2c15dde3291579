"""What the commands share in speaking to people. FLOOR 6.

Results go to stdout, everything else to stderr; a failure is one line.
Nothing heavy is imported here: every command, `--help` included, pays for it.
"""

import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.settings import Settings


class CommandError(Exception):
    """The command cannot go on. The text is one line for the user; `code` the exit code: 1 failed, 2 wrong use."""

    def __init__(self, message: str, code: int = 1) -> None:
        """`message` says what to do, where something can be done."""
        super().__init__(message)
        self.code = code


def database_place(settings: "Settings") -> str:
    """Where the database is, in words without its password."""
    if settings.database_url is None:
        return f"in {settings.data_dir.resolve()}"
    from sqlalchemy import make_url

    url = make_url(settings.database_url.get_secret_value())
    return f"{url.database} on {url.host or 'the local socket'}{f':{url.port}' if url.port else ''}"


def say(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def result(data: bytes) -> None:
    """The result, as it is, on stdout."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def result_line(text: str) -> None:
    """One line of a result on stdout."""
    result(printable(text).encode(sys.stdout.encoding or "utf-8", errors="replace") + b"\n")


def printable(text: str) -> str:
    """Without what would move a terminal's cursor: names and transcripts come from others. Tabs, line breaks stay."""
    return "".join(c for c in text if c in "\t\n" or unicodedata.category(c) not in ("Cc", "Cs"))


def clock(ms: float) -> str:
    """`0:07`, `1:02:03`."""
    minutes, seconds = divmod(int(ms) // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def many(turns: int) -> str:
    """`1 turn`, `2 turns`."""
    return f"{turns} turn{'' if turns == 1 else 's'}"


def size(count: float) -> str:
    """`345.2 MB`."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"
