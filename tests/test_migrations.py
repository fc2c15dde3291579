"""The migrations: one line from nothing to today's schema, and every database on the way comes along with its jobs."""

import asyncio
import sqlite3
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import create_async_engine

from service import migrations
from service.core.errors import Unavailable
from service.core.job import Status, to_json
from service.store import migrate, open_store, schema_is_current, schema_of
from service.store import migration as module
from tests.doubles import CREATED_MS, a_job, a_turn, an_event, start
from tests.engines.postgres import Postgres, connect

FOLDER = Path(migrations.__file__).parent


def revisions() -> list[str]:
    """Oldest first."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    script = ScriptDirectory.from_config(config)
    assert len(script.get_heads()) == 1
    return [revision.revision for revision in script.walk_revisions()][::-1]


def url_of(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


def revision_of(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    finally:
        connection.close()
    return str(revision)


def test_only_the_owner_can_read_it_whatever_the_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "turnwire.db"
    (tmp_path / "turnwire.db-journal").touch(0o644)
    path.touch(0o644)  # of an earlier version
    path.chmod(0o644)

    def modes() -> dict[str, int]:
        return {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}

    async def use() -> dict[str, int]:
        await migrate(url_of(path))
        async with open_store(url_of(path)) as store:
            await store.keys.all()
            return modes()

    found = asyncio.run(use())
    assert {"turnwire.db", "turnwire.db-wal", "turnwire.db-shm"} <= set(found)
    assert set(found.values()) == {0o600}


def execute(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    connection = sqlite3.connect(path)
    try:
        with connection:
            for statement, values in statements:
                connection.execute(statement, values)
    finally:
        connection.close()


def test_they_are_one_line_named_in_order() -> None:
    assert revisions() == sorted(revisions())
    files = sorted(path.name for path in (FOLDER / "versions").glob("[0-9]*.py"))
    assert [name[:4] for name in files] == revisions()


async def test_an_empty_database_gets_the_newest_schema(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    await migrate(url_of(path))
    assert revision_of(path) == revisions()[-1]


@pytest.mark.parametrize("revision", revisions())
async def test_a_database_of_each_age_comes_along_with_its_jobs(
    tmp_path: Path, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.db"
    with monkeypatch.context() as patch:
        upgrade = "alembic.command.upgrade"
        from alembic.command import upgrade as real

        patch.setattr(upgrade, lambda config, _head: real(config, revision))
        await migrate(url_of(path))
    assert revision_of(path) == revision
    running = a_job("j1", status=Status.PROCESSING, turn_count=1)
    ended = a_job("j2", status=Status.FAILED)
    insert_job = (
        "INSERT INTO jobs (id, owner, status, created_ms, epoch, lease_until_ms, not_before_ms, strikes, event_seq, "
        "cancel_requested, doc) VALUES (?, 'me', ?, ?, 1, 0, 0, 1, 2, 0, ?)"
    )
    turn = a_turn()
    execute(
        path,
        (insert_job, ("j1", "processing", CREATED_MS, to_json(running))),
        (insert_job, ("j2", "failed", CREATED_MS, to_json(ended))),
        ("INSERT INTO turns VALUES ('j1', 0, 's1', 0, ?, ?)", (turn.end_ms, to_json(turn))),
        *[("INSERT INTO events VALUES ('j1', ?, 'job.status', ?)", (seq, an_event("j1", seq).json)) for seq in (1, 2)],
    )
    await migrate(url_of(path))
    assert revision_of(path) == revisions()[-1]
    async with open_store(url_of(path)) as store:
        record = await store.get("j1")
        assert record is not None
        assert (record.job, record.owner, record.epoch, record.event_seq) == (running, "me", 1, 2)
        assert await store.turns("j1") == [turn]
        assert [event.seq for event in await store.events_after("j1", 0)] == [1, 2]
        claim = await store.claim("j1", lease_s=60, begin=start)
        assert claim is not None, "and work on it goes on"
        assert await store.delete("j2")


async def test_a_database_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "newer.db"
    await migrate(url_of(path))
    execute(path, ("UPDATE alembic_version SET version_num = '9999'", ()))
    before = path.read_bytes()
    with pytest.raises(Unavailable, match="9999 was made by a newer Turnwire"):
        await migrate(url_of(path))
    assert revision_of(path) == "9999"
    assert path.read_bytes() == before


async def test_a_migration_that_fails_leaves_the_schema_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic.command import upgrade as real

    def half(config: Config, head: str) -> None:
        real(config, head)
        raise RuntimeError("cut off")

    path = tmp_path / "half.db"
    with monkeypatch.context() as patch:
        patch.setattr("alembic.command.upgrade", half)
        with pytest.raises(RuntimeError, match="cut off"):
            await migrate(url_of(path))
    connection = sqlite3.connect(path)
    tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
    connection.close()
    assert tables == []
    await migrate(url_of(path))
    assert revision_of(path) == revisions()[-1]


# --- beside others ---------------------------------------------------------------------------------------------------

MIGRATE = "import asyncio, sys; from service.store import migrate; asyncio.run(migrate(sys.argv[1]))"


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any table."""
    if request.param == "sqlite":
        yield url_of(tmp_path / "empty.db")
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create()
    yield server.url(name)
    server.drop(name)


