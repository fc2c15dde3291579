"""An event stream that is open while the database and the bus go away and come back: it stays, and misses nothing."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from service.core.job import Status
from service.intake import new_id
from service.store import migrate
from service.web import events as web_events
from tests.doubles import add_job, append, until
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres
from tests.web.served import Served, parse, refused, serving

PATIENCE = 60.0
PING = ": ping\n\n"


@pytest.fixture
def engines() -> Iterator[tuple[Postgres, Nats]]:
    """Servers to be hurt."""
    with Postgres() as postgres, Nats() as nats:
        yield postgres, nats


@pytest.fixture
async def cluster(
    engines: tuple[Postgres, Nats], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    """A node of a cluster, on a clock that runs ten times as fast; no audio is touched."""
    postgres, nats = engines
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(web_events, "PING_SECONDS", 0.1)
    await migrate(postgres.url())
    async with serving(
        tmp_path, speed=10, database_url=postgres.url(), broker_url=nats.url, audio_url="s3://nowhere"
    ) as served:
        yield served


class Stream:
    """What one client has been sent."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.text = ""

    async def follow(self, served: Served, job_id: str) -> None:
        """To the end."""
        async with served.http.stream("GET", f"/jobs/{job_id}/events") as answer:
            async for text in answer.aiter_text():
                self.text += text

    async def has(self, newest: int) -> None:
        """Wait for that event."""
        await until(lambda: f"\nid: {newest}\n" in self.text, PATIENCE)

    async def beats(self, times: int) -> None:
        """Wait for signs of life."""
        before = self.text.count(PING)
        await until(lambda: self.text.count(PING) >= before + times, PATIENCE)


@asynccontextmanager
async def following(served: Served, job_id: str) -> AsyncIterator[Stream]:
    """A client in the background; at the end it must have been sent everything once, in one response."""
    stream = Stream()
    async with AsyncExitStack() as stack:
        task = asyncio.create_task(stream.follow(served, job_id))
        stack.callback(task.cancel)
        yield stream
        async with asyncio.timeout(PATIENCE):
            await task
    log = [event.seq for event in await served.runtime.store.events_after(job_id, 0, 1000)]
    assert [event["id"] for event in parse(stream.text.replace(PING, ""))] == log
    assert stream.text.count("retry:") == 1


async def test_a_stream_outlives_the_database_and_the_bus(cluster: Served, engines: tuple[Postgres, Nats]) -> None:
    postgres, nats = engines
    store, bus = cluster.runtime.store, cluster.runtime.bus
    job_id = new_id(cluster.runtime.clock.utc_ms())
    path = f"/jobs/{job_id}/events"

    async def happen(count: int = 1, status: Status | None = None) -> None:
        kind = "job.completed" if status else "job.warning"
        for event in await append(store, job_id, *[(kind, {})] * count, status=status):
            bus.publish(f"events.{job_id}", event)

    await add_job(store, job_id)
    async with following(cluster, job_id) as stream:
        await stream.has(1)
        await happen(2)
        await stream.has(3)
        for act in (postgres.stop, postgres.kill):
            await asyncio.to_thread(act)
            await stream.beats(15)  # longer than it takes to miss the database
            refused(await cluster.http.get(path), "unavailable")
            await asyncio.to_thread(postgres.start)
            await append(store, job_id, ("job.warning", {}))  # nobody tells of it
            await stream.beats(5)
            await happen()
        await stream.has(7)
        await asyncio.to_thread(nats.wipe)
        await happen(3)
        await stream.has(10)
        await asyncio.to_thread(postgres.stop)
        await stream.beats(15)
        await asyncio.to_thread(postgres.start)
        await happen(120)  # more than a page
        await stream.has(130)
        await asyncio.to_thread(nats.start)
        await happen(1, Status.COMPLETED)


async def test_a_client_that_comes_during_the_outage_is_told_to_come_again_and_then_gets_all(
    cluster: Served, engines: tuple[Postgres, Nats]
) -> None:
    job_id = new_id(cluster.runtime.clock.utc_ms())
    store = cluster.runtime.store
    await add_job(store, job_id)
    await append(store, job_id, *[("job.warning", {})] * 250)
    await asyncio.to_thread(engines[0].stop)
    answer: httpx.Response = await cluster.http.get(f"/jobs/{job_id}/events")
    refused(answer, "unavailable")
    await asyncio.to_thread(engines[0].start)
    async with following(cluster, job_id) as stream:
        await stream.has(251)
        await append(store, job_id, ("job.completed", {}), status=Status.COMPLETED)
