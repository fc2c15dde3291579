"""Bringing the schema up to date, safely by many at once and beside running processes. FLOOR 2, part of the store.

One migrates while the others wait and then find nothing to do; all steps are one transaction. On PostgreSQL no lock is
waited for long: a statement that queued behind a long query for a table would stop everybody who comes after it, so it
gives up, lets them pass and tries again. What a migration may do is said in `service/migrations`.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from service.core.errors import Unavailable
from service.store.engines import open_engine
from service.store.failures import Failure, failure

PATIENCE_SECONDS = 60.0
RETRY_SECONDS = 0.25
FOLDER = Path(__file__).parent.parent / "migrations"
_ADVISORY_KEY = 0x7475726E77697265  # "turnwire"; the advisory locks of a database have numbers, not names


class Schema(NamedTuple):
    """The revision of a database (None: it is empty) and that of this version."""

    found: str | None
    wanted: str

    @property
    def usable(self) -> bool:
        """As this version knows it, or as a newer one has made it: that one keeps it fit for its predecessor."""
        return self.found is not None and self.found >= self.wanted  # a test keeps their names in order


async def migrate(url: str) -> None:
    """Bring the schema up to date. Raises `Unavailable`, also where a newer version has made it its own."""
    if make_url(url).get_backend_name() == "sqlite":
        _keep_private(Path(make_url(url).database or ""))
    elif (await schema_of(url))[0] == _newest():
        return  # without waiting for anybody
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            await _upgrade(url)
        except (SQLAlchemyError, OSError) as exc:
            sqlite_busy = "database is locked" in str(exc)
            if not (sqlite_busy or failure(exc) is Failure.CONTENDED) or time.monotonic() > deadline:
                raise _told(exc) from exc
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return


async def schema_of(url: str) -> Schema:
    """What schema a database has. Raises `Unavailable`, with the reason as its detail."""
    from alembic.migration import MigrationContext

    engine = open_engine(url, writing=False)
    try:
        async with engine.connect() as connection:
            found = await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
    except (SQLAlchemyError, OSError) as exc:
        raise _told(exc) from exc
    finally:
        await engine.dispose()
    return Schema(found, _newest())


async def schema_is_current(url: str) -> bool:
    """Whether this version can work on that database, as a process of a cluster that does not migrate must know.

    So it can on a newer schema, in an upgrade that goes through the processes one by one. Raises `Unavailable`.
    """
    return (await schema_of(url)).usable


def _newest() -> str:
    from alembic.script import ScriptDirectory

    head = ScriptDirectory(str(FOLDER)).get_current_head()
    assert head is not None
    return head


async def _upgrade(url: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    engine = open_engine(url, writing=True, command_seconds=None)  # making an index takes as long as it takes

    def upgrade(sync_connection: Connection) -> None:
        found = MigrationContext.configure(sync_connection).get_current_revision()
        if found is not None and found > _newest():
            newer = f"Its schema {found} was made by a newer Turnwire, this one knows {_newest()}"
            raise Unavailable(f"{newer}: migrate with that one, or restore a backup.")
        config.attributes["connection"] = sync_connection
        command.upgrade(config, "head")

    try:
        async with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                await connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                await connection.execute(text("SET LOCAL lock_timeout = '2s'"))
                await connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADVISORY_KEY})"))
            await connection.run_sync(upgrade)
    finally:
        await engine.dispose()


def _told(exc: Exception) -> Exception:
    """As one of our errors, where it says that the database cannot be used."""
    if failure(exc) is Failure.WRONG:
        return exc
    return Unavailable(f"The database cannot be used: {getattr(exc, 'orig', None) or exc}")


def _keep_private(path: Path) -> None:
    """Whatever the rights of the directory; SQLite gives its other files those of the database."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    for file in path.parent.glob(f"{path.name}*"):
        file.chmod(0o600)
