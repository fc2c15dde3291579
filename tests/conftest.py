"""Fixtures for every suite: a store of its own for each test, checked for leaks when the test is over."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

from service.runtime import SystemClock
from service.store import Store, migrate, open_store
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres
from tests.engines.s3 import S3

settings.register_profile("turnwire", deadline=None)  # two busy cores: how long one example takes says nothing
settings.load_profile("turnwire")


@pytest.fixture(autouse=True)
def _unconfigured_logs() -> None:
    """As in a new process: a test that ran a command in this one has configured logging for good."""
    structlog.reset_defaults()


@pytest.fixture
def clock() -> SystemClock:
    """The wall's time."""
    return SystemClock()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the schema and nothing in it, to be copied."""
    path = tmp_path_factory.mktemp("database") / "empty.db"
    asyncio.run(migrate(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture
def sqlite_database(migrated: Path, tmp_path: Path) -> str:
    """The URL of an empty database."""
    shutil.copy(migrated, tmp_path / "turnwire.db")
    return f"sqlite+aiosqlite:///{tmp_path / 'turnwire.db'}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server for all tests that do not hurt it."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def nats_server() -> Iterator[Nats]:
    """A server for all tests that do not hurt it; each takes a prefix of its own."""
    with Nats() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """A server for all tests, since it takes seconds to start; who hurts it mends it. Each takes a prefix of its own."""
    with S3() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> str:
    """The name of a database with the schema and nothing in it, to be copied."""
    name = postgres.create()
    asyncio.run(migrate(postgres.url(name)))
    return name


@pytest.fixture
def postgres_database(postgres: Postgres, migrated_postgres: str) -> Iterator[str]:
    """The URL of an empty database."""
    name = postgres.create(migrated_postgres)
    yield postgres.url(name)
    postgres.drop(name)


@pytest.fixture(params=["sqlite", "postgres"])
def each_database(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_database")
    return url


@pytest.fixture
def database(sqlite_database: str) -> str:
    """The URL of an empty database. A suite that runs on both kinds has a fixture of this name that is
    `each_database`.
    """
    return sqlite_database


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    """An open store."""
    async with open_store(database) as opened:
        yield opened
        await opened.settle()
        status = opened._readers.pool.status()
        assert "Current Checked out connections: 0" in status, "a connection was not given back"
