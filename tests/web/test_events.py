"""A job's events over the wire: replay, resume, filters, both forms, and clients that behave badly."""

import asyncio
import gc
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import msgspec
import pytest
from starlette.requests import Request

from service.core.job import Event, make_event
from service.store import Record, Write
from service.web import events as web_events
from tests.kit import eventually
from tests.web.served import ENDS, Json, Served, parse, refused, serving, wav


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, work=True) as served:
        yield served


async def append(served: Served, job_id: str, count: int, size: int = 10) -> None:
    """Durable events, told to nobody."""

    def change(record: Record) -> Write:
        first = record.event_seq + 1
        body = {"code": "converted", "message": "x" * size}
        made = [make_event(job_id, seq, "job.warning", 0, body) for seq in range(first, first + count)]
        return Write(record.job, events=made)

    await served.runtime.store.amend(job_id, change)


def durable(events: list[Json]) -> list[int]:
    return [event["id"] for event in events if event["id"] is not None]


async def lines(answer: httpx.Response) -> AsyncIterator[str]:
    """Frames of a stream that goes on."""
    frame = ""
    async for text in answer.aiter_text():
        frame += text
        while "\n\n" in frame:
            whole, _, frame = frame.partition("\n\n")
            yield whole + "\n\n"


# --- the whole of it -------------------------------------------------------------------------------------------------


async def test_follow_from_the_upload_to_the_end(busy: Served) -> None:
    job = await busy.upload(wav(6))
    live = await busy.events(job["id"])
    again = await busy.events(job["id"])
    assert durable(live) == list(range(1, len(again) + 1))
    assert [event for event in live if event["id"] is not None] == again
    types = [event["type"] for event in live]
    assert types[0] == "job.status"
    assert (live[0]["status"], live[0]["stage"]) == ("queued", None)
    assert types[-1] == "job.completed"
    assert {"session.begin", "turn.partial", "turn.final", "job.progress"} <= set(types)
    assert all(list(event)[:4] == ["id", "type", "job_id", "at"] for event in live)
    assert live[-1]["job"] == (await busy.http.get(f"/jobs/{job['id']}")).json()


async def test_headers(idle: Served) -> None:
    job = await idle.upload()
    head = await idle.http.head(f"/jobs/{job['id']}/events")
    async with idle.http.stream("GET", f"/jobs/{job['id']}/events") as answer:
        frames = lines(answer)
        first = await anext(frames)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-request-id"]
        name, retry = first.split("\n")[0].split(": ")
        assert (name, 1000 <= int(retry) <= 5000) == ("retry", True)
        assert first.split("\n")[1].startswith(":")
        await frames.aclose()  # type: ignore[attr-defined]
    for name in ("content-type", "cache-control", "x-accel-buffering"):
        assert head.headers[name] == answer.headers[name]
    assert (head.status_code, head.content) == (200, b"")


async def test_resume_after_every_event(busy: Served) -> None:
    job = await busy.ended((await busy.upload(wav(4)))["id"])
    path = f"/jobs/{job['id']}/events"
    whole = await busy.events(job["id"])
    newest = len(whole)
    for after in range(newest):
        assert await busy.events(job["id"], headers={"Last-Event-ID": str(after)}) == whole[after:]
        assert await busy.events(job["id"], params={"last_event_id": after}) == whole[after:]
    both = {"headers": {"Last-Event-ID": "3"}, "params": {"last_event_id": "1"}}
    assert await busy.events(job["id"], **both) == whole[3:]  # the header wins
    assert await busy.events(job["id"], headers={"Last-Event-ID": ""}) == whole
    for method in ("GET", "HEAD"):
        answer = await busy.http.request(method, path, headers={"Last-Event-ID": str(newest)})
        assert (answer.status_code, answer.content) == (204, b"")
    for value in (str(newest + 1), "-1", "01", "1.0", "1e1", "x", "9" * 30, "1 2", "\xa7"):
        reset, *rest = await busy.events(job["id"], headers={"Last-Event-ID": value.encode("latin-1")})
        assert (reset["type"], reset["id"], reset["job_id"]) == ("stream.reset", None, job["id"])
        assert rest == whole


async def test_a_retried_job_is_replayed_past_its_first_end(idle: Served) -> None:
    job = await idle.upload()
    path = f"/jobs/{job['id']}"
    for step in ("cancel", "retry", "cancel"):
        await idle.http.post(f"{path}/{step}")
    events = await idle.events(job["id"])
    assert [event["type"] for event in events] == [
        "job.status",
        "job.canceled",
        "job.restarted",
        "job.status",
        "job.canceled",
    ]
    assert len(await idle.events(job["id"], headers={"Last-Event-ID": "2"})) == 3


@pytest.mark.parametrize(
    ("types", "kept"),
    [
        ("turn.final", {"turn.final"}),
        ("job.*", {"job.status", "job.progress"}),
        ("session.begin,turn.*", {"session.begin", "turn.partial", "turn.final", "turn.revised"}),
        ("nonsense, other.*", set[str]()),
        ("*", None),
        ("", None),
    ],
)
async def test_filters(busy: Served, types: str, kept: set[str] | None) -> None:
    job = await busy.upload(wav(4))
    seen = await busy.events(job["id"], params={"types": types})
    everything = {event["type"] for event in await busy.events(job["id"])}
    names = {event["type"] for event in seen}
    if kept is None:
        assert names >= everything
    else:
        assert names - {"job.progress", "turn.partial"} == (everything & kept | {"job.completed"}) - {
            "job.progress",
            "turn.partial",
        }
    filtered = await busy.events(job["id"], params=[("types", "a"), ("types", "b")], headers={"Last-Event-ID": "x"})
    assert [event["type"] for event in filtered] == ["stream.reset", "job.completed"]


