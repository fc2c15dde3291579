"""What a failure of the database means. FLOOR 2, part of the store.

Told by SQLSTATE (https://www.postgresql.org/docs/18/errcodes-appendix.html), by SQLite's result code
(https://www.sqlite.org/rescode.html), or by who raised it: drivers raise their own errors when connecting, and the
error of a connection that broke.
"""

import sqlite3
from enum import Enum
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout


class Failure(Enum):
    """What to do about it."""

    AWAY = "the database cannot be used now; what was asked of it may be asked again, unchanged"
    FULL = "away, until somebody makes room"
    CONTENDED = "somebody else was in the way of one of the statements"
    WRONG = "the statement is at fault, and will be for ever"


# 28: a role or password that was right when we started is being changed; 3D: so is the database, by a restore.
_CLASSES = {
    "08": Failure.AWAY, "28": Failure.AWAY, "3D": Failure.AWAY, "53": Failure.AWAY, "57": Failure.AWAY,
    "58": Failure.AWAY,
}  # fmt: skip
_STATES = {
    "53100": Failure.FULL,
    "25006": Failure.AWAY,  # a standby, or a server set to read only
    "25P03": Failure.AWAY,  # we were frozen for so long that our session was ended
    "25P04": Failure.AWAY,
    "40001": Failure.CONTENDED,
    "40P01": Failure.CONTENDED,  # a deadlock
    "55P03": Failure.CONTENDED,  # a lock not given in time
}
_SQLITE_AWAY = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip


def failure(exc: BaseException) -> Failure:
    """Judge an error that a statement, a commit or a connect raised."""
    origin: Any = exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc
    state = getattr(origin, "sqlstate", None)
    if state is not None:
        return _STATES.get(state) or _CLASSES.get(state[:2], Failure.WRONG)
    if isinstance(exc, DBAPIError) and exc.connection_invalidated:
        return Failure.AWAY
    if isinstance(exc, PoolTimeout | OSError) or "connection is closed" in str(origin):
        return Failure.AWAY
    code = getattr(origin, "sqlite_errorcode", 0) & 0xFF  # without what extends it
    if code == sqlite3.SQLITE_FULL:
        return Failure.FULL
    return Failure.AWAY if code in _SQLITE_AWAY else Failure.WRONG
