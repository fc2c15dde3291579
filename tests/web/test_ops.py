"""Alive, ready, metrics."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.core.errors import StorageFull, Unavailable
from service.web import ops
from tests.web.served import Served, refused, serving, wav


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


async def test_alive_and_ready(idle: Served) -> None:
    assert (await idle.http.get("/healthz")).json() == {"status": "ok"}
    answer = await idle.http.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ready"
    assert list(answer.json()["checks"]) == ["database", "audio", "queue", "draining"]
    assert all(check["ok"] and check["detail"] for check in answer.json()["checks"].values())


async def test_not_ready_by_name(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CHECK_SECONDS", 0.1)

    async def full(*_: object) -> str:
        raise StorageFull("Only 1 MiB are free where the audio is kept.")

    async def broken(*_: object) -> str:
        raise RuntimeError("postgresql://user:secret@host")

    async def silent(*_: object) -> str:
        await asyncio.sleep(10)
        return ""

    async def refuse(name: str, detail: str) -> None:
        answer = await idle.http.get("/readyz")
        assert answer.status_code == 503
        bad = {part: check["detail"] for part, check in answer.json()["checks"].items() if not check["ok"]}
        assert list(bad) == [name]
        assert detail in bad[name]
        assert "secret" not in answer.text
        assert (await idle.http.get("/healthz")).status_code == 200

    with monkeypatch.context() as patch:
        patch.setattr(type(idle.runtime.blobs), "check", full)
        await refuse("audio", "1 MiB")
    with monkeypatch.context() as patch:
        patch.setattr(type(idle.runtime.store), "check", broken)
        await refuse("database", "RuntimeError")
    with monkeypatch.context() as patch:
        patch.setattr(type(idle.runtime.queue), "check", silent)
        await refuse("queue", "no answer within")
    idle.runtime.draining.set()
    await refuse("draining", "stopped")


async def test_metrics(idle: Served) -> None:
    await idle.upload()
    await idle.http.post("/jobs", content=b"nothing of the kind")
    answer = await idle.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = answer.text.splitlines()
    assert "turnwire_queue_depth 1.0" in lines
    assert any(line.startswith('turnwire_uploads_total{result="accepted"}') for line in lines)
    assert any(line.startswith('turnwire_uploads_total{result="not_wav"}') for line in lines)


async def test_a_database_that_is_away_is_503(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    job = await idle.upload()

    async def away(*_: object, **__: object) -> None:
        raise Unavailable

    monkeypatch.setattr(type(idle.runtime.store), "_read", away)
    for path in ("/jobs", f"/jobs/{job['id']}", f"/jobs/{job['id']}/events", f"/jobs/{job['id']}/transcript"):
        refused(await idle.http.get(path), "unavailable")
    refused(await idle.http.post("/jobs", content=wav()), "unavailable")
    assert (await idle.http.get("/metrics")).status_code == 200
    assert (await idle.http.get("/readyz")).json()["checks"]["database"]["ok"] is False


async def test_what_nobody_expected_is_a_500_and_one_line(
    idle: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the secret of the bug")

    monkeypatch.setattr(type(idle.runtime.store), "_read", bug)
    detail = refused(await idle.http.get("/jobs"), "internal")
    assert "secret" not in detail
    assert capsys.readouterr().out.count("request failed") == 1