async def test_lines_of_json(busy: Served) -> None:
    job = await busy.ended((await busy.upload(wav(2)))["id"])
    headers = {"Accept": "application/x-ndjson"}
    answer = await busy.http.get(f"/jobs/{job['id']}/events", headers=headers)
    assert answer.headers["content-type"] == "application/x-ndjson"
    told = [msgspec.json.decode(line) for line in answer.text.split("\n") if line]
    assert told == await busy.events(job["id"])


async def test_upload_and_follow_in_one(busy: Served) -> None:
    files = {"file": ("a.wav", wav(2))}
    answer = await busy.http.post("/jobs", files=files, headers={"Accept": "text/event-stream"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = parse(answer.text)
    assert events[-1]["type"] == "job.completed"
    assert answer.headers["location"] == f"/jobs/{events[0]['job_id']}"
    refused(await busy.http.post("/jobs", files={"file": b"x"}, headers={"Accept": "text/event-stream"}), "not_wav")
    answer = await busy.http.post("/jobs", files=files, headers={"Accept": "application/x-ndjson"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    async with busy.http.stream("POST", "/jobs", files=files, headers={"Accept": "text/event-stream"}) as leaving:
        job_id = leaving.headers["location"].removeprefix("/jobs/")
    assert (await busy.ended(job_id))["status"] == "completed"  # it goes on without the client


# --- clients ---------------------------------------------------------------------------------------------------------


async def test_many_followers_and_one_that_leaves(idle: Served) -> None:
    job = await idle.upload()
    tasks = [asyncio.create_task(idle.events(job["id"])) for _ in range(20)]
    async with idle.http.stream("GET", f"/jobs/{job['id']}/events") as leaving:
        await anext(lines(leaving))
    await append(idle, job["id"], 250)
    await idle.http.post(f"/jobs/{job['id']}/cancel")
    for seen in await asyncio.gather(*tasks):
        assert durable(seen) == list(range(1, 253))
    await eventually(lambda: not idle.runtime.feed._hubs)


async def test_a_stream_holds_nothing_of_the_framework(idle: Served) -> None:
    """Its frames, stacks and requests would stay for as long as the stream does."""

    def requests() -> int:
        gc.collect()
        return sum(isinstance(one, Request) for one in gc.get_objects())

    job = await idle.upload()
    before = requests()
    async with AsyncExitStack() as stack:
        for _ in range(10):
            answer = await stack.enter_async_context(idle.http.stream("GET", f"/jobs/{job['id']}/events"))
            await anext(lines(answer))
        assert requests() <= before


async def test_pings(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_events, "PING_SECONDS", 0.05)
    job = await idle.upload()
    for accept, sign in (("text/event-stream", ": ping\n\n"), ("application/x-ndjson", "\n\n")):
        async with idle.http.stream("GET", f"/jobs/{job['id']}/events", headers={"Accept": accept}) as answer:
            text = ""
            async for piece in answer.aiter_text():
                text += piece
                if text.count(sign) > 1:
                    break


async def test_a_client_that_never_reads_is_cut_and_hurts_nobody(
    idle: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(web_events, "SEND_SECONDS", 0.3)
    job = await idle.upload()
    for _ in range(4):
        await append(idle, job["id"], 250, size=10_000)
    address = ("127.0.0.1", idle.runtime.settings.port or int(idle.server.url.rpartition(":")[2]))
    deaf = []
    for _ in range(5):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.send(f"GET /jobs/{job['id']}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        deaf.append(client)
    connections = idle.server._server.server_state.connections
    await eventually(lambda: len(connections) >= 5)
    following = asyncio.create_task(idle.events(job["id"]))
    await eventually(lambda: len(connections) <= 3)  # the two that work, and one that was at rest
    await idle.http.post(f"/jobs/{job['id']}/cancel")
    assert durable(await following)[-1] == 1002
    for client in deaf:
        client.close()
    out = capsys.readouterr().out
    assert out.count("event stream cut") == 5
    assert "Traceback" not in out


async def test_the_end_of_the_process_ends_streams_cleanly(idle: Served) -> None:
    job = await idle.upload()
    sse = asyncio.create_task(idle.http.get(f"/jobs/{job['id']}/events"))
    ndjson = asyncio.create_task(idle.http.get(f"/jobs/{job['id']}/events", headers={"Accept": "application/x-ndjson"}))
    waiting = asyncio.create_task(idle.http.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=60"}))
    await asyncio.sleep(0.2)
    idle.server.stop()
    answer = await sse
    assert answer.text.count("retry: ") == 2
    assert answer.text.endswith("\n\n")
    assert durable(parse(answer.text)) == [1]
    assert (await ndjson).text.endswith("\n")
    assert (await waiting).json()["status"] == "queued"


async def test_nothing_in_a_text_can_begin_a_field(idle: Served) -> None:
    job = await idle.upload()
    evil = "a\r\nevent: job.completed\r\rdata: {}\n\n\u2028id: 9\u2029\x85\x00 end"
    events: list[Event] = [make_event(job["id"], 2, "job.warning", 0, {"code": "converted", "message": evil})]
    await idle.runtime.store.amend(job["id"], lambda record: Write(record.job, events=events))
    await idle.http.post(f"/jobs/{job['id']}/cancel")
    seen = await idle.events(job["id"])
    assert seen[1]["message"] == evil
    assert list(itertools.filterfalse(lambda event: event["type"] not in ENDS, seen)) == seen[2:]
