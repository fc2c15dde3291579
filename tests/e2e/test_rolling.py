"""A new release takes over from the old one, process by process, while jobs run.

The new one is a copy of this one with a migration more: the database changes under the old processes, and both releases
work on it side by side.
"""

import asyncio
import shutil
import signal
from pathlib import Path

import msgspec
import pytest

from service.store import schema_of
from tests.e2e.cluster import ROOT, Cluster, Engines, check, cluster
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres
from tests.engines.s3 import S3

NEW = "9999"
MIGRATION = f"""\
import sqlalchemy as sa
from alembic import op

revision = "{NEW}"
down_revision = "%s"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("of_the_new_release", sa.Integer, nullable=False, server_default="7"))
    op.create_index("of_the_new_release", "events", ["job_id", "type"])
"""
DISTURBING = {"session.lost", "job.failed", "job.restarted", "job.warning"}


async def new_release(made: Cluster, here: Path) -> Path:
    """Where its package is."""
    shutil.copytree(ROOT / "service", here / "service", ignore=shutil.ignore_patterns("__pycache__"))
    newest = (await schema_of(made.database_url)).wanted
    (here / f"service/migrations/versions/{NEW}_new.py").write_text(MIGRATION % newest)
    return here


async def replace(made: Cluster, command: str, code: Path) -> None:
    """One by one: a new process is ready before an old one is told to go."""
    for number, old in enumerate(made.of(command)):
        await made.node(f"new-{command}-{number}", command, code=code).ready()
        old.wanted = False
        old.signal(signal.SIGTERM)
        assert await old.ended() == 0, old.log.read_text()[-3000:]


@pytest.mark.timeout(600)
async def test_a_release_after_the_other(tmp_path: Path, postgres: Postgres, nats_server: Nats, s3_server: S3) -> None:
    async with cluster(tmp_path, Engines(postgres, nats_server, s3_server), serve=2, worker=2) as made:
        over = asyncio.Event()
        uploading = asyncio.create_task(made.keep_busy(over, 4000, 8000, pause=1))
        code = await new_release(made, tmp_path / "new")
        await made.migrate(code)
        assert (await schema_of(made.database_url)).found == NEW
        await asyncio.sleep(2)
        await replace(made, "worker", code)
        await replace(made, "serve", code)
        await asyncio.sleep(1)
        over.set()
        await uploading
        for follower in made.followers:
            await follower.done(within=200)
        kept = await made.kept([follower.job_id for follower in made.followers])
        check(kept, made.followers)
        told = {msgspec.json.decode(event.json)["type"] for _, log in kept.values() for event in log}
        assert not told & DISTURBING
        assert max(job.attempt for job, _ in kept.values()) > 1, "none was handed from one release to the other"
        assert not made.restarts
        made.check_silence()
