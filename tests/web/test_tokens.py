"""Job tokens: what they open, for whom and how long, and that none is told to a log."""

import base64
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest
import pytest_asyncio

from service.web.tokens import Tokens
from tests.web.served import ENDS, Served, refused, serving, wav

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
AS_ALICE, AS_BOB = {"Authorization": f"Bearer {ALICE}"}, {"Authorization": f"Bearer {BOB}"}
JOB = "0199c1d2-7e0a-7c51-9d3b-5f3f2a90c1aa"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("keyed"), work=True, api_keys=f"alice:{ALICE},bob:{BOB}") as served:
        yield served


async def a_job(served: Served) -> str:
    answer = await served.http.post("/jobs", content=wav(), headers=AS_ALICE)
    return str(answer.json()["id"])


async def token(served: Served, job_id: str, **body: object) -> str:
    answer = await served.http.post(f"/jobs/{job_id}/token", json=body, headers=AS_ALICE)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


async def test_a_token_opens_its_job(keyed: Served) -> None:
    job_id = await a_job(keyed)
    before = keyed.runtime.clock.utc_ms()
    answer = await keyed.http.post(f"/jobs/{job_id}/token", headers=AS_ALICE)
    made = answer.json()
    assert list(made) == ["token", "expires_at", "events_url"]
    assert made["events_url"] == f"/jobs/{job_id}/events?token={made['token']}"
    lives = datetime.fromisoformat(made["expires_at"]).timestamp() * 1000 - before
    assert 3_600_000 <= lives < 3_610_000
    events = await keyed.http.get(made["events_url"])
    assert events.status_code == 200
    assert any(f"event: {end}\n" in events.text for end in ENDS)
    query = {"token": made["token"]}
    document = (await keyed.http.get("/openapi.json")).json()
    opened = [path for path, operations in document["paths"].items() if "{job_id}" in path and "get" in operations]
    assert len(opened) >= 6
    for path in opened:
        url = path.replace("{job_id}", job_id).replace("{form}", "txt")
        for method in ("GET", "HEAD"):
            assert (await keyed.http.request(method, url, params=query)).status_code == 200, url


async def test_a_token_opens_nothing_else(keyed: Served) -> None:
    job_id, other = await a_job(keyed), await a_job(keyed)
    query = {"token": await token(keyed, job_id)}
    for method, path in (
        ("GET", f"/jobs/{other}"),
        ("GET", f"/jobs/{other}/events"),
        ("GET", f"/jobs/{job_id.upper()}"),
        ("GET", "/jobs"),
        ("GET", "/jobs/"),
        ("GET", "/metrics"),
        ("POST", "/jobs"),
        ("POST", f"/jobs/{job_id}/cancel"),
        ("POST", f"/jobs/{job_id}/retry"),
        ("POST", f"/jobs/{job_id}/token"),
        ("DELETE", f"/jobs/{job_id}"),
    ):
        refused(await keyed.http.request(method, path, params=query), "unauthorized")
    for headers in ({}, {"Cookie": f"token={query['token']}"}, {"Authorization": f"Bearer {query['token']}"}):
        refused(await keyed.http.get(f"/jobs/{job_id}", headers=headers), "unauthorized")
    assert (await keyed.http.get(f"/jobs/{job_id}", headers=AS_ALICE)).status_code == 200


async def test_wrong_and_ended_tokens(keyed: Served) -> None:
    job_id = await a_job(keyed)
    good = await token(keyed, job_id)
    tokens = Tokens(keyed.runtime.token_secret)
    now = keyed.runtime.clock.utc_ms()
    for wrong in (
        "",
        "x",
        "\xe9",
        good[:-4],
        good[:-1] + ("A" if good[-1] != "A" else "B"),
        "A" * len(good),
        tokens.make(job_id, now),
        tokens.make(JOB, now + 1000),
        Tokens(b"another").make(job_id, now + 60_000),
    ):
        refused(await keyed.http.get(f"/jobs/{job_id}/events", params={"token": wrong}), "unauthorized")
    refused(await keyed.http.get(f"/jobs/{job_id}?token={good}&token={good}"), "unauthorized")
    assert (await keyed.http.get(f"/jobs/{job_id}", params={"token": good})).status_code == 200


async def test_every_bit_of_a_token_counts() -> None:
    tokens = Tokens(b"s" * 32)
    raw = base64.urlsafe_b64decode(tokens.make(JOB, 1000))
    assert tokens.job_of(base64.urlsafe_b64encode(raw).decode(), 999) == JOB
    assert tokens.job_of(base64.urlsafe_b64encode(raw).decode(), 1000) is None
    for at in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[at // 8] ^= 1 << at % 8
        assert tokens.job_of(base64.urlsafe_b64encode(changed).decode(), 0) is None
    assert tokens.job_of(base64.urlsafe_b64encode(raw[:16] + raw[-32:]).decode(), 0) is None


async def test_how_long(keyed: Served) -> None:
    job_id = await a_job(keyed)
    for seconds in (60, 86_400):
        assert await token(keyed, job_id, expires_in=seconds)
    for wrong in (0, -1, 59, 86_401, 1.5, "60", True, None, [60]):
        answer = await keyed.http.post(f"/jobs/{job_id}/token", json={"expires_in": wrong}, headers=AS_ALICE)
        refused(answer, "bad_option")
    answer = await keyed.http.post(f"/jobs/{job_id}/token", json={"expires": 60}, headers=AS_ALICE)
    refused(answer, "unknown_option")
    answer = await keyed.http.post(f"/jobs/{job_id}/token", content=b"[1]", headers=AS_ALICE)
    refused(answer, "bad_request")
    refused(await keyed.http.post(f"/jobs/{job_id}/token", headers=AS_BOB), "not_found")


async def test_a_key_is_no_token(keyed: Served, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = await a_job(keyed)
    for query in (f"token={ALICE}", "key=x", "api_key=x", f"last_event_id=0&token={BOB}"):
        for headers in ({}, AS_ALICE):
            refused(await keyed.http.get(f"/jobs/{job_id}/events?{query}", headers=headers), "key_in_url")
    good = await token(keyed, job_id)
    assert (await keyed.http.get(f"/jobs/{job_id}", params={"token": good})).status_code == 200
    said = "".join(capsys.readouterr())
    assert "request" in said
    for secret in (ALICE, BOB, good):
        assert secret not in said


async def test_a_token_outlives_a_restart_unless_its_secret_is_changed(tmp_path: Path) -> None:
    keys = f"alice:{ALICE}"
    async with serving(tmp_path, api_keys=keys) as served:
        job_id = await a_job(served)
        made = await token(served, job_id)
    async with serving(tmp_path, api_keys=keys) as served:
        assert (await served.http.get(f"/jobs/{job_id}", params={"token": made})).status_code == 200
    async with serving(tmp_path, api_keys=keys, token_secret="s" * 32) as served:
        refused(await served.http.get(f"/jobs/{job_id}", params={"token": made}), "unauthorized")
        made = Tokens(b"s" * 32).make(job_id, served.runtime.clock.utc_ms() + 5000)
        assert (await served.http.get(f"/jobs/{job_id}", params={"token": made})).status_code == 200


async def test_without_keys_a_token_does_no_harm(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        job = await served.upload()
        answer = await served.http.post(f"/jobs/{job['id']}/token")
        assert answer.status_code == 200
        url = f"/jobs/{job['id']}?token={answer.json()['token']}"
        assert (await served.http.get(url)).json()["id"] == job["id"]
        assert (await served.http.get("/jobs", params={"token": answer.json()["token"]})).status_code == 200
