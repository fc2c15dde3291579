"""Looking at jobs, waiting for them, listing, canceling, retrying, deleting."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from service.core.job import Notice, make_event
from service.sandbox import faults as f
from service.store import Record, Write
from tests.kit import eventually
from tests.web.served import Served, head, raw, refused, serving, wav

REFUSING = f.FaultPlan({"1": [f.ErrorFrame(name="account", on="open")]})


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("jobs")) as served:
        yield served


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, work=True) as served:
        yield served


async def warn(served: Served, job_id: str) -> None:
    """One event more, the status as it is."""

    def change(record: Record) -> Write:
        record.job.warnings.append(Notice("converted", "odd"))
        body = {"code": "converted", "message": "odd"}
        return Write(record.job, events=[make_event(job_id, record.event_seq + 1, "job.warning", 0, body)])

    await served.runtime.store.amend(job_id, change)
    await served.runtime.intake.tell_newest(job_id)


# --- one job ---------------------------------------------------------------------------------------------------------


async def test_a_job_as_the_contract_shows_it(busy: Served) -> None:
    job = await busy.upload(wav(2), format_turns="true", metadata='{"a": [1, "ü"]}', chunk_ms="50")
    assert list(job) == [
        "id", "status", "stage", "created_at", "started_at", "finished_at", "filename", "audio", "options", "progress", "queue_position",
        "attempt", "sessions", "turn_count", "coverage", "warnings", "error", "metadata", "links",
    ]  # fmt: skip
    assert uuid.UUID(job["id"]).version == 7
    assert job["options"] == {"speech_model": "u3-rt-pro", "format_turns": True, "chunk_ms": 50}
    assert job["metadata"] == {"a": [1, "ü"]}
    job = await busy.ended(job["id"])
    assert (job["status"], job["error"], job["coverage"]["complete"]) == ("completed", None, True)
    assert job["turn_count"] >= 1
    assert job["sessions"][0]["model"] == "sandbox"
    for path in (job["links"][name] for name in ("self", "events", "transcript", "audio", "view")):
        assert (await busy.http.get(path)).status_code == 200
    turns = (await busy.http.get(f"/jobs/{job['id']}/turns")).json()
    assert [turn["index"] for turn in turns["data"]] == list(range(job["turn_count"]))
    assert turns["has_more"] is False


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "job_id",
    ["x", "0199c1d2-7e0a-7c51-9d3b-5f3f2a90c1aa", "0199C1D2-7E0A-7C51-9D3B-5F3F2A90C1AA", "%00", "%F0%9F%92%A9"],
)
async def test_what_is_not_there(shared: Served, job_id: str) -> None:
    tails = ["", "/events", "/turns", "/transcript", "/transcript.srt", "/audio"]
    for tail in tails:
        refused(await shared.http.get(f"/jobs/{job_id}{tail}"), "not_found")
    for tail in ("/cancel", "/retry"):
        refused(await shared.http.post(f"/jobs/{job_id}{tail}"), "not_found")
    refused(await shared.http.delete(f"/jobs/{job_id}"), "not_found")


async def test_etag(idle: Served) -> None:
    job = await idle.upload()
    path = f"/jobs/{job['id']}"
    first = await idle.http.get(path)
    assert (first.headers["etag"], first.json()) == ('W/"1"', job)
    for value in ('W/"1"', '"1"', 'W/"0", W/"1"', "*"):
        answer = await idle.http.get(path, headers={"If-None-Match": value})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", 'W/"1"')
    for value in ('W/"2"', '"x"', ""):
        assert (await idle.http.get(path, headers={"If-None-Match": value})).status_code == 200
    head = await idle.http.head(path)
    assert head.content == b""
    assert {n: v for n, v in head.headers.items() if n not in ("x-request-id", "date")} == {
        n: v for n, v in first.headers.items() if n not in ("x-request-id", "date")
    }


async def waited(served: Served, path: str, prefer: str, etag: str | None = None) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    headers = {"Prefer": prefer} | ({"If-None-Match": etag} if etag else {})
    answer = await served.http.get(path, headers=headers)
    return answer, (time.monotonic() - began) * 20  # of the service's clock


async def test_wait_for_a_status(idle: Served) -> None:
    job = await idle.upload()
    path = f"/jobs/{job['id']}"
    answer, seconds = await waited(idle, path, "wait=3")
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=3")
    assert 3 <= seconds < 30
    waiting = asyncio.create_task(waited(idle, path, "respond-async, wait=600; x=1"))
    await asyncio.sleep(0.1)
    await warn(idle, job["id"])
    await asyncio.sleep(0.1)
    assert not waiting.done()  # an event is no other status
    assert (await idle.http.post(f"{path}/cancel")).json()["status"] == "canceled"
    answer, _ = await waiting
    assert (answer.json()["status"], answer.headers["preference-applied"]) == ("canceled", "wait=60")
    answer, seconds = await waited(idle, path, "wait=60")  # terminal: at once
    assert seconds < 20
    for nonsense in ("wait=-1", "wait=x", "await=5", "wait"):
        answer, _ = await waited(idle, path, nonsense)
        assert "preference-applied" not in answer.headers


async def test_who_leaves_is_not_waited_for(tmp_path: Path) -> None:
    async with serving(tmp_path, speed=1) as served:
        job = await served.upload()
        async with raw(served) as client:
            client.send(head("Prefer: wait=60", path=f"/jobs/{job['id']}", method="GET"))
            await eventually(lambda: served.runtime.feed._hubs)
        await eventually(lambda: not served.runtime.feed._hubs, 30)  # half of what was asked for


async def test_wait_for_an_event(idle: Served) -> None:
    job = await idle.upload()
    path = f"/jobs/{job['id']}"
    answer, seconds = await waited(idle, path, "wait=2", 'W/"1"')
    assert (answer.status_code, answer.headers["preference-applied"]) == (304, "wait=2")
    assert seconds >= 2
    waiting = asyncio.create_task(waited(idle, path, "wait=60", 'W/"1"'))
    await asyncio.sleep(0.1)
    await warn(idle, job["id"])
    answer, _ = await waiting
    assert (answer.status_code, answer.headers["etag"]) == (200, 'W/"2"')
    answer, seconds = await waited(idle, path, "wait=60", 'W/"1"')  # news already
    assert (answer.status_code, seconds < 20) == (200, True)
    waiting = asyncio.create_task(waited(idle, path, "wait=60", 'W/"2"'))
    await asyncio.sleep(0.1)
    await idle.http.delete(path)
    refused((await waiting)[0], "not_found")


# --- listing ---------------------------------------------------------------------------------------------------------


async def test_listing(idle: Served) -> None:
    names = ["board-call.wav", "Interview ÄÖ.wav", "100%_sure.wav", "stand-up.wav", "x.wav"]
    jobs = [await idle.upload(filename=name) for name in names]
    await idle.http.post(f"/jobs/{jobs[0]['id']}/cancel")
    newest_first = [job["id"] for job in reversed(jobs)]

    async def ids(query: str) -> list[str]:
        answer = await idle.http.get(f"/jobs?{query}")
        assert answer.status_code == 200
        return [job["id"] for job in answer.json()["data"]]

    whole = (await idle.http.get("/jobs")).json()
    assert (whole["has_more"], whole["next_cursor"]) == (False, None)
    assert [job["id"] for job in whole["data"]] == newest_first
    assert [job["queue_position"] for job in whole["data"]] == [4, 3, 2, 1, None]
    assert whole["data"][0] == (await idle.http.get(f"/jobs/{newest_first[0]}")).json()

    seen: list[str] = []
    url = "/jobs?limit=2&status=queued&status=canceled"
    while url:
        page = await idle.http.get(url)
        seen += [job["id"] for job in page.json()["data"]]
        link = re.fullmatch(r'<(/jobs\?.*)>; rel="next"', page.headers.get("link", ""))
        assert (link is not None) == page.json()["has_more"]
        url = link[1] if link else ""
        assert page.json()["next_cursor"] is None or page.json()["next_cursor"] in url
    assert seen == newest_first

    assert await ids("status=canceled") == [jobs[0]["id"]]
    assert await ids("q=STAND") == [jobs[3]["id"]]
    assert await ids("q=100%25_") == [jobs[2]["id"]]
    assert await ids("q=%C3%84%C3%B6+interview") == [jobs[1]["id"]]
    assert await ids("q=wav&limit=3") == newest_first[:3]
    assert await ids("q=zzz") == await ids("q=%25") == await ids("q=stan") == []
    created = jobs[2]["created_at"]
    assert await ids(f"created_after={created}") == newest_first[:3]
    assert await ids(f"created_before={created}") == newest_first[3:]
    assert await ids("created_after=2100-01-01T00:00:00Z") == []


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "limit=x", "status=open", "created_after=yesterday", f"q={'x' * 256}"]
)
async def test_listing_refuses(shared: Served, query: str) -> None:
    assert refused(await shared.http.get(f"/jobs?{query}"), "bad_option").startswith(query.partition("=")[0])


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("cursor", ["x", "%00", "MTIz", "Li4u", "MTIzLi4vLi4", "A" * 5000, "=", "MTIzNA=="])
async def test_a_foreign_cursor(shared: Served, cursor: str) -> None:
    refused(await shared.http.get(f"/jobs?cursor={cursor}"), "bad_cursor")


async def test_turns_page_by_page(busy: Served) -> None:
    job = await busy.ended((await busy.upload(wav(8)))["id"])
    path = f"/jobs/{job['id']}/turns"
    assert job["turn_count"] >= 2
    seen: list[int] = []
    more = True
    while more:
        page = (await busy.http.get(f"{path}?limit=1&after={seen[-1] if seen else -1}")).json()
        seen += [turn["index"] for turn in page["data"]]
        more = page["has_more"]
    assert seen == list(range(job["turn_count"]))
    for query in ("limit=0", "limit=1001", "after=x"):
        refused(await busy.http.get(f"{path}?{query}"), "bad_option")


# --- changing --------------------------------------------------------------------------------------------------------


async def test_cancel_a_queued_job(idle: Served) -> None:
    path = f"/jobs/{(await idle.upload())['id']}"
    first, second = [await idle.http.post(f"{path}/cancel") for _ in range(2)]
    assert [(answer.status_code, answer.json()["status"]) for answer in (first, second)] == [
        (202, "canceled"),
        (200, "canceled"),
    ]


async def test_cancel_a_running_job_and_run_it_again(busy: Served) -> None:
    path = f"/jobs/{(await busy.upload(wav(60)))['id']}"
    etag = 'W/"1"'
    while not (job := (await busy.http.get(path, headers={"Prefer": "wait=20", "If-None-Match": etag})).json())[
        "turn_count"
    ]:
        etag = f'W/"{await busy.runtime.store.newest_seq(job["id"])}"'
    first, second = [await busy.http.post(f"{path}/cancel") for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 200)
    job = await busy.ended(job["id"])
    assert (job["status"], job["turn_count"] > 0, job["coverage"]["complete"]) == ("canceled", True, False)
    kept = job["turn_count"]
    retried = await busy.http.post(f"{path}/retry")
    assert (retried.status_code, retried.json()["status"], retried.json()["turn_count"]) == (202, "queued", kept)
    await busy.http.post(f"{path}/cancel")
    job = await busy.ended(job["id"])
    retried = await busy.http.post(f"{path}/retry", json={"from": "start"})
    assert (retried.status_code, retried.json()["turn_count"]) == (202, 0)


async def test_an_ended_job_cannot_be_canceled_nor_a_complete_one_retried(busy: Served) -> None:
    job = await busy.ended((await busy.upload(wav(1)))["id"])
    refused(await busy.http.post(f"/jobs/{job['id']}/cancel"), "not_cancelable")
    refused(await busy.http.post(f"/jobs/{job['id']}/retry"), "not_retryable")


async def test_retry_a_failed_job(tmp_path: Path) -> None:
    async with serving(tmp_path, work=True, faults=REFUSING) as served:
        job = await served.ended((await served.upload(wav(1)))["id"])
        assert (job["status"], job["error"]["code"]) == ("failed", "upstream_auth")
        refused(await served.http.post(f"/jobs/{job['id']}/cancel"), "not_cancelable")
        path = f"/jobs/{job['id']}/retry"
        for body, code in (("[]", "bad_request"), ("{", "bad_request"), ("x" * 20_000, "bad_request"),
                           ('{"form": "start"}', "unknown_option"), ('{"from": "end"}', "bad_option")):  # fmt: skip
            refused(await served.http.post(path, content=body), code)
        assert (await served.http.post(path)).status_code == 202
        assert (await served.ended(job["id"]))["status"] == "completed"


async def test_retry_without_audio(idle: Served) -> None:
    job = await idle.upload()
    refused(await idle.http.post(f"/jobs/{job['id']}/retry"), "not_retryable")
    await idle.http.post(f"/jobs/{job['id']}/cancel")
    await idle.runtime.blobs.delete(job["id"])
    refused(await idle.http.post(f"/jobs/{job['id']}/retry"), "audio_gone")


async def test_delete(busy: Served, tmp_path: Path) -> None:
    job = await busy.upload(wav(60))
    following = asyncio.create_task(busy.events(job["id"]))
    await asyncio.sleep(0.3)
    answer = await busy.http.delete(f"/jobs/{job['id']}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert (await following)[-1]["type"] not in ("job.completed", "job.canceled")  # the stream just ends
    for path in ("", "/events", "/transcript", "/audio"):
        refused(await busy.http.get(f"/jobs/{job['id']}{path}"), "not_found")
    refused(await busy.http.delete(f"/jobs/{job['id']}"), "not_found")
    assert list((tmp_path / "data" / "audio").iterdir()) == []
