"""Secrets, words and audio that can be recognised, through every path of a real process at DEBUG: none of it is told."""

import asyncio
import base64
import json
import sqlite3
import sys
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.sandbox import faults as f
from service.sandbox.app import run_sandbox
from service.sandbox.script import Script, ScriptedTurn
from tests.e2e.process import KEY, Service
from tests.endpoint import endpoint, status
from tests.wavs import chunk, fmt, riff

API_KEY, OTHER_KEY = "canary-api-key-7f3a91c2e5", "canary-other-key-90ab12cd"
SECRET = "whsec_Y2FuYXJ5LXdlYmhvb2stc2VjcmV0LTcxMTU="
SENTENCE = "Xylocarp quetzals marmorealize zeugmatically"
SOUND = b"CanaryAudioBytes"
ENDS = ("completed", "failed", "canceled")
BY_KEY = {"Authorization": f"Bearer {API_KEY}"}
FAULTS = f.FaultPlan({
    "2": [f.Drop(at_ms=300)],
    "4": [f.Malformed(at_ms=100), f.UnknownType(at_ms=200), f.Binary(at_ms=300), f.Close(at_ms=500, code=3005)],
    "6": [f.ErrorFrame(name="account", on="open")],
    "7": [f.Refuse(status=401)],
    "8": [f.Refuse(status=503)],
})  # fmt: skip


def audio(seconds: float = 1.0) -> bytes:
    """A WAV that says what it is."""
    return riff(fmt(), chunk(b"data", SOUND * int(seconds * 32_000 / len(SOUND))))


def forms(secret: bytes) -> set[bytes]:
    """As it may be printed: plain, in base64 (whatever stands before it), in hex."""
    encoded = {base64.b64encode(b"\0" * shift + secret)[4 if shift else 0 : -4] for shift in range(3)}
    return {secret, secret.hex().encode(), *encoded, repr(secret * 2)[2:-1].encode()}


class Visitor:
    """Goes every way there is, and keeps the body of every problem."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        """`http` has no key of its own."""
        self.http = http
        self.problems: list[bytes] = []
        self.tokens: list[str] = []

    async def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """With the key, unless other headers are given."""
        answer = await self.http.request(method, path, **{"headers": BY_KEY, **request})
        if answer.status_code >= 400:
            self.problems.append(answer.content)
        return answer

    async def job(self, **options: str) -> str:
        """A job that has ended."""
        made = await self.ask("POST", "/jobs", files={"file": ("canary.wav", audio())}, data=options)
        job_id: str = made.json()["id"]
        async with asyncio.timeout(60):
            while (await self.ask("GET", f"/jobs/{job_id}")).json()["status"] not in ENDS:
                await asyncio.sleep(0.05)
        return job_id

    async def read(self, job_id: str) -> None:
        """Everything a job leaves, by key and by token."""
        token = (await self.ask("POST", f"/jobs/{job_id}/token")).json()["token"]
        self.tokens.append(token)
        for path in ("", "/events", "/turns", "/transcript.txt", "/transcript.json", "/transcript.srt", "/audio",
                     "/peaks", "/deliveries", "/view", "/transcript.doc", "/transcript?format=doc"):  # fmt: skip
            await self.ask("GET", f"/jobs/{job_id}{path}")
            await self.ask("GET", f"/jobs/{job_id}{path}", params={"token": token}, headers={})
            await self.ask("GET", f"/jobs/{job_id}{path}", params={"token": token[:-2] + "AA"}, headers={})
            await self.ask("GET", f"/jobs/{job_id}{path}", headers={"Authorization": f"Bearer {OTHER_KEY}"})
        await self.ask("GET", f"/jobs/{job_id}/audio", headers=BY_KEY | {"Range": "bytes=0-99"})

    async def knock(self) -> None:
        """What is refused."""
        for key in (API_KEY[:-1], API_KEY + "x", SECRET):
            await self.ask("GET", "/jobs", headers={"Authorization": f"Bearer {key}"})
            await self.ask("GET", "/jobs", headers={"Authorization": f"Basic {key}"})
        for name in ("key", "api_key", "access_token", "token", "x"):
            await self.ask("GET", "/jobs", params={name: API_KEY})
        await self.ask("GET", f"/{API_KEY}?token={API_KEY}")
        for query in (SENTENCE, "Xylocarp", '"' + SENTENCE):
            await self.ask("GET", "/jobs", params={"q": query})
        await self.ask("GET", "/jobs", params={"cursor": SENTENCE, "limit": SENTENCE, "status": SENTENCE})

    async def upload_badly(self) -> None:
        """What is no upload."""
        boundary = {"Content-Type": "multipart/form-data; boundary=b"}
        part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        for body, headers in (
            (SOUND * 100, {}), (audio()[:60], {}), (audio(), {"Content-Type": "text/plain"}), (part + audio(), boundary),
            (part + SOUND * 9, boundary), (SOUND, boundary), (b"", {}),
        ):  # fmt: skip
            await self.ask("POST", "/jobs", content=body, headers=BY_KEY | headers)
        await self.ask("POST", "/jobs", params={"prompt": SENTENCE, "frobnicate": SENTENCE}, content=audio())
        await self.ask("POST", "/jobs", params={"webhook_url": f"https://u:{API_KEY}@localhost/"}, content=audio())


async def say(url: str, request: bytes) -> bytes:
    """Bytes of which some are no HTTP."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def doctor(service: Service) -> bytes:
    """What it prints."""
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/env", "-i", *(f"{name}={value}" for name, value in service.environment.items()),
        sys.executable, "-m", "service", "doctor",
        cwd=Path(__file__).parents[1], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    return (await process.communicate())[0]


