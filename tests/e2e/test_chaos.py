"""Any process may die, freeze or come back as a ghost, and any engine may go away and forget: no job is lost, no word is
lost or said twice, and everybody who follows sees every event once.

Two API nodes and three workers, as they are in production, leases too. What happens and when is drawn from a seed.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import httpx
import msgspec
import pytest

from service.core.job import Event, Job
from tests.e2e.cluster import Cluster, Engines, Node, check, cluster
from tests.engines import Engine
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres
from tests.engines.s3 import S3

FROZEN_SECONDS = 18.0  # longer than a lease
ACTS = (
    "worker_killed", "worker_drained", "worker_frozen", "api_killed", "nats_killed", "nats_wiped", "postgres_stopped",
    "postgres_crashed", "s3_away",
)  # fmt: skip


@pytest.fixture
def engines() -> Iterator[Engines]:
    """Of one's own, to be hurt."""
    with ExitStack() as stack:
        yield Engines(stack.enter_context(Postgres()), stack.enter_context(Nats()), stack.enter_context(S3()))


@dataclass
class Blow:
    """Something that took jobs from a worker."""

    what: str
    at: float  # seconds since the beginning
    jobs: set[str]


@dataclass
class Chaos:
    """What is done to a cluster."""

    cluster: Cluster
    dice: random.Random
    acts: list[tuple[float, str]] = field(default_factory=list)  # seconds since the beginning
    blows: list[Blow] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)
    thaws: "set[asyncio.Task[None]]" = field(default_factory=set)
    began: float = field(default_factory=time.time)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def act(self, name: str) -> None:
        """One thing happens."""
        self.acts.append((time.time() - self.began, name))
        await getattr(self, f"_{name}")()

    def _worker(self, act: str) -> Node | None:
        """Struck next: one that has work, if there is one; not the last one that is not frozen."""
        able = [node for node in self.cluster.of("worker") if node.running() and node.name not in self.frozen]
        if len(able) < 2:
            return None
        busy = [node for node in able if node.holds()]
        node = self.dice.choice(busy or able)
        self.blows.append(Blow(f"{act} {node.name}", time.time() - self.began, node.holds()))
        return node

    async def _worker_killed(self) -> None:
        if node := self._worker("killed"):
            node.signal(signal.SIGKILL)

    async def _worker_drained(self) -> None:
        if node := self._worker("drained"):
            node.signal(signal.SIGTERM)

    async def _worker_frozen(self) -> None:
        if node := self._worker("frozen"):
            node.signal(signal.SIGSTOP)
            self.frozen.add(node.name)
            self.thaws.add(asyncio.create_task(self._thaw(node)))

    async def _thaw(self, node: Node) -> None:
        await asyncio.sleep(FROZEN_SECONDS)
        node.signal(signal.SIGCONT)
        self.frozen.discard(node.name)

    async def _api_killed(self) -> None:
        self.dice.choice(self.cluster.of("serve")).signal(signal.SIGKILL)

    async def _nats_killed(self) -> None:
        nats = self.cluster.engines.nats
        await self._without(nats, nats.kill)

    async def _nats_wiped(self) -> None:
        nats = self.cluster.engines.nats
        await self._without(nats, nats.wipe)

    async def _postgres_stopped(self) -> None:
        postgres = self.cluster.engines.postgres
        await self._without(postgres, postgres.stop)

    async def _postgres_crashed(self) -> None:
        postgres = self.cluster.engines.postgres
        await self._without(postgres, postgres.crash)

    async def _s3_away(self) -> None:
        s3 = self.cluster.engines.s3
        await self._without(s3, s3.kill, at_most=4)

    async def _without(self, engine: Engine, end: Callable[[], None], *, at_most: float = 3) -> None:
        """Let `end` take the engine away, for so many seconds at most."""
        await asyncio.to_thread(end)
        await asyncio.sleep(self.dice.uniform(0, at_most))
        await asyncio.to_thread(engine.start)

    async def settle(self, uploads: "Sequence[asyncio.Task[None]]", within: float) -> None:
        """No more uploads; until all jobs have ended."""
        self.over.set()
        await asyncio.gather(*uploads, *self.thaws)
        try:
            async with asyncio.timeout(within):
                await asyncio.gather(*(follower.task for follower in self.cluster.followers if follower.task))
        except TimeoutError:
            left = {follower.job_id: follower.events[-3:] for follower in self.cluster.followers if not follower.over}
            pytest.fail(f"{len(left)} jobs do not end: {left}")

    async def check(self) -> None:
        """Everything, and the figures."""
        kept = await self.cluster.kept([follower.job_id for follower in self.cluster.followers])
        self.tell(kept)
        for late in [self.cluster.follow(job_id) for job_id in kept]:
            await late.done()
        check(kept, self.cluster.followers)
        async with self.cluster.client() as client:
            await _check_listed(client, kept.keys())
        self.cluster.check_silence()

    def tell(self, kept: Mapping[str, tuple[Job, Sequence[Event]]]) -> None:
        """The figures: among them from each blow to the next session of the jobs that the worker had."""
        attempts = Counter(job.attempt for job, _ in kept.values())
        moves = sum(follower.moves for follower in self.cluster.followers)
        print(f"\n{len(kept)} jobs, attempts {sorted(attempts.items())}, {moves} moves of followers")
        print(f"{len(self.acts)} acts {Counter(name for _, name in self.acts)}; started again {self.cluster.restarts}")
        print("; ".join(f"{at:.0f} s {name}" for at, name in self.acts))
        taken: dict[str, list[float]] = {}
        for blow in self.blows:
            times = [self._taken_over(blow, kept[job_id][1]) for job_id in blow.jobs if job_id in kept]
            print(f"{blow.at:.0f} s {blow.what}: taken over after {[f'{t:.1f}' for t in sorted(times)]} s")
            taken.setdefault(blow.what.split()[0], []).extend(times)
        for act, times in taken.items():
            if times:
                ordered = sorted(times)
                print(f"{act}: p50 {ordered[len(times) // 2]:.1f} s, max {ordered[-1]:.1f} s of {len(times)}")

    def _taken_over(self, blow: Blow, log: Sequence[Event]) -> float:
        for event in log:
            at = datetime.fromisoformat(msgspec.json.decode(event.json)["at"]).timestamp() - self.began - blow.at
            if at > 0 and (event.type == "session.begin" or event.terminal):
                return at
        return 0.0


