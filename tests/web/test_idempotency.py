"""Idempotency-Key: of several uploads with one key, one makes a job, whatever happens in between."""

import asyncio
from collections.abc import AsyncIterator
from math import inf
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from service.cli import client
from tests.kit import eventually
from tests.web.served import Served, head, raw, refused, serving, wav

pytestmark = pytest.mark.asyncio(loop_scope="module")
FILE = wav(0.5)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def idle(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("keys")) as served:
        yield served


async def post(served: Served, key: str, data: bytes = FILE, **query: str) -> httpx.Response:
    return await served.http.post("/jobs", content=data, params=query, headers={"Idempotency-Key": key})


async def count(served: Served) -> tuple[int, int]:
    """Jobs, files."""
    jobs = (await served.http.get("/jobs?limit=200")).json()["data"]
    return len(jobs), len(list((served.runtime.settings.data_dir / "audio").iterdir()))


async def test_the_same_again_is_the_job_as_it_is_now(idle: Served) -> None:
    first = await post(idle, "same", chunk_ms="200", mode="balanced")
    assert (first.status_code, first.headers.get("idempotency-replayed")) == (202, None)
    before = await count(idle)
    path = first.headers["location"]
    await idle.http.post(f"{path}/cancel")
    form = {"files": {"file": ("other name.wav", FILE)}, "data": {"mode": "balanced", "chunk_ms": "200"}}
    for again in (
        await post(idle, "same", mode="balanced", chunk_ms="200"),
        await idle.http.post("/jobs", headers={"Idempotency-Key": "same"}, **form),  # type: ignore[arg-type]
    ):
        assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
        assert again.headers["location"] == path
        assert again.json() == (await idle.http.get(path)).json()
        assert again.json()["status"] == "canceled"
    followed = await idle.http.post(
        "/jobs",
        content=FILE,
        params={"chunk_ms": "200", "mode": "balanced"},
        headers={"Idempotency-Key": "same", "Accept": "text/event-stream"},
    )
    assert (followed.status_code, followed.headers["idempotency-replayed"]) == (200, "true")
    assert "event: job.canceled" in followed.text
    assert await count(idle) == before


@pytest.mark.parametrize(
    "query", [{"mode": "balanced"}, {"metadata": '{"a":1}'}, {"filename": "x.wav"}, {"channels": "mix"}]
)
async def test_other_options_do_not_fit(idle: Served, query: dict[str, str]) -> None:
    await post(idle, "options")
    before = await count(idle)
    refused(await post(idle, "options", FILE, **query), "idempotency_mismatch")
    assert await count(idle) == before


async def test_another_file_does_not_fit(idle: Served) -> None:
    await post(idle, "file")
    before = await count(idle)
    refused(await post(idle, "file", wav(0.6)), "idempotency_mismatch")
    refused(await post(idle, "file", FILE + b"odd"), "idempotency_mismatch")
    refused(await post(idle, "file", b"ID3 no WAV at all"), "not_wav")
    assert await count(idle) == before


async def test_only_accepted_jobs_are_stored(idle: Served) -> None:
    refused(await post(idle, "refused", b"ID3 no WAV at all"), "not_wav")
    refused(await post(idle, "refused", speed="9"), "unknown_option")
    assert (await post(idle, "refused")).headers.get("idempotency-replayed") is None


async def test_deleting_the_job_frees_its_key(idle: Served) -> None:
    first = await post(idle, "freed")
    await idle.http.delete(first.headers["location"])
    second = await post(idle, "freed", mode="balanced")
    assert (second.status_code, second.headers.get("idempotency-replayed")) == (202, None)


