"""Stored keys: made and revoked from the command line while the service runs, kept only as hashes."""

import asyncio
import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from service.settings import SettingsError, check_bind, load_settings
from tests.web.served import Raw, Served, head, raw, refused, serving, wav

FORM = re.compile(r"tw_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TURNWIRE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


async def keys(*arguments: str, code: int = 0) -> Result:
    result = await asyncio.to_thread(CliRunner().invoke, app, ["keys", *arguments])
    assert result.exit_code == code, result.output
    return result


async def create(name: str) -> str:
    key = (await keys("create", name)).stdout.strip()
    assert FORM.fullmatch(key)
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def until(served: Served, status: int, **request: object) -> httpx.Response:
    """What /jobs answers once it answers that; a running service has five seconds."""
    deadline = time.monotonic() + 5
    while (answer := await served.http.get("/jobs", **request)).status_code != status:  # type: ignore[arg-type]
        assert time.monotonic() < deadline, answer.text
        await asyncio.sleep(0.1)
    return answer


async def test_made_and_revoked_before_anything_was_started(data_dir: Path) -> None:
    first, second, other = await create("ci"), await create("ci"), await create("Ops.1")
    assert len({first, second, other}) == 3
    listed = [line.split("\t") for line in (await keys("ls")).stdout.splitlines()]
    assert [name for _, name, _ in listed] == ["ci", "ci", "Ops.1"]
    assert [row[0] for row in listed] == [key[3:15] for key in (first, second, other)]
    assert not FORM.search(str(listed))
    stored = (data_dir / "turnwire.db").read_bytes()
    for key in (first, second, other):
        assert key.encode() not in stored
        assert key[16:].encode() not in stored
        assert hashlib.sha256(key.encode()).digest() in stored
    await keys("revoke", first[3:15])
    assert [line.split("\t")[0] for line in (await keys("ls")).stdout.splitlines()] == [second[3:15], other[3:15]]
    await create("ci")
    assert "Revoked 2 keys" in (await keys("revoke", "ci")).stderr
    assert "no stored key" in (await keys("revoke", "ci", code=1)).stderr
    for name in ("", "a b", "a:b", "x" * 65, "ä"):
        assert "NAME" in (await keys("create", name, code=2)).stderr


async def test_while_the_service_runs(tmp_path: Path) -> None:
    async with serving(tmp_path, host="127.0.0.1") as served:
        assert (await served.http.get("/jobs")).status_code == 200
        alice, bob = await create("alice"), await create("bob")
        missing = await until(served, 401)
        refused(missing, "unauthorized")
        await until(served, 200, headers=bearer(alice))
        job = (await served.http.post("/jobs", content=wav(), headers=bearer(alice))).json()
        assert (await served.http.get(f"/jobs/{job['id']}", headers=bearer(alice))).status_code == 200
        refused(await served.http.get(f"/jobs/{job['id']}", headers=bearer(bob)), "not_found")
        for wrong in (alice[:-1], alice + "x", alice[:16] + bob[16:], bob[:16] + alice[16:], alice.upper(), alice[:15]):
            answer = await served.http.get("/jobs", headers=bearer(wrong))
            refused(answer, "unauthorized")
            assert answer.content == missing.content
        refused(await served.http.get("/jobs", params={"token": alice}), "key_in_url")
        again = await create("alice")
        await until(served, 200, headers=bearer(again))
        assert (await served.http.get(f"/jobs/{job['id']}", headers=bearer(again))).status_code == 200
        await keys("revoke", alice[3:15])
        await until(served, 401, headers=bearer(alice))
        assert (await served.http.get("/jobs", headers=bearer(again))).status_code == 200
        await keys("revoke", "alice")
        await keys("revoke", "bob")
        await until(served, 401, headers=bearer(again))
        refused(await served.http.get("/jobs"), "unauthorized")  # nobody is let in because the last key went


async def test_beside_those_of_the_settings(tmp_path: Path) -> None:
    key = await create("alice")
    async with serving(tmp_path, api_keys="alice:alice-0123456789abcdef") as served:
        job = (await served.http.post("/jobs", content=wav(), headers=bearer(key))).json()
        answer = await served.http.get(f"/jobs/{job['id']}", headers=bearer("alice-0123456789abcdef"))
        assert answer.status_code == 200
        refused(await served.http.get("/jobs"), "unauthorized")


async def test_decided_before_a_byte_of_the_body(tmp_path: Path) -> None:
    await create("alice")
    async with serving(tmp_path) as served, raw(served) as client:
        assert isinstance(client, Raw)
        client.send(head("Content-Type: audio/wav", "Content-Length: 1000000000", "Authorization: Bearer tw_"))
        status, headers, _ = await asyncio.wait_for(client.answer(), 3)  # nothing of the body was sent
        assert (status, headers["www-authenticate"], headers["connection"]) == (401, "Bearer", "close")


async def test_stored_keys_allow_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    await create("alice")
    monkeypatch.setenv("ASSEMBLYAI_API_KEY", "x" * 32)
    monkeypatch.setenv("TURNWIRE_HOST", "0.0.0.0")
    monkeypatch.setenv("TURNWIRE_UPSTREAM_URL", "ws://127.0.0.1:9/")
    doctor = await asyncio.to_thread(CliRunner().invoke, app, ["doctor"])
    assert "✓ settings" in doctor.stdout
    await keys("revoke", "alice")
    doctor = await asyncio.to_thread(CliRunner().invoke, app, ["doctor"])
    assert "without API keys only loopback" in doctor.stdout
    command = [sys.executable, "-m", "service", "serve", "--port", "0"]
    serve = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=30)
    assert serve.returncode == 2
    assert b"turnwire keys create" in serve.stderr


def test_stored_keys_and_none_contradict_each_other() -> None:
    with pytest.raises(SettingsError, match="TURNWIRE_AUTH=none contradicts stored"):
        check_bind(load_settings(auth="none"), stored_keys=True)
