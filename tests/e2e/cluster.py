"""A cluster on this machine: `turnwire serve` and `turnwire worker`, each in a process of its own, on real PostgreSQL,
NATS and S3; whatever dies is started again, as an orchestrator does.

The upstream is a sandbox of the test, in real time, that hears marked audio. Leases, drains and patience are those of
production. Nothing outlives the process that started it.
"""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from service.core.job import Event, Job
from service.sandbox.app import Sandbox, run_sandbox
from service.store import Store, open_store
from tests import kit
from tests.e2e.process import Follower
from tests.engines import free_ports
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres
from tests.engines.s3 import S3
from tests.marked import WORD_MS, MarkedWords, marked_wav, words

ROOT = Path(__file__).parents[2]
WITH_US = ["setpriv", "--pdeathsig", "KILL", "--"]
UP_SECONDS = 150.0
STAY_SECONDS = 4.0  # of a follower at one node, on average
AT_ONCE = 20  # jobs, for a machine that is slow
NEVER = ("job failed unexpectedly", "job dropped; its lease", "never retrieved", "never awaited", "IntegrityError")


@dataclass
class Node:
    """One process of the service."""

    name: str
    command: str  # serve or worker
    port: int
    here: Path
    environment: dict[str, str]
    code: Path = ROOT  # of its release
    wanted: bool = True
    up: asyncio.Event = field(default_factory=asyncio.Event)
    process: subprocess.Popen[bytes] | None = None
    _said: int = 0  # bytes of its log when its process began

    @property
    def log(self) -> Path:
        """What all its processes say."""
        return self.here / f"{self.name}.log"

    @property
    def url(self) -> str:
        """Of the API, or of a worker's health."""
        return f"http://127.0.0.1:{self.port}"

    def spawn(self) -> None:
        """Start it and wait for nothing."""
        assert not self.running()
        self._said = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*WITH_US, sys.executable, "-m", "service", self.command, "--port", str(self.port)],
                cwd=self.here, env=self.environment | {"PYTHONPATH": str(self.code)}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    def running(self) -> bool:
        """Whether there is a process, frozen or not."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if there is somebody to get it."""
        if self.process is not None and self.running():
            self.process.send_signal(number)

    async def ended(self, within: float = 30) -> int:
        """Its exit code; minus the number of the signal that ended it."""
        assert self.process is not None
        async with asyncio.timeout(within):
            while (code := self.process.poll()) is None:
                await asyncio.sleep(0.01)
        return code

    def said(self, what: str) -> Iterator[dict[str, Any]]:
        """The lines of its present process with this event."""
        if self.log.exists():
            for line in self.log.read_bytes()[self._said :].decode(errors="replace").splitlines():
                if f'"{what}"' in line and line.endswith("}"):
                    yield json.loads(line)

    def holds(self) -> set[str]:
        """The jobs it streams."""
        left = {line["session_id"] for line in self.said("session left")}
        return {line["job_id"] for line in self.said("session began") if line["session_id"] not in left}

    async def ready(self, within: float = UP_SECONDS) -> None:
        """Wait until it can do its work."""
        deadline = time.monotonic() + within
        while not await self._is_ready():
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.log.read_text()[-3000:]}"
            await asyncio.sleep(0.1)
        self.up.set()

    def client(self, **options: Any) -> httpx.AsyncClient:
        """For this one only."""
        return httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False, **options)

    async def _is_ready(self) -> bool:
        try:
            async with self.client() as client:
                return (await client.get("/readyz")).status_code == 200
        except httpx.TransportError:
            return False


@dataclass
class Engines:
    """What the nodes stand on."""

    postgres: Postgres
    nats: Nats
    s3: S3


