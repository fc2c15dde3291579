"""A worker that the network cuts off from one engine, while the engine and everybody else are well.

Without PostgreSQL it may not go on: it stops before its lease is over, and what it still has to say is refused when it
comes. Without NATS it goes on, and a cancel reaches it all the same. Without S3 it waits.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from service.sandbox.records import SessionRecord
from tests import kit
from tests.e2e.cluster import Cluster, Engines, Node, Wanderer, check, cluster
from tests.e2e.process import Follower
from tests.e2e.wire import Wire, wire
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres
from tests.engines.s3 import S3
from tests.marked import marked_wav, words

JOB_MS = 18_000  # what is cut off for all of it is silent for longer than a lease and a delivery last
ALL = {"postgres", "nats", "s3"}


@pytest.fixture
def engines(postgres: Postgres, nats_server: Nats, s3_server: S3) -> Engines:
    """Those of all tests: they come to no harm."""
    return Engines(postgres, nats_server, s3_server)


@dataclass
class Tethered:
    """A worker that reaches one engine by a wire."""

    node: Node
    wire: Wire


@asynccontextmanager
async def tethered(made: Cluster, engine: str, streams: int) -> AsyncIterator[Tethered]:
    """One that takes so many jobs."""
    server = getattr(made.engines, engine)
    port = int(server.endpoint.rpartition(":")[2]) if engine == "s3" else server.port
    async with wire(port) as led:
        near = {
            name: value.replace(f"127.0.0.1:{port}", f"127.0.0.1:{led.port}")
            for name, value in made.environment.items()
        }
        near["TURNWIRE_MAX_STREAMS"] = str(streams)
        node = made.node(f"without-{engine}", "worker", environment=near)
        yield Tethered(node, led)


def session_of(made: Cluster, job: Follower, number: int) -> SessionRecord:
    """What upstream knows of the job's sessions."""
    began = [event["session_id"] for event in job.events if event["type"] == "session.begin"]
    (record,) = [session for session in made.sandbox.sessions if session.session_id == began[number]]
    return record


def count(job: Follower, kind: str) -> int:
    """How many events of a type it has seen."""
    return sum(event["type"] == kind for event in job.events)


async def cancel(client: httpx.AsyncClient, job_id: str) -> None:
    response = await client.post(f"/jobs/{job_id}/cancel")
    assert response.status_code == 202, response.text


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"postgres": "frozen", "nats": "frozen", "s3": "refused"}, id="frozen"),
        pytest.param({"postgres": "refused", "nats": "refused", "s3": "frozen"}, id="refused", marks=pytest.mark.soak),
    ],
)
async def test_a_worker_cut_off_from_one_engine(tmp_path: Path, engines: Engines, how: dict[str, str]) -> None:
    async with cluster(tmp_path, engines, serve=2, worker=0) as made, AsyncExitStack() as stack:
        cut = {
            engine: await stack.enter_async_context(tethered(made, engine, streams=2 if engine == "nats" else 1))
            for engine in how
        }
        accepted = await asyncio.gather(*(made.upload(marked_wav(JOB_MS)) for _ in range(4)))
        jobs = [made.follow(job["id"]) for job in accepted]
        for job in jobs:
            await job.sees("turn.final", within=60)
        held = {engine: [job for job in jobs if job.job_id in one.node.holds()] for engine, one in cut.items()}
        assert [len(held[engine]) for engine in cut] == [1 if engine != "nats" else 2 for engine in cut]
        made.node("spare", "worker")
        for engine, one in cut.items():
            await one.wire.cut(how[engine])

        (alone,), (canceled, silent), (starved,) = held["postgres"], held["nats"], held["s3"]
        async with made.client() as client:
            await cancel(client, canceled.job_id)
        await canceled.done()
        assert canceled.events[-1]["type"] == "job.canceled"

        await asyncio.sleep(6)  # longer than what was read ahead lasts
        await cut["s3"].wire.mend()

        async with asyncio.timeout(60):
            while count(alone, "session.begin") < 2:
                await asyncio.sleep(0.05)
        ghost, heir = session_of(made, alone, 0), session_of(made, alone, 1)
        assert ghost.closed_at is not None
        assert heir.begin_at is not None
        assert ghost.closed_at < heir.begin_at, "two would have streamed the same audio"
        await cut["postgres"].wire.mend()  # what was on its way arrives now

        for job in jobs:
            await job.done(within=120)
        await cut["nats"].wire.mend()
        assert alone.job_id in {line["job_id"] for line in cut["postgres"].node.said("claim lost")}
        for job, attempts in ((silent, 1), (starved, 1), (alone, 2)):
            assert count(job, "session.begin") == attempts
        for one in cut.values():
            await one.node.ready()  # it finds back by itself
        await check_all(made, jobs, canceled)


async def check_all(made: Cluster, jobs: list[Wanderer], canceled: Wanderer) -> None:
    """Of the one that was canceled, what was said before is kept, once."""
    kept = await made.kept([job.job_id for job in jobs])
    job, log = kept.pop(canceled.job_id)
    check(kept, [follower for follower in jobs if follower is not canceled])
    kit.check(canceled.events, log, job)
    said = kit.spoken([msgspec.json.decode(event.json) for event in log])
    assert said == words(len(said))
    assert said
    made.check_silence()


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_how_long_a_cancel_takes(tmp_path: Path, engines: Engines) -> None:
    """From the POST at one node to upstream's end of the session, and to the event at another node."""
    async with cluster(tmp_path, engines, serve=2, worker=3) as made:
        near, far = made.of("serve")
        upstream: list[float] = []
        told: list[float] = []

        async def one(dice: random.Random) -> None:
            async with near.client() as client:
                headers = {"Content-Type": "audio/wav"}
                job: dict[str, Any] = (await client.post("/jobs", content=marked_wav(20_000), headers=headers)).json()
                follower = Follower(far, job["id"]).begin()
                await follower.sees("turn.partial", within=60)
                await asyncio.sleep(dice.uniform(0, 2))
                asked = time.monotonic()
                await cancel(client, job["id"])
                await follower.done()
            assert follower.events[-1]["type"] == "job.canceled"
            ended = session_of(made, follower, 0).terminate_at
            assert ended is not None
            upstream.append(ended - asked)
            told.append(follower.at[-1] - asked)

        for batch in range(10):
            await asyncio.gather(*(one(random.Random(f"{batch} {number}")) for number in range(5)))
        for name, times in (("Terminate at upstream", upstream), ("job.canceled at another node", told)):
            times.sort()
            print(f"\n{name}: p50 {times[24] * 1000:.0f} ms, p99 {times[-1] * 1000:.0f} ms of {len(times)}")
        assert len(told) == 50
