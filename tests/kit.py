"""The whole service but its HTTP edge in the test's own process, against the sandbox, on a clock that runs faster;
and the one checker of invariants.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from service.backends.assemblyai import AssemblyAI
from service.backends.websocket import Limits
from service.core.job import Event, Job
from service.runtime import Runtime, SystemClock, open_runtime
from service.sandbox.app import Sandbox, run_sandbox
from service.sandbox.faults import FaultPlan
from service.sandbox.recogniser import RecogniserFactory
from service.settings import load_settings
from service.worker import Worker, start_worker
from tests import marked

KEY = "k" * 32
SPEED = 10.0


class BytesUpload:
    """An upload whose bytes are all there."""

    def __init__(self, data: bytes, fields: dict[str, str]) -> None:
        """`fields` are options."""
        self.fields = list(fields.items())
        self.filename: str | None = "audio.wav"
        self._data = data

    async def chunks(self) -> AsyncIterator[bytes]:
        """In pieces of 64 KiB."""
        for at in range(0, len(self._data), 65536):
            yield self._data[at : at + 65536]


@dataclass
class Kit:
    """A running service."""

    runtime: Runtime
    worker: Worker
    sandbox: Sandbox

    async def submit(self, wav: bytes, **options: str) -> Job:
        """Upload."""
        return await self.runtime.intake.accept(BytesUpload(wav, options), owner="", query=[], raw_length=None)

    async def follow(self, job_id: str, after: int = 0, until: str | None = None) -> list[dict[str, Any]]:
        """The events to the end of the job, or to the first of type `until`."""
        seen = []
        async for event in self.runtime.feed.follow(job_id, after):
            seen.append(msgspec.json.decode(event.json))
            if event.type == until:
                break
        return seen

    async def run(self, wav: bytes, **options: str) -> tuple[Job, list[dict[str, Any]]]:
        """Upload, follow to the end; the job and its events, invariants checked."""
        job = await self.submit(wav, **options)
        events = await self.follow(job.id)
        record = await self.runtime.store.get(job.id)
        assert record is not None
        check(events, await self.runtime.store.events_after(job.id, 0, 10_000), record.job)
        return record.job, events


def scaled_limits(speed: float) -> Limits:
    """The bounds of a connection on a faster clock, with room for a busy machine."""
    slower = max(1.0, speed / 3)
    return Limits(connect=5, handshake=5, write=5 / slower, close=1, ping=10 / slower, pong=10 / slower)


@asynccontextmanager
async def running(
    tmp_path: Path,
    *,
    faults: FaultPlan | None = None,
    speed: float = SPEED,
    recogniser: RecogniserFactory = marked.MarkedWords,
    **settings: Any,
) -> AsyncIterator[Kit]:
    """Sandbox, runtime and worker for the length of the context."""
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(
            run_sandbox(recogniser=recogniser, faults=faults, speed=speed, keep_audio=True)
        )
        upstream = await stack.enter_async_context(AssemblyAI(sandbox.url, KEY, limits=scaled_limits(speed)))
        loaded = load_settings(data_dir=tmp_path / "data", upstream_url=sandbox.url, assemblyai_api_key=KEY, **settings)
        runtime = await stack.enter_async_context(open_runtime(loaded, clock=SystemClock(speed), upstream=upstream))
        yield Kit(runtime, await start_worker(runtime, stack), sandbox)


def spoken(events: Sequence[dict[str, Any]], channel: int | None = None) -> list[str]:
    """The words of the final turns, as they stand at the end, in order of index."""
    turns: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["type"] in ("turn.final", "turn.revised"):
            turns[event["turn"]["index"]] = event["turn"]
        elif event["type"] == "job.restarted":
            turns = {index: turn for index, turn in turns.items() if index < event["from_turn"]}
    said = [word["text"] for _, turn in sorted(turns.items()) if turn["channel"] == channel for word in turn["words"]]
    return [word.lower().rstrip(".") for word in said]


def check(events: Sequence[dict[str, Any]], log: Sequence[Event], job: Job) -> None:
    """Invariants of one ended job: what a client saw joined to what is kept (I2, I3, I4, I5 and the rules for
    partials).
    """
    seen = [event["id"] for event in events if event["id"] is not None]
    assert seen == list(range(1, len(seen) + 1)), "ids 1…n without a gap, each once"
    assert seen == [event.seq for event in log], "what was shown is what is kept"
    ends = [event for event in log if event.terminal]
    restarts = [event for event in log if event.type == "job.restarted"]
    assert len(ends) == len(restarts) + 1
    assert log[-1].terminal
    assert job.terminal
    if job.status == "completed":
        assert job.coverage is not None
        terminated = [s for s in job.sessions if s.audio_duration_seconds is not None]
        assert terminated or (job.warnings and not job.coverage.complete), (
            "completed: Termination, or a warning and not complete"
        )
    _check_partials(events)
    _check_progress(events)


def _check_partials(events: Sequence[dict[str, Any]]) -> None:
    final: dict[str, int] = {}
    lost: set[str] = set()
    for event in events:
        if event["type"] == "turn.final":
            turn = event["turn"]
            final[turn["session_id"]] = max(final.get(turn["session_id"], -1), turn["turn_order"])
        elif event["type"] == "session.lost":
            lost.add(event["session_id"])
        elif event["type"] == "turn.partial":
            partial = event["turn"]
            assert partial["turn_order"] > final.get(partial["session_id"], -1), "a partial after the final of its turn"
            assert partial["session_id"] not in lost, "a partial of a lost session"


def _check_progress(events: Sequence[dict[str, Any]]) -> None:
    at = 0
    for event in events:
        if event["type"] == "job.progress":
            assert event["sent_ms"] >= at, "progress went back"
            at = event["sent_ms"]
        elif event["type"] == "job.restarted":
            at = 0


def statuses(events: Sequence[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """The course of status and stage."""
    return [(event["status"], event["stage"]) for event in events if event["type"] == "job.status"]


async def eventually(condition: Any, seconds: float = 10.0) -> None:
    """Wait for `condition()` to hold; fails when it does not."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
