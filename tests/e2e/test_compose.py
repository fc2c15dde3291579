"""What docker-compose.yml starts, really started: in its order, with its commands, over its nginx.

One of each by default; `-m soak` runs two of each and kills the worker that has the job.
"""

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.compose import Stack, up

SAMPLES = Path(__file__).parents[1] / "samples"


def _upload(stack: Stack, name: str) -> dict[str, Any]:
    command = ["curl", "-sS", "--noproxy", "*", "-F", f"file=@{SAMPLES / name}", f"{stack.url}/jobs"]
    job: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert job["status"] == "queued", job
    return job


async def _follow(stack: Stack, job_id: str, until: str) -> list[dict[str, Any]]:
    """The events up to the first of a type, over nginx, with curl."""
    address = f"{stack.url}/jobs/{job_id}/events"
    command = ["curl", "-sSN", "--noproxy", "*", "-H", "Accept: application/x-ndjson", address]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    events: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(90):
            while not events or events[-1]["type"] != until:
                line = await process.stdout.readline()
                assert line, "the stream ended early"
                events += [json.loads(line)] if line.strip() else []
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    return events


def _status(stack: Stack, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = httpx.get(f"{stack.url}/jobs/{job_id}", trust_env=False).json()
    return job


def _busy(stack: Stack) -> list[int]:
    """Which workers have a stream."""
    texts = [httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text for port in stack.own["worker"]]
    return [number for number, text in enumerate(texts) if "turnwire_streams 1.0" in text]


def _check(events: list[dict[str, Any]], attempts: int, job: dict[str, Any]) -> None:
    assert [event["id"] for event in events if event["id"]] == list(range(1, events[-1]["id"] + 1))
    assert (job["status"], job["attempt"], job["coverage"]["complete"]) == ("completed", attempts, True)
    assert job["turn_count"] >= 1
    assert job["sessions"][0]["model"] == "sandbox"


def _stop(stack: Stack, *, killed: bool = False) -> None:
    """Workers and API drain when they are told to stop, and migrate ended well."""
    codes = stack.down()
    ours = {name: codes[name] for name in ("migrate", "sandbox", "api", "worker")}
    assert {code for each in ours.values() for code in each} <= ({0, -9} if killed else {0}), ours


async def test_compose_takes_a_file_and_tells_what_is_said(tmp_path: Path) -> None:
    with up(tmp_path, replicas=1) as stack:
        job = _upload(stack, "ps_something.wav")
        live = await _follow(stack, job["id"], "turn.partial")
        assert live[-1]["turn"]["transcript"]
        assert _status(stack, job["id"])["status"] == "processing", "events were kept until the job was over"
        events = await _follow(stack, job["id"], "job.completed")
        _check(events, 1, _status(stack, job["id"]))
        _stop(stack)


@pytest.mark.soak
async def test_compose_survives_the_worker_that_has_the_job(tmp_path: Path) -> None:
    with up(tmp_path, replicas=2) as stack:
        assert len(stack.own["api"]) == len(stack.own["worker"]) == 2
        job = _upload(stack, "jfk.wav")
        await _follow(stack, job["id"], "turn.partial")
        (busy,) = _busy(stack)
        stack.running["worker"][busy].kill()
        events = await _follow(stack, job["id"], "job.completed")
        _check(events, 2, _status(stack, job["id"]))
        _stop(stack, killed=True)
