"""How much one caller may ask at once, and that another is not kept waiting by it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from service.web import limits
from tests.web.served import refused, serving, wav

ALICE, BOB = ({"Authorization": f"Bearer {name}-0123456789abcdef"} for name in ("alice", "bob"))
KEYS = "alice:alice-0123456789abcdef,bob:bob-0123456789abcdef"


async def test_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BURST", 3.0)
    monkeypatch.setattr(limits, "PER_SECOND", 0.5)
    async with serving(tmp_path, api_keys=KEYS) as served:
        for _ in range(3):
            assert (await served.http.get("/jobs", headers=ALICE)).status_code == 200
        answer = await served.http.get("/jobs", headers=ALICE)
        refused(answer, "rate_limited")
        assert answer.headers["retry-after"] == "2"
        assert (await served.http.get("/jobs", headers=BOB)).status_code == 200
        for _ in range(3):
            refused(await served.http.get("/jobs"), "unauthorized")
        refused(await served.http.get("/jobs"), "rate_limited")
        assert (await served.http.get("/healthz")).status_code == 200
        await asyncio.sleep(2)
        assert (await served.http.get("/jobs", headers=ALICE)).status_code == 200


async def test_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_STREAMS", 1)
    async with serving(tmp_path) as served:
        url = f"/jobs/{(await served.upload())['id']}/events"
        for _ in range(2):  # what is closed counts no more
            async with served.http.stream("GET", url) as first:
                assert first.status_code == 200
                refused(await served.http.get(url), "rate_limited")
            await asyncio.sleep(0.3)


async def test_an_upload_answered_with_events_is_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_STREAMS", 1)
    async with serving(tmp_path) as served:
        upload: dict[str, Any] = {"content": wav(), "headers": {"Accept": "text/event-stream"}}
        async with served.http.stream("POST", "/jobs", **upload) as first:
            assert first.status_code == 200
            refused(await served.http.post("/jobs", **upload), "rate_limited")
            refused(await served.http.get(f"{first.headers['location']}/events"), "rate_limited")
            assert (await served.http.post("/jobs", content=wav())).status_code == 202
        assert len((await served.http.get("/jobs")).json()["data"]) == 2, "what is refused makes no job"


async def test_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CALLERS", 10)
    known = limits.Limits()
    assert not any(known.wait_for(str(number)) for number in range(100))
    assert len(known._left) == 10


async def test_one_upload_goes_on_in_a_round_of_the_loop() -> None:
    uploads, rounds, gone_on = limits.Uploads(), 0, []

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def go_on(name: str) -> None:
        for _ in range(5):
            await uploads.turn()
            gone_on.append((rounds, name))

    counting = asyncio.create_task(count())
    await asyncio.gather(*[go_on(name) for name in "abc"])
    counting.cancel()
    assert len({at for at, _ in gone_on}) == 15
    assert [name for _, name in gone_on] == list("abc") * 5, "in turn"


async def test_uploads_rest_after_a_long_round() -> None:
    uploads, loop = limits.Uploads(), asyncio.get_running_loop()
    began = loop.time()
    turns = [asyncio.create_task(uploads.turn()) for _ in range(2)]
    await asyncio.sleep(0)  # the first has begun to wait
    time.sleep(3 * limits.LONG_ROUND)  # noqa: ASYNC251 - the round is to be long
    await asyncio.gather(*turns)
    assert loop.time() - began >= 6 * limits.LONG_ROUND