@dataclass
class Cluster:
    """Nodes on engines, and the clients' side of them."""

    engines: Engines
    sandbox: Sandbox
    here: Path
    dice: random.Random
    environment: dict[str, str]
    database_url: str
    nodes: list[Node] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    followers: "list[Wanderer]" = field(default_factory=list)

    def node(self, name: str, command: str, *, code: Path = ROOT, environment: Mapping[str, str] | None = None) -> Node:
        """Start one more; `environment` is laid over that of all."""
        (port,) = free_ports(1)
        node = Node(name, command, port, self.here, {**self.environment, **(environment or {})}, code)
        self.nodes.append(node)
        node.spawn()
        return node

    def of(self, command: str) -> list[Node]:
        """The nodes of a kind that are wanted."""
        return [node for node in self.nodes if node.command == command and node.wanted]

    async def supervise(self) -> None:
        """Start again what has died, half a second later."""
        while True:
            await asyncio.sleep(0.5)
            for node in self.nodes:
                if node.wanted and not node.running():
                    self.restarts[node.name] = self.restarts.get(node.name, 0) + 1
                    node.spawn()

    def client(self, **options: Any) -> httpx.AsyncClient:
        """For any of the API nodes, dead ones too."""
        return self.dice.choice(self.of("serve")).client(**options)

    async def migrate(self, code: Path = ROOT) -> None:
        """`turnwire migrate`, by two at once."""
        both = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "service", "migrate", cwd=self.here, stderr=subprocess.PIPE,
                env=self.environment | {"PYTHONPATH": str(code)},
            )
            for _ in range(2)
        ]  # fmt: skip
        for process in both:
            said = (await process.communicate())[1]
            assert process.returncode == 0, said.decode()

    async def upload(self, wav: bytes, within: float = 120) -> dict[str, Any]:
        """Upload until it is accepted, as a careful client: whatever happens, it becomes one job."""
        headers = {"Content-Type": "audio/wav", "Idempotency-Key": uuid.uuid4().hex}
        said = ""
        async with asyncio.timeout(within):
            while True:
                try:
                    async with self.client() as client:
                        response = await client.post("/jobs", content=wav, headers=headers)
                    if response.status_code == 202:
                        return msgspec.json.decode(response.content, type=dict[str, Any])
                    said = response.text
                    assert response.status_code in (409, 503), said
                except httpx.TransportError as exc:
                    said = repr(exc)
                await asyncio.sleep(0.3)

    def follow(self, job_id: str) -> "Wanderer":
        """A client that follows a job from node to node."""
        self.followers.append(Wanderer(self, job_id, dice=random.Random(self.dice.random())).begin())
        return self.followers[-1]

    async def keep_busy(self, over: asyncio.Event, shortest_ms: int, longest_ms: int, pause: float) -> None:
        """Jobs, one after the other, each followed by one client, until it is over."""
        while not over.is_set():
            if sum(not follower.over for follower in self.followers) < AT_ONCE:
                job = await self.upload(marked_wav(self.dice.randrange(shortest_ms, longest_ms, WORD_MS)))
                self.follow(job["id"])
            await asyncio.sleep(pause * self.dice.uniform(0.5, 1.5))

    async def kept(self, job_ids: Sequence[str]) -> "dict[str, tuple[Job, Sequence[Event]]]":
        """The jobs and their logs as the database has them."""
        async with open_store(self.database_url) as store:
            return {job_id: await _kept(store, job_id) for job_id in job_ids}

    def check_silence(self) -> None:
        """No process has said what none may say."""
        for node in self.nodes:
            for line in node.log.read_text().splitlines():
                assert not any(word in line for word in NEVER), f"{node.name}: {line[:3000]}"


async def _kept(store: Store, job_id: str) -> tuple[Job, Sequence[Event]]:
    record = await store.get(job_id)
    assert record is not None, job_id
    return record.job, await store.events_after(job_id, 0, 10_000)


@dataclass
class Wanderer(Follower):
    """A follower that moves on to any node, with the last id it saw: after a while, and after whatever goes wrong."""

    dice: random.Random = field(default_factory=random.Random)
    moves: int = 0

    def begin(self) -> "Wanderer":
        super().begin()
        return self

    async def _once(self) -> None:
        self.moves += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(self.dice.expovariate(1 / STAY_SECONDS)):
                await super()._once()

    async def _read(self, response: httpx.Response) -> None:
        if response.status_code == 503:
            raise httpx.RemoteProtocolError("not now")
        await super()._read(response)


@asynccontextmanager
async def cluster(here: Path, engines: Engines, *, serve: int, worker: int, seed: int = 1) -> AsyncIterator[Cluster]:
    """So many nodes on an empty database, all of them ready, and started again when they die."""
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(run_sandbox(recogniser=MarkedWords))
        url = engines.postgres.url(await asyncio.to_thread(engines.postgres.create))
        environment = {
            "PATH": "/usr/bin:/bin",
            "ASSEMBLYAI_API_KEY": "sandbox",
            "TURNWIRE_UPSTREAM_URL": sandbox.url,
            "TURNWIRE_DATABASE_URL": url,
            "TURNWIRE_BROKER_URL": engines.nats.url,
            "TURNWIRE_AUDIO_URL": f"{engines.s3.url}/{uuid.uuid4().hex}",
            **engines.s3.environment,
        }
        made = Cluster(engines, sandbox, here, random.Random(seed), environment, url)
        stack.push_async_callback(_end, made)
        await made.migrate()
        for command, count in (("serve", serve), ("worker", worker)):
            for number in range(count):
                made.node(f"{command}-{number}", command)
        for node in made.nodes:
            await node.ready()
        made.up.set()
        supervisor = asyncio.create_task(made.supervise(), name="supervisor")
        stack.callback(supervisor.cancel)
        yield made


async def _end(made: Cluster) -> None:
    for follower in made.followers:
        assert follower.task is not None
        follower.task.cancel()  # of a test that failed
    for node in made.nodes:
        node.wanted = False
        node.signal(signal.SIGKILL)
    for node in made.nodes:
        await node.ended()


def check(kept: Mapping[str, tuple[Job, Sequence[Event]]], followers: Sequence[Wanderer]) -> None:
    """Every job completed with every word once, and every follower saw each event once and in order."""
    for job_id, (job, log) in kept.items():
        events = [msgspec.json.decode(event.json) for event in log]
        assert (job.status, job.error) == ("completed", None), job_id
        kit.check(events, log, job)
        assert kit.spoken(events) == words(job.audio.duration_ms // WORD_MS), f"every word once: {job_id}"
        assert job.coverage is not None
        assert job.coverage.complete, job.coverage
    for follower in followers:
        job, log = kept[follower.job_id]
        kit.check(follower.events, log, job)
        seen = [event for event in follower.events if event["id"] is not None]
        assert seen == [msgspec.json.decode(event.json) for event in log]