async def _check_listed(client: httpx.AsyncClient, job_ids: Iterable[str]) -> None:
    listed: list[str] = []
    address = "/jobs?limit=200"
    while address:
        page = (await client.get(address)).raise_for_status().json()
        listed += [job["id"] for job in page["data"]]
        address = f"/jobs?limit=200&cursor={page['next_cursor']}" if page["has_more"] else ""
    assert sorted(listed) == sorted(job_ids), "one job for each upload, whatever happened to its answer"


@pytest.mark.timeout(600)
async def test_everything_happens_once(tmp_path: Path, engines: Engines) -> None:
    async with cluster(tmp_path, engines, serve=2, worker=3) as made:
        chaos = Chaos(made, random.Random(1))
        uploads = [asyncio.create_task(made.keep_busy(chaos.over, 4000, 10_000, pause=2)) for _ in range(2)]
        await asyncio.sleep(4)
        for act in ("worker_frozen", "worker_killed", *chaos.dice.sample(ACTS[3:] + ACTS[1:2], 7)):
            await chaos.act(act)
            await asyncio.sleep(chaos.dice.uniform(0.5, 2))
        await chaos.settle(uploads, within=200)
        await chaos.check()


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
async def test_five_minutes_of_it(tmp_path: Path, engines: Engines, seed: int) -> None:
    async with cluster(tmp_path, engines, serve=2, worker=3, seed=seed) as made:
        chaos = Chaos(made, random.Random(seed))
        uploads = [asyncio.create_task(made.keep_busy(chaos.over, 6000, 40_000, pause=6)) for _ in range(2)]
        began = time.monotonic()
        while time.monotonic() - began < 300:
            await asyncio.sleep(chaos.dice.uniform(1, 6))
            first, second = chaos.dice.sample(ACTS, 2)
            if chaos.dice.random() < 0.3 and first.split("_")[0] != second.split("_")[0]:
                await asyncio.gather(chaos.act(first), chaos.act(second))
            else:
                await chaos.act(first)
        await chaos.settle(uploads, within=240)
        await chaos.check()
