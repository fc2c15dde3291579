"""Uploading over a real socket: every form that is taken, every refusal with its problem, and refusals that reach who is still sending."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from service.core.errors import StorageFull
from service.telemetry import metrics
from service.web import edge
from service.web import limits as web_limits
from tests.kit import eventually
from tests.wavs import CASES, WavCase, fmt, riff
from tests.web.served import Served, head, raw, refused, serving, wav

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("uploads"), max_upload_bytes=5_000_000) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def idle(shared: Served) -> Served:
    """Without a job."""
    for job in (await shared.http.get("/jobs?limit=200")).json()["data"]:
        await shared.http.delete(f"/jobs/{job['id']}")
    return shared


def kept(served: Served) -> list[Path]:
    return list((served.runtime.settings.data_dir / "audio").iterdir())


# --- what is taken ---------------------------------------------------------------------------------------------------


async def test_forms_of_an_upload(idle: Served) -> None:
    data = wav(0.2)
    options = {"chunk_ms": "200", "keyterms_prompt": "a,b"}
    form = await idle.http.post("/jobs", files={"file": ("n.wav", data)}, data=options)
    beside = await idle.http.post("/jobs", files={"file": ("n.wav", data)}, params=options)
    raw = await idle.http.post(
        "/jobs", content=data, params=options | {"filename": "n.wav"}, headers={"Content-Type": "audio/wav"}
    )

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 1000):
            yield data[at : at + 1000]

    chunked = await idle.http.post("/jobs", content=pieces(), params=options | {"filename": "n.wav"})
    for answer in (form, beside, raw, chunked):
        assert answer.status_code == 202
        job = answer.json()
        assert job["options"] == {"speech_model": "u3-rt-pro", "chunk_ms": 200, "keyterms_prompt": ["a,b"]}
        assert job["audio"]["sha256"] == hashlib.sha256(data).hexdigest()
        assert (job["filename"], job["audio"]["duration_ms"], job["status"]) == ("n.wav", 200, "queued")
        assert job["queue_position"] is not None
        assert (await idle.http.get(f"/jobs/{job['id']}/audio")).content == data
    assert (await idle.http.post("/jobs", content=data)).json()["filename"] == "audio.wav"


async def test_the_lines_of_the_contract(idle: Served, tmp_path: Path) -> None:
    file = tmp_path / "audio.wav"
    file.write_bytes(wav(1))
    url = f"{idle.server.url}/jobs"
    for line in (["-F", f"file=@{file}"], ["-X", "POST", "-H", "Content-Type: audio/wav", "-T", str(file)]):
        status, body = await curl(*line, url)
        assert (status, json.loads(body)["status"]) == (202, "queued")


async def curl(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "curl", "-s", "-w", "\n%{http_code}", "--max-time", "20", *arguments, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    body, _, status = out.decode().rpartition("\n")
    return int(status), body


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multipart", [True, False])
async def test_every_odd_and_broken_file(idle: Served, multipart: bool) -> None:
    async def check(case: WavCase) -> None:
        answer = await send(idle, case, multipart=multipart)
        if case.verdict == "ok":
            assert answer.status_code == 202, (case.name, answer.text)
            job = answer.json()
            assert {warning["code"] for warning in job["warnings"]} == case.warnings, case.name
            await idle.http.delete(f"/jobs/{job['id']}")
        else:
            no_body = case.name == "no bytes" and not multipart
            assert answer.json()["code"] == ("missing_file" if no_body else case.verdict), case.name
            refused(answer, answer.json()["code"])

    for start in range(0, len(CASES), 32):
        await asyncio.gather(*(check(case) for case in CASES[start : start + 32]))
    assert kept(idle) == []


async def send(served: Served, case: WavCase, *, multipart: bool) -> httpx.Response:
    params = {"channels": case.channels}
    if multipart:
        return await served.http.post("/jobs", files={"file": ("x.bin", case.build(), "text/html")}, data=params)
    return await served.http.post("/jobs", content=case.build(), params=params)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("chunk_ms=10", "bad_option"),
        ("chunk_ms=100&chunk_ms=100", "bad_option"),
        ("Chunk_ms=100", "unknown_option"),
        ("webhook_url=https://example.com", "bad_option"),
        ("metadata=[]", "bad_option"),
        ("token=x", "unknown_option"),
        ("api_key=x", "key_in_url"),
    ],
)
async def test_options(idle: Served, query: str, code: str) -> None:
    refused(await idle.http.post(f"/jobs?{query}", content=wav()), code)
    assert kept(idle) == []


async def test_an_option_in_form_and_query_is_given_twice(idle: Served) -> None:
    answer = await idle.http.post("/jobs?chunk_ms=100", files={"file": wav()}, data={"chunk_ms": "100"})
    assert "twice" in refused(answer, "bad_option")


async def test_bodies(idle: Served) -> None:
    post = idle.http.post
    refused(await post("/jobs", content=b""), "missing_file")
    refused(await post("/jobs", content=wav(), headers={"Content-Type": "text/plain"}), "unsupported_media_type")
    refused(await post("/jobs", content=wav(), headers={"Content-Encoding": "gzip"}), "unsupported_media_type")
    refused(await post("/jobs", json={}), "unsupported_media_type")
    refused(await post("/jobs", content=b"x", headers={"Content-Type": "multipart/form-data"}), "malformed_multipart")
    refused(await post("/jobs", files={"other": wav()}), "unknown_option")
    refused(await post("/jobs", files=[("file", wav()), ("file", wav())]), "too_many_files")
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    part = b"--b\r\nContent-Disposition: form-data; name="
    refused(await post("/jobs", content=part + b"chunk_ms\r\n\r\n100\r\n--b--\r\n", headers=form), "missing_file")
    refused(await post("/jobs", content=part + b"file\r\n\r\n" + wav(), headers=form), "truncated_upload")
    assert kept(idle) == []


async def test_a_full_queue(tmp_path: Path) -> None:
    async with serving(tmp_path, max_queue=1) as served:
        await served.upload()
        answer = await served.http.post("/jobs", content=wav())
        refused(answer, "queue_full")
        assert (await served.http.get("/readyz")).status_code == 200


async def test_a_full_disk(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> int:
        raise StorageFull

    monkeypatch.setattr(type(idle.runtime.blobs), "put", full)
    refused(await idle.http.post("/jobs", content=wav()), "storage_full")


# --- while it is still being sent ------------------------------------------------------------------------------------


MUCH = "Content-Length: 4000000"


async def test_refused_at_the_first_bytes(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "DRAIN_SECONDS", 0.3)
    async with raw(idle) as client:
        client.send(head(MUCH) + b"ID3\x04" + bytes(2000))
        status, headers, body = await client.answer()
        assert (status, json.loads(body)["code"], headers["connection"]) == (415, "not_wav", "close")
        client.send(bytes(100_000))  # what it was sending all the same
        assert await asyncio.wait_for(client.reader.read(), 5) == b""


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        (["Content-Length: 6000000"], 413),
        (["Content-Length: 6000000", "Expect: 100-continue"], 413),
        ([MUCH, "Content-Type: text/html"], 415),
        ([MUCH, "Origin: https://evil.example"], 403),
        ([MUCH, "Expect: 100-continue", "Content-Encoding: br"], 415),
    ],
)
async def test_refused_before_the_body(idle: Served, headers: list[str], code: int) -> None:
    async with raw(idle) as client:
        client.send(head(*headers))
        status, answered, _ = await asyncio.wait_for(client.answer(), 1)  # and no 100 before it
        assert (status, answered["connection"]) == (code, "close")


async def test_a_body_is_asked_for_when_all_is_well(idle: Served) -> None:
    data = wav()
    async with raw(idle) as client:
        client.send(head(f"Content-Length: {len(data)}", "Expect: 100-continue"))
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(data)
        assert (await client.answer())[0] == 202


@pytest.mark.parametrize("expect", [True, False])
async def test_curl_sees_why(idle: Served, tmp_path: Path, expect: bool) -> None:
    file = tmp_path / "big.mp3"
    file.write_bytes(b"ID3\x04" + bytes(4_500_000))
    extra = [] if expect else ["-H", "Expect:"]
    for line in (["-F", f"file=@{file}"], ["-T", str(file), "-X", "POST"]):
        status, body = await curl(*line, *extra, f"{idle.server.url}/jobs")
        assert (status, json.loads(body)["code"]) == (415, "not_wav")


async def test_clients_that_send_all_before_they_read_see_why(idle: Served) -> None:
    big = b"ID3\x04" + bytes(30_000_000)
    refused(await idle.http.post("/jobs", content=big), "upload_too_large")

    async def pieces() -> AsyncIterator[bytes]:
        yield riff(fmt(), size=0xFFFF_FFFF) + b"data\xff\xff\xff\xff"
        for _ in range(400):
            yield bytes(65536)

    refused(await idle.http.post("/jobs", content=pieces()), "upload_too_large")
    assert kept(idle) == []


async def test_a_stranger_is_not_listened_to_for_long(tmp_path: Path) -> None:
    async with serving(tmp_path, api_keys="me:0123456789abcdef") as served, raw(served) as client:
        client.send(head("Content-Length: 1000000000"))
        assert (await client.answer())[0] == 401
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 100_000_000:
                client.send(bytes(65536))
                await client.writer.drain()
                sent += 65536
        assert sent < 20_000_000  # what is drained, and what lies in the kernel's buffers


async def test_a_client_that_leaves_leaves_nothing(idle: Served) -> None:
    before = metrics.uploads.labels(result="disconnected")._value.get()
    async with raw(idle) as client:
        client.send(head(MUCH) + wav(1))
        await eventually(lambda: kept(idle))
    await eventually(lambda: not kept(idle))
    assert metrics.uploads.labels(result="disconnected")._value.get() == before + 1
    assert (await idle.http.get("/jobs")).json()["data"] == []


async def test_uploads_at_once_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_limits, "MAX_UPLOADS", 2)
    async with serving(tmp_path) as served, raw(served) as first, raw(served) as second, raw(served) as third:
        for client in (first, second):
            client.send(head(MUCH) + wav(4))
        third.send(head(MUCH) + wav())
        await eventually(lambda: len(kept(served)) == 3)
        refused(await served.http.post("/jobs", content=wav(4)), "rate_limited")
        assert (await served.http.post("/jobs", content=wav())).status_code == 202, "what is small fits in"
        assert (await served.http.get("/jobs")).status_code == 200
        for client in (first, third):
            client.writer.close()
        await eventually(lambda: len(kept(served)) == 2)  # the one that goes on, and the job's
        assert (await served.http.post("/jobs", content=wav())).status_code == 202
