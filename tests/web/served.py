"""The service behind a real uvicorn on a real socket, for the tests of the edge; and what they all ask of a response."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from service.backends.assemblyai import AssemblyAI
from service.runtime import Runtime, SystemClock, open_runtime
from service.sandbox.app import run_sandbox
from service.sandbox.faults import FaultPlan
from service.sandbox.recogniser import NumberedWords
from service.settings import load_settings
from service.web.app import MODULES, create_app
from service.web.documents import make_openapi
from service.web.problems import MEDIA_TYPE, PROBLEMS
from service.web.server import HttpServer
from service.worker import start_worker
from tests.kit import KEY, scaled_limits
from tests.wavs import chunk, fmt, riff

Json = dict[str, Any]
ENDS = ("job.completed", "job.failed", "job.canceled")
UNREACHABLE = "ws://127.0.0.1:9/"


def wav(seconds: float = 0.1) -> bytes:
    """Silence; the sandbox hears a word in every 400 ms of it."""
    return riff(fmt(), chunk(b"data", bytes(int(16_000 * seconds) * 2)))


@dataclass
class Served:
    """A running service and a client of it."""

    runtime: Runtime
    server: HttpServer
    http: httpx.AsyncClient

    async def upload(self, data: bytes = wav(), **options: str) -> Json:
        """A job."""
        answer = await self.http.post("/jobs", files={"file": ("audio.wav", data)}, data=options)
        assert answer.status_code == 202, answer.text
        job: Json = answer.json()
        assert answer.headers["location"] == f"/jobs/{job['id']}"
        return job

    async def ended(self, job_id: str) -> Json:
        """The job once it has ended."""
        answer = await self.http.get(f"/jobs/{job_id}", headers={"Prefer": "wait=60"})
        while (job := answer.json())["status"] not in ("completed", "failed", "canceled"):
            answer = await self.http.get(f"/jobs/{job_id}", headers={"Prefer": "wait=60"})
        return dict(job)

    async def events(self, job_id: str, **request: Any) -> list[Json]:
        """The whole response of the stream, each frame checked against the rules of server-sent events."""
        answer = await self.http.get(f"/jobs/{job_id}/events", **request)
        assert answer.status_code == 200
        return parse(answer.text)


def parse(text: str) -> list[Json]:
    """The data of each event; what stands around it must fit it."""
    seen = []
    for frame in text.removesuffix("\n\n").split("\n\n"):
        fields = [line.partition(": ")[::2] for line in frame.split("\n")]
        names = [name for name, _ in fields]
        if "data" not in names:
            assert set(names) <= {"retry", ""}, frame
            continue
        told = dict(fields)
        event: Json = msgspec.json.decode(told["data"])
        assert names in (["event", "data"], ["id", "event", "data"])
        assert told["event"] == event["type"]
        assert told.get("id") == (str(event["id"]) if event["id"] is not None else None)
        seen.append(event)
    return seen


def refused(answer: httpx.Response, code: str) -> str:
    """The detail of a problem of that code; its form is checked."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert list(problem) == ["type", "title", "status", "code", "detail"]
    assert (problem["code"], problem["type"]) == (code, f"urn:turnwire:{code}")
    assert problem["status"] == answer.status_code == PROBLEMS[code].status
    assert problem["title"]
    assert answer.headers["x-request-id"]
    assert ("retry-after" in answer.headers) == (answer.status_code in (429, 503))
    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
    detail: str = problem["detail"]
    assert detail.endswith((".", "?", "wav"))
    return detail


_OPENAPI = make_openapi([route for module in MODULES for route in module.router.routes], keys_needed=True)
_PATHS = {path: re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))) for path in _OPENAPI["paths"]}


async def conforming(answer: httpx.Response) -> None:
    """Whatever a test asks for: an operation answers nothing that the document does not tell."""
    path = next((path for path, form in _PATHS.items() if form.fullmatch(answer.request.url.path)), "")
    operation = _OPENAPI["paths"].get(path, {}).get(answer.request.method.lower().replace("head", "get"))
    if operation is None:
        return
    told = operation["responses"].get(str(answer.status_code))
    assert told is not None, f"{answer.request.method} {path}: {answer.status_code} is not told"
    missing = [n for n, header in told["headers"].items() if header["required"] and n not in answer.headers]
    assert missing == [], path
    if answer.headers.get("content-type") == MEDIA_TYPE and answer.request.method != "HEAD":
        code = msgspec.json.decode(await answer.aread())["code"]
        content = told["content"][MEDIA_TYPE]["schema"]
        assert code in content["allOf"][1]["properties"]["code"]["enum"], f"{path}: {code} is not told"


@asynccontextmanager
async def serving(
    tmp_path: Path, *, work: bool = False, speed: float = 20.0, faults: FaultPlan | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """The service on a free port. Without `work` jobs stay queued."""
    async with AsyncExitStack() as stack:
        upstream = None
        if work:
            sandbox = await stack.enter_async_context(run_sandbox(recogniser=NumberedWords, faults=faults, speed=speed))
            client = AssemblyAI(sandbox.url, KEY, limits=scaled_limits(speed))
            upstream = await stack.enter_async_context(client)
        loaded = load_settings(
            data_dir=tmp_path / "data", upstream_url=UNREACHABLE, assemblyai_api_key=KEY, port=0, **settings
        )
        runtime = await stack.enter_async_context(open_runtime(loaded, clock=SystemClock(speed), upstream=upstream))
        if work:
            await start_worker(runtime, stack)
        server = HttpServer(runtime, create_app(runtime))
        task = asyncio.create_task(server.serve(_nothing))
        try:
            hooks = {"response": [conforming]}
            async with httpx.AsyncClient(base_url=server.url, timeout=20, trust_env=False, event_hooks=hooks) as http:
                yield Served(runtime, server, http)
        finally:
            server.stop()
            await task


async def _nothing() -> None:
    """There is nothing to stop first."""


class Raw:
    """A client that sends what it is told to and nothing else."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Made by `raw`."""
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        """Send at once."""
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next response."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        return int(head[0].split()[1]), headers, await self.reader.readexactly(int(headers.get("content-length", 0)))


@asynccontextmanager
async def raw(served: Served) -> AsyncIterator[Raw]:
    """A connection."""
    host, _, port = served.server.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def head(*headers: str, path: str = "/jobs", method: str = "POST") -> bytes:
    """The head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()
