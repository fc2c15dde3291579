"""`turnwire serve` in a process of its own, clients that follow its jobs whatever happens to it, and the checker of
what must hold then.

The upstream is a sandbox of the test, in real time, that hears marked audio; it outlives every process.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import httpx
import msgspec

from service.core.job import Event, Job, job_from_json
from service.runtime import SystemClock, open_runtime
from service.sandbox.app import Sandbox, run_sandbox
from service.sandbox.faults import FaultPlan
from service.settings import load_settings
from tests import kit
from tests.marked import MarkedWords, words

ROOT = Path(__file__).parents[2]
KEY = "key-that-must-not-be-logged-0123"
SERVES = re.compile(r"Turnwire serves (http://\S+),")


class Service:
    """`serve` on one data directory, as often as it is started. stderr goes to a file, or to a pipe nobody reads."""

    def __init__(self, data: Path, upstream: str, **settings: str) -> None:
        """`settings`: TURNWIRE_ variables without the prefix, in small letters."""
        self.data = data
        self.arm = data.with_name(data.name + ".arm")  # of failpoints
        self.errors = data.with_name(data.name + ".stderr")
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.up = asyncio.Event()
        self.environment = {
            "PATH": "/usr/bin:/bin",
            "TURNWIRE_DATA_DIR": str(data),
            "TURNWIRE_UPSTREAM_URL": upstream,
            "TURNWIRE_LOG_LEVEL": "debug",
            "ASSEMBLYAI_API_KEY": KEY,
            **{f"TURNWIRE_{name.upper()}": value for name, value in settings.items()},
        }

    async def start(self, *, pipe: bool = False) -> None:
        """Start it and wait until it says where it serves. `pipe`: stderr is a pipe of 4 KiB, read up to that line."""
        said = self.errors.stat().st_size if self.errors.exists() else 0
        self.spawn(pipe=pipe)
        if pipe:
            fcntl.fcntl(self.stderr, fcntl.F_SETPIPE_SZ, 4096)
            assert self._serves((await asyncio.to_thread(self.stderr.readline)).decode())
            return
        async with asyncio.timeout(30):
            while not self._serves(self.errors.read_bytes()[said:].decode(errors="replace")):
                assert self.running(), self.errors.read_text()[-3000:]
                await asyncio.sleep(0.02)

    def spawn(self, *, pipe: bool = False) -> None:
        """Start it and wait for nothing."""
        assert not self.running()
        command = [sys.executable, "-m", "tests.e2e.failpoints", str(self.arm), "serve", "--port", "0"]
        self.started_at = time.monotonic()
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE if pipe else errors
            )

    def _serves(self, text: str) -> bool:
        if found := SERVES.search(text):
            self.url = found[1]
            self.up.set()
        return found is not None

    def running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    @property
    def stderr(self) -> IO[bytes]:
        """The pipe nobody reads."""
        assert self.process is not None
        assert self.process.stderr is not None
        return self.process.stderr

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process is not None
        self.up.clear()
        if self.running():
            self.process.send_signal(number)

    async def ended(self, within: float = 20) -> int:
        """Its exit code; minus the number of the signal that ended it."""
        assert self.process is not None
        async with asyncio.timeout(within):
            while (code := self.process.poll()) is None:
                await asyncio.sleep(0.01)
        self.up.clear()
        return code

    async def kill(self) -> None:
        """SIGKILL, and gone."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            await self.ended()
            if self.process.stderr is not None:
                self.process.stderr.close()

    def client(self, **options: Any) -> httpx.AsyncClient:
        """For the process that runs now."""
        return httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False, **options)


@asynccontextmanager
async def serving(
    tmp_path: Path, *, faults: FaultPlan | None = None, data: Path | None = None, **settings: str
) -> AsyncIterator[tuple[Service, Sandbox]]:
    """A sandbox, and a service that uses it, not started yet."""
    async with run_sandbox(recogniser=MarkedWords, faults=faults, keep_audio=True) as sandbox:
        service = Service(data or tmp_path / "data", sandbox.url, **settings)
        try:
            yield service, sandbox
        finally:
            await service.kill()


# --- a client --------------------------------------------------------------------------------------------------------


class Place(Protocol):
    """Where jobs are followed: one process, or any node of many."""

    up: asyncio.Event

    def client(self, **options: Any) -> httpx.AsyncClient:
        """For whoever serves now."""


@dataclass
class Follower:
    """An SSE client as the contract wants one: it comes back after whatever happened, with the last id it saw."""

    service: Place
    job_id: str
    events: list[dict[str, Any]] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # of each event
    retries: list[int] = field(default_factory=list)  # of each response
    ends: list[str] = field(default_factory=list)  # how each response ended: clean or not
    last: int = 0
    task: "asyncio.Task[None] | None" = None

    def begin(self) -> "Follower":
        """In a task."""
        self.task = asyncio.create_task(self.run())
        return self

    async def run(self) -> None:
        """Until the terminal event."""
        while not self.over:
            await self.service.up.wait()
            try:
                await self._once()
                self.ends.append("clean")
            except httpx.TransportError:
                self.ends.append("cut")
            await asyncio.sleep(0.02)

    @property
    def over(self) -> bool:
        """Whether the newest event is terminal."""
        return bool(self.events) and self.events[-1]["type"] in ("job.completed", "job.failed", "job.canceled")

    async def _once(self) -> None:
        headers = {"Last-Event-ID": str(self.last)} if self.last else {}
        async with (
            self.service.client() as client,
            client.stream("GET", f"/jobs/{self.job_id}/events", headers=headers) as response,
        ):
            await self._read(response)

    async def _read(self, response: httpx.Response) -> None:
        assert response.status_code == 200, response.status_code
        self.retries.append(0)
        async for line in response.aiter_lines():
            if line.startswith("retry:"):
                self.retries[-1] += 1
            elif line.startswith("data:"):
                self._take(msgspec.json.decode(line[5:]))

    def _take(self, event: dict[str, Any]) -> None:
        assert event["type"] != "stream.reset", "every id we have seen is known"
        self.events.append(event)
        self.at.append(time.monotonic())
        self.last = event["id"] or self.last

    async def done(self, within: float = 60) -> None:
        """Wait for the terminal event."""
        assert self.task is not None
        async with asyncio.timeout(within):
            await self.task

    async def sees(self, kind: str, within: float = 20) -> None:
        """Wait for the first event of this type."""
        await kit.eventually(lambda: any(event["type"] == kind for event in self.events), within)

    def first_after(self, moment: float, kind: str) -> float | None:
        """Seconds from `moment` to the first event of this type after it."""
        for event, at in zip(self.events, self.at, strict=True):
            if at >= moment and event["type"] == kind:
                return at - moment
        return None