def break_turns(data: Path) -> None:
    """A handler that asks for turns crashes, with SQL and its parameters in the exception."""
    with closing(sqlite3.connect(data / "turnwire.db", timeout=10)) as connection:
        connection.execute("ALTER TABLE turns RENAME TO lost")
        connection.commit()


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_nothing_of_it_is_told(tmp_path: Path, log_format: str) -> None:
    turns = [ScriptedTurn(text=SENTENCE)]
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(run_sandbox(recogniser=Script(turns), faults=FAULTS))
        hook = await stack.enter_async_context(endpoint(status(500, f"X-Echo: {SECRET}"), status(302, "Location: /")))
        service = Service(
            tmp_path / "data", sandbox.url, api_keys=f"me:{API_KEY},you:{OTHER_KEY}", webhook_secret=SECRET,
            webhook_allow="127.0.0.0/8", log_format=log_format,
        )  # fmt: skip
        stack.push_async_callback(service.kill)
        await service.start()
        visitor = Visitor(await stack.enter_async_context(service.client()))
        jobs = [await visitor.job(webhook_url=hook.url(f"/hook?secret={API_KEY}"), prompt=SENTENCE) for _ in range(6)]
        await visitor.read(jobs[0])
        await visitor.knock()
        await visitor.upload_badly()
        for job_id in jobs[:2]:
            for action in ("cancel", "retry"):
                await visitor.ask("POST", f"/jobs/{job_id}/{action}")
        told = await say(service.url, b"GET /jobs?token=" + API_KEY.encode() + b"\xff HTTP/1.1\r\n\r\n")
        told += await say(
            service.url, f"POST /jobs HTTP/1.1\r\nAuthorization: Bearer {API_KEY}\r\nHost: x y\r\n\r\n".encode()
        )
        await visitor.ask("DELETE", f"/jobs/{jobs[1]}")
        await asyncio.to_thread(break_turns, service.data)
        crashed = await visitor.ask("GET", f"/jobs/{jobs[0]}/turns")
        assert crashed.status_code >= 500
        told += (await visitor.ask("GET", "/metrics")).content + await doctor(service)
        heard = (await visitor.ask("GET", f"/jobs/{jobs[0]}/events")).text
        await service.kill()
    log = service.errors.read_bytes()
    assert SENTENCE.split()[1] in heard, "it was spoken"
    assert hook.calls
    assert log.count(b"request") > 50
    secrets = [API_KEY, OTHER_KEY, KEY, SECRET, SECRET.removeprefix("whsec_"), *visitor.tokens, *SENTENCE.split()[:3]]
    for canary in [*(secret.encode() for secret in secrets), base64.b64decode(SECRET[6:]), SOUND]:
        for form in forms(canary):
            for place, text in {"log": log, "answers": told, "problems": b"\n".join(visitor.problems)}.items():
                assert form not in text, f"{canary!r} in the {place}: {_line(text, form)!r}"
    if log_format == "json":
        _check_ids(log)


def _line(text: bytes, form: bytes) -> bytes:
    return next(line for line in text.splitlines() if form in line)[:500]


def _check_ids(log: bytes) -> None:
    """What a line is about is in it."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith(b"{")]
    requests = [line for line in lines if line["event"] in ("request", "request failed")]
    assert all("request_id" in line for line in requests)
    sessions = [line for line in lines if line["event"] in ("session began", "session left")]
    assert sessions
    assert all({"job_id", "session_id"} <= line.keys() for line in sessions)
    of_jobs = [line for line in lines if line["logger"].startswith("service.transcription")]
    assert all("job_id" in line for line in of_jobs)