async def test_many_that_migrate_at_once_all_find_it_done(empty: str) -> None:
    programs = [await asyncio.create_subprocess_exec(sys.executable, "-c", MIGRATE, empty) for _ in range(4)]
    async with asyncio.timeout(100):
        codes = await asyncio.gather(*(program.wait() for program in programs))
    assert codes == [0] * 4
    assert (await schema_of(empty)).found == revisions()[-1]


async def test_a_process_knows_a_schema_that_it_cannot_work_on(empty: str) -> None:
    assert not await schema_is_current(empty), "there is none"
    await upgrade(empty, revisions()[-2])
    assert not await schema_is_current(empty), "too old"
    await migrate(empty)
    assert await schema_is_current(empty)
    engine = create_async_engine(empty)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    await engine.dispose()
    assert await schema_is_current(empty), "a newer release has migrated, and keeps it fit for this one"


async def upgrade(url: str, revision: str) -> None:
    """To that revision and no further."""
    from alembic.command import upgrade as real

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alembic.command.upgrade", lambda config, _head: real(config, revision))
        await migrate(url)


@pytest.mark.parametrize(("before", "after"), list(pairwise(revisions())))
async def test_a_step_only_adds_what_the_release_before_need_not_know(
    postgres: Postgres, before: str, after: str
) -> None:
    """That release neither misses a column nor fails to insert for one that it leaves out."""
    name = await asyncio.to_thread(postgres.create)
    old, new = [await tables_at(postgres.url(name), revision) for revision in (before, after)]
    for table, columns in old.items():
        assert columns.items() <= new[table].items()
        for column in new[table].keys() - columns.keys():
            _, optional = new[table][column]
            assert optional, f"{table}.{column}"
    assert new != old
    await asyncio.to_thread(postgres.drop, name)


async def tables_at(url: str, revision: str) -> dict[str, dict[str, tuple[str, bool]]]:
    """Table → column → its type, and whether an insert may leave it out."""
    await upgrade(url, revision)
    engine = create_async_engine(url)

    def look(connection: Connection) -> dict[str, dict[str, tuple[str, bool]]]:
        found = inspect(connection)
        return {
            table: {
                column["name"]: (str(column["type"]), column["nullable"] or column["default"] is not None)
                for column in found.get_columns(table)
            }
            for table in found.get_table_names()
            if table != "alembic_version"
        }

    async with engine.connect() as connection:
        tables = await connection.run_sync(look)
    await engine.dispose()
    return tables


async def test_a_migration_that_meets_a_long_query_lets_everybody_else_pass_and_tries_again(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waited for its lock would have every other query of that table wait behind it."""
    name = await asyncio.to_thread(postgres.create)
    url = postgres.url(name)
    await upgrade(url, "0001")
    tried = 0
    real = module._upgrade

    async def counted(url: str) -> None:
        nonlocal tried
        tried += 1
        await real(url)

    monkeypatch.setattr(module, "_upgrade", counted)
    long = await connect(url)
    await long.execute("BEGIN; SELECT count(*) FROM jobs")
    migrating = asyncio.create_task(migrate(url))
    async with asyncio.timeout(60):
        while tried < 2:
            other = await connect(url)
            await other.execute("SELECT count(*) FROM jobs")
            await other.close()
    await long.close()
    async with asyncio.timeout(60):
        await migrating
    assert await schema_is_current(url)
    await asyncio.to_thread(postgres.drop, name)


async def test_a_server_that_is_not_there_is_said_without_the_password(postgres: Postgres) -> None:
    for url in (postgres.url().replace(str(postgres.port), "9"), postgres.url("nowhere")):
        for act in (migrate, schema_is_current):
            with pytest.raises(Unavailable) as raised:
                await act(url)
            assert "canary" not in str(raised.value)