async def upload(service: Service, wav: bytes) -> dict[str, Any]:
    """Upload; the job of the 202."""
    async with service.client() as client:
        response = await client.post("/jobs", content=wav, headers={"Content-Type": "audio/wav"})
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        assert job["audio"]["sha256"] == hashlib.sha256(wav).hexdigest()
        return job


# --- the checker -----------------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """What is on the disk."""

    jobs: dict[str, Job]
    logs: dict[str, list[Event]]
    turns: dict[str, int]
    audio: dict[str, str]  # name → SHA-256


def kept(data: Path) -> Kept:
    """Read a data directory from a copy: the original is left as a crash left it, for the next start to recover."""
    with tempfile.TemporaryDirectory() as directory:
        for path in data.glob("turnwire.db*"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(path, directory)
        with contextlib.closing(sqlite3.connect(Path(directory) / "turnwire.db")) as connection:
            jobs = {job_id: job_from_json(doc) for job_id, doc in connection.execute("SELECT id, doc FROM jobs")}
            logs: dict[str, list[Event]] = {job_id: [] for job_id in jobs}
            rows = connection.execute("SELECT job_id, seq, type, doc FROM events ORDER BY job_id, seq")
            for job_id, seq, kind, doc in rows:
                logs[job_id].append(Event(job_id, seq, kind, doc))
            turns = dict(connection.execute("SELECT job_id, count(*) FROM turns GROUP BY job_id"))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (data / "audio").glob("*")}
    return Kept(jobs, logs, turns, files)


def check_promises(now: Kept, accepted: Iterable[dict[str, Any]], followers: Iterable[Follower]) -> None:
    """What holds at every instant, a crash's included: I1 and I3, and what a client saw is what is kept (I4)."""
    for job in accepted:
        assert job["id"] in now.jobs, "I1: a 202 means a row"
        assert now.audio.get(job["id"]) == job["audio"]["sha256"], "I1: and the audio"
    for job_id, log in now.logs.items():
        assert [event.seq for event in log] == list(range(1, len(log) + 1)), "I4: no gap in the log"
        finals = sum(event.type == "turn.final" for event in log)
        assert now.turns.get(job_id, 0) == finals, "every final of the log is a turn"
    for follower in followers:
        log = now.logs[follower.job_id]
        seen = [event for event in follower.events if event["id"] is not None]
        assert [event["id"] for event in seen] == list(range(1, len(seen) + 1)), "I4: joined reads, each once"
        assert seen == [msgspec.json.decode(event.json) for event in log[: len(seen)]], "I3: what was shown is kept"


def check_ended(now: Kept, followers: Sequence[Follower], count: Callable[[Job], int]) -> None:
    """What holds once every job has ended: I2, I5 and every word exactly once; `count` says how many a job has."""
    for job_id, job in now.jobs.items():
        events = [msgspec.json.decode(event.json) for event in now.logs[job_id]]
        kit.check(events, now.logs[job_id], job)
        assert (job.status, job.error) == ("completed", None)
        assert kit.spoken(events) == words(count(job)), "every word exactly once"
        assert job.coverage is not None
        assert job.coverage.complete
    for follower in followers:
        kit.check(follower.events, now.logs[follower.job_id], now.jobs[follower.job_id])
    assert set(now.audio) >= set(now.jobs), "the audio is there until retention says otherwise"


class InTwoHours(SystemClock):
    """The same, later."""

    def utc_ms(self) -> int:
        """Unix milliseconds."""
        return super().utc_ms() + 2 * 3600 * 1000


async def check_swept(service: Service) -> int:
    """Whole audio whose job was never committed is removed by the sweeper; how many were."""
    settings = load_settings(data_dir=service.data, upstream_url="ws://127.0.0.1:1/v3/ws")
    before = kept(service.data)
    async with open_runtime(settings, clock=InTwoHours()) as runtime:
        await runtime.sweeper.sweep()
    after = kept(service.data)
    assert set(after.audio) == set(after.jobs) == set(before.jobs), "nothing is left of uploads that were cut"
    return len(before.audio) - len(after.audio)


def check_silence(service: Service, *, but: str = "\0") -> None:
    """I6: neither the key nor a word in the log; and no error `but` this."""
    text = service.errors.read_text()
    assert KEY not in text
    assert not re.search(r"\bw\d+\b", text), "a transcript in the log"
    for line in text.splitlines():
        assert '"level":"error"' not in line or but in line, line
