"""A node of a cluster that starts before its engines, as all do after a power cut."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.store import migrate
from tests.e2e.cluster import Engines, Node
from tests.engines import free_ports
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres
from tests.engines.s3 import S3


@pytest.fixture
def engines(s3_server: S3) -> Iterator[Engines]:
    """Of its own, with a schema, and away."""
    with Postgres() as postgres, Nats() as nats:
        asyncio.run(migrate(postgres.url()))
        postgres.stop()
        nats.stop()
        yield Engines(postgres, nats, s3_server)


async def wrong(node: Node) -> list[str] | None:
    """Which parts it says are not well; None while nobody answers."""
    try:
        async with node.client() as client:
            checks = (await client.get("/readyz")).json()["checks"]
    except httpx.TransportError:
        return None
    return [name for name, part in checks.items() if not part["ok"]]


async def test_a_node_waits_for_its_engines(tmp_path: Path, engines: Engines) -> None:
    """For the database before it serves, saying so; for the broker while it serves."""
    settings = {
        "PATH": "/usr/bin:/bin", "TURNWIRE_UPSTREAM_URL": "ws://127.0.0.1:9/",
        "TURNWIRE_DATABASE_URL": engines.postgres.url(), "TURNWIRE_BROKER_URL": engines.nats.url,
        "TURNWIRE_AUDIO_URL": engines.s3.url, **engines.s3.environment,
    }  # fmt: skip
    node = Node("worker", "worker", free_ports(1)[0], tmp_path, settings)
    node.spawn()
    try:
        async with asyncio.timeout(90):
            while not list(node.said("waiting for the database to answer")):
                await asyncio.sleep(0.05)
            assert await wrong(node) is None
            await asyncio.to_thread(engines.postgres.start)
            while (found := await wrong(node)) is None:
                await asyncio.sleep(0.05)
            assert found == ["queue"]
            await asyncio.to_thread(engines.nats.start)
            await node.ready()
            assert "canary" not in node.log.read_text()
    finally:
        node.signal(signal.SIGKILL)
        await node.ended()