async def test_while_the_first_is_being_received(idle: Served) -> None:
    before = await count(idle)
    async with raw(idle) as client:
        client.send(head("Idempotency-Key: slow", f"Content-Length: {len(FILE)}") + FILE[:100])
        await eventually(lambda: ("", "slow") in idle.runtime.intake.receiving)
        refused(await post(idle, "slow"), "idempotency_in_progress")
        assert (await post(idle, "another")).status_code == 202
        client.send(FILE[100:])
        assert (await client.answer())[0] == 202
    assert (await post(idle, "slow")).headers["idempotency-replayed"] == "true"
    async with raw(idle) as client:
        client.send(head("Idempotency-Key: left", f"Content-Length: {len(FILE)}") + FILE[:100])
        await eventually(lambda: ("", "left") in idle.runtime.intake.receiving)
    await eventually(lambda: not idle.runtime.intake.receiving)
    assert (await post(idle, "left")).headers.get("idempotency-replayed") is None
    assert await count(idle) == (before[0] + 3, before[1] + 3)


async def test_many_at_once_make_one_job(idle: Served) -> None:
    before = await count(idle)
    answers = await asyncio.gather(*(post(idle, "race") for _ in range(20)))
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len({answer.headers["location"] for answer in answers if answer.status_code == 202}) == 1
    assert await count(idle) == (before[0] + 1, before[1] + 1)


async def test_of_two_processes_one_makes_the_job(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither knows what the other receives; the database does."""

    async def unknown(owner: str, key: str) -> None:
        return None

    await post(idle, "cluster")
    before = await count(idle)
    monkeypatch.setattr(idle.runtime.store, "used", unknown)
    again = await post(idle, "cluster")
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
    refused(await post(idle, "cluster", mode="balanced"), "idempotency_mismatch")
    assert await count(idle) == before


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "tab\there", "ü"])
async def test_keys_out_of_form(idle: Served, key: str) -> None:
    answer = await idle.http.post("/jobs", content=FILE, headers=[(b"Idempotency-Key", key.encode())])
    assert refused(answer, "bad_option").startswith("idempotency-key")


async def test_the_longest_key(idle: Served) -> None:
    assert (await post(idle, "~" * 255)).status_code == 202


async def test_keys_outlive_the_process_and_a_full_queue_does_not_matter_to_them(tmp_path: Path) -> None:
    async with serving(tmp_path, max_queue=1) as served:
        path = (await post(served, "k")).headers["location"]
    async with serving(tmp_path, max_queue=1) as served:
        again = await post(served, "k")
        assert (again.status_code, again.headers["location"]) == (202, path)
        refused(await post(served, "l"), "queue_full")


async def test_keys_of_owners_never_meet(tmp_path: Path) -> None:
    async with serving(tmp_path, api_keys=f"a:{'a' * 16},b:{'b' * 16}") as served:
        places = []
        for owner in "ab":
            headers = {"Idempotency-Key": "k", "Authorization": f"Bearer {owner * 16}"}
            answer = await served.http.post("/jobs", content=FILE, headers=headers)
            assert (answer.status_code, answer.headers.get("idempotency-replayed")) == (202, None)
            places.append(answer.headers["location"])
        assert len(set(places)) == 2


@pytest.mark.parametrize("cut", ["in the upload", "before the answer"])
async def test_the_command_line_sends_again_what_broke(idle: Served, tmp_path: Path, cut: str) -> None:
    (file := tmp_path / "talk.wav").write_bytes(wav(30))
    port = int(idle.server.url.rpartition(":")[2])
    connections = 0

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: float) -> None:
        while most > 0 and (data := await reader.read(65536)):
            writer.write(data)
            most -= len(data)
        writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        up, down = await asyncio.open_connection("127.0.0.1", port)
        if connections > 1:
            await asyncio.gather(pipe(reader, down, inf), pipe(up, writer, inf), return_exceptions=True)
            return
        forth = asyncio.create_task(pipe(reader, down, 300_000 if cut == "in the upload" else inf))
        await (forth if cut == "in the upload" else up.readuntil(b"202"))
        forth.cancel()
        writer.transport.abort()
        down.transport.abort()

    told: list[str] = []
    proxy = await asyncio.start_server(between, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    async with client.Service(address) as service:
        job = await service.upload(file, [], lambda _done, _total: None, lambda reason, _wait: told.append(reason))
    proxy.close()
    assert [one["id"] for one in (await idle.http.get("/jobs")).json()["data"] if one["filename"] == "talk.wav"] == [
        job["id"]
    ]
    assert told
    await idle.http.delete(f"/jobs/{job['id']}")
