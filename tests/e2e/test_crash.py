"""SIGKILL at any instant: everything accepted goes on by itself, no word is lost or doubled, nothing is left lying about.

One data directory lives through a run of kills. Each kill has a place (an upload, a stream, the last words, the start
of the next process, or an exact line by failpoint); every one is followed by a look at what is on the disk, a new
start, and the checker of invariants. Seeded: the soak prints its figures.
"""

import asyncio
import contextlib
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from service.core.job import Job
from service.sandbox.app import Sandbox
from tests import kit
from tests.e2e.failpoints import POINTS
from tests.e2e.process import (
    Follower,
    Service,
    check_ended,
    check_promises,
    check_silence,
    check_swept,
    kept,
    serving,
    upload,
)
from tests.marked import marked_wav

WORD_MS = 200
SHORT_MS, LONG_MS = 1600, 3200
RESUME_SECONDS = (
    10.0  # the promise of B2, from when the service is there; the figures are from the start of the process
)


def word_count(job: Job) -> int:
    return job.audio.duration_ms // WORD_MS


@dataclass
class Run:
    """A service that is killed again and again, its clients, and what was promised to them."""

    service: Service
    sandbox: Sandbox
    rng: random.Random
    accepted: list[dict[str, Any]] = field(default_factory=list)
    followers: list[Follower] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)  # seconds from the start of the process to session.begin
    listening: list[float] = field(default_factory=list)  # and to its URL
    places: dict[str, int] = field(default_factory=dict)
    sockets: list[socket.socket] = field(default_factory=list)
    orphans: int = 0

    async def job(self, duration_ms: int) -> Follower:
        """Upload, and follow by two clients."""
        job = await upload(self.service, marked_wav(duration_ms))
        self.accepted.append(job)
        self.followers += [Follower(self.service, job["id"]).begin() for _ in range(2)]
        return self.followers[-1]

    async def crash(self, place: str, exactly: tuple[str, int] | None = None) -> None:
        """One kill at `place`, and everything that must hold then; `exactly`: which failpoint, and its visit."""
        self.places[place] = self.places.get(place, 0) + 1
        await self.job(LONG_MS)  # somebody else's, in the middle of whatever happens
        if exactly is not None:
            await self.at(*exactly)
        else:
            await getattr(self, f"_{place}")()
        code = await self.service.ended()
        assert code == -9, code
        open_jobs = [f for f in self.followers[::2] if not f.over]
        check_promises(kept(self.service.data), self.accepted, self.followers)
        self.service.arm.unlink(missing_ok=True)
        await self._restart(open_jobs)

    async def _restart(self, open_jobs: list[Follower]) -> None:
        await self.service.start()
        began = self.service.started_at
        self.listening.append(time.monotonic() - began)
        assert not list((self.service.data / "audio").glob("*.part")), "half uploads are swept"
        for follower in self.followers:
            await follower.done()
        await self._adopt()
        for follower in open_jobs:
            took = follower.first_after(began, "session.begin")
            if took is not None:  # else all of it was terminated already, and only the end was missing
                self.resumed.append(took)
                assert took - self.listening[-1] < RESUME_SECONDS

    async def _adopt(self) -> None:
        """Jobs whose 202 never arrived end like all others."""
        mine = {job["id"] for job in self.accepted}
        async with self.service.client() as client:
            jobs = (await client.get("/jobs?limit=200")).json()["data"]
        for job in jobs:
            if job["id"] not in mine:
                self.accepted.append(job)
                self.followers += [Follower(self.service, job["id"]).begin() for _ in range(2)]
        for follower in self.followers:
            await follower.done()

    def check(self) -> None:
        """Everything, once more."""
        for raw in self.sockets:
            raw.close()
        now = kept(self.service.data)
        check_promises(now, self.accepted, self.followers)
        check_ended(now, self.followers, word_count)
        check_silence(self.service)

    # --- places -------------------------------------------------------------------------------------------------------

    async def _upload(self) -> None:
        """With part of a body sent, or all of it and no answer yet; three clients at once."""
        await asyncio.gather(*(self._half(self.rng.random() if n else 1.0) for n in range(3)))
        await asyncio.sleep(self.rng.random() * 0.02)
        self.service.signal(signal.SIGKILL)

    async def _half(self, part: float) -> None:
        where, wav = urlsplit(self.service.url), marked_wav(SHORT_MS)
        raw = socket.create_connection((where.hostname, where.port))
        raw.setblocking(False)
        head = f"POST /jobs HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: audio/wav\r\nContent-Length: {len(wav)}\r\n\r\n"
        sent = wav[: max(1, int(len(wav) * part))]
        await asyncio.get_running_loop().sock_sendall(raw, head.encode() + sent)
        if part < 1.0:
            parts = self.service.data / "audio"
            await kit.eventually(lambda: list(parts.glob("*.part")))
        self.sockets.append(raw)

    async def _streaming(self) -> None:
        follower = await self.job(SHORT_MS)
        await follower.sees("session.begin")
        await asyncio.sleep(self.rng.random() * SHORT_MS / 1000)
        self.service.signal(signal.SIGKILL)

    async def _finishing(self) -> None:
        """From Terminate on, over Termination and the last commit, to shortly after the end."""
        known = len(self.sandbox.sessions)
        await self.job(SHORT_MS)
        await kit.eventually(lambda: any(s.terminate_at is not None for s in self.sandbox.sessions[known:]))
        await asyncio.sleep(self.rng.random() * 0.06)
        self.service.signal(signal.SIGKILL)

    async def _starting(self) -> None:
        """Killed in the stream, and its successor at some instant of its own start."""
        await asyncio.sleep(self.rng.random() * LONG_MS / 1000)
        await self.service.kill()
        self.service.spawn()
        await asyncio.sleep(self.rng.random() * 2)
        self.service.signal(signal.SIGKILL)

    async def _failpoint(self) -> None:
        point = self.rng.choice(POINTS)
        busy = point.startswith(("commit", "publish"))
        await self.at(point, self.rng.randint(1, 25 if busy else 2))

    async def at(self, point: str, count: int) -> None:
        """Exactly there."""
        self.service.arm.write_text(f"{point} {count}")
        async with asyncio.timeout(30):
            while self.service.running():
                with contextlib.suppress(httpx.TransportError):
                    await self.job(SHORT_MS)
                await asyncio.sleep(0.2)
        self.service.up.clear()


async def run_of(tmp_path: Path, seed: int, places: list[str], then: Callable[[Run], None]) -> None:
    async with serving(tmp_path) as (service, sandbox):
        await service.start()
        run = Run(service, sandbox, random.Random(seed))
        for place in places:
            await run.crash(place)
        run.check()
        await service.kill()
        run.orphans = await check_swept(service)
        then(run)


def tell(run: Run) -> None:
    """The figures."""
    both = {"listening": sorted(run.listening), "resumed": sorted(run.resumed)}
    print(f"\n{sum(run.places.values())} kills {run.places}, {len(run.accepted)} jobs, {run.orphans} orphans swept")
    for name, times in both.items():
        if times:
            print(
                f"{name}: median {times[len(times) // 2]:.2f} s, p90 {times[len(times) * 9 // 10]:.2f} s, max {times[-1]:.2f} s of {len(times)}"
            )


async def test_killed_at_five_places(tmp_path: Path) -> None:
    await run_of(tmp_path, 1, ["upload", "streaming", "finishing", "starting", "failpoint"], tell)


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [1, 2])
async def test_killed_at_fifty_places(tmp_path: Path, seed: int) -> None:
    """25 to a seed, so that the two may run side by side."""
    places = ["upload", "streaming", "finishing", "starting", "failpoint"] * 5
    random.Random(seed).shuffle(places)
    await run_of(tmp_path, seed * 1000, places, tell)


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_every_failpoint(tmp_path: Path, point: str) -> None:
    async with serving(tmp_path) as (service, sandbox):
        await service.start()
        run = Run(service, sandbox, random.Random(0))
        for count in (1, 2, 5, 11) if point.startswith(("commit", "publish")) else (1, 2):
            await run.crash("failpoint", (point, count))
        run.check()
        await service.kill()
        run.orphans = await check_swept(service)
        tell(run)
