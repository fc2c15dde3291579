"""Who may call: keys, owners, Host, Origin, CORS; every route of the document tried by everybody who may not."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from service.settings import ApiKey, Settings, load_settings
from service.web.auth import Authenticator
from service.web.edge import CONTENT_SECURITY_POLICY
from tests.web.served import Served, head, raw, refused, serving, wav

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
OPEN = [
    "/",
    "/jobs/0199c1d2-7e0a-7c51-9d3b-5f3f2a90c1aa/view",
    "/healthz",
    "/readyz",
    "/docs",
    "/openapi.json",
    "/asyncapi.json",
]
GUARDED = [
    "/jobs",
    "/jobs/x",
    "/jobs/x/events",
    "/metrics",
    "/nowhere",
    "/jobs/view",
    "/jobs/x/y/view",
    "/docs/",
    "/healthz/x",
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyless(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("keyless")) as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("keyed"), api_keys=f"alice:{ALICE},bob:{BOB}") as served:
        yield served


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_what_needs_a_key(keyed: Served) -> None:
    for path in OPEN:
        assert (await keyed.http.get(path)).status_code == 200, path
    assert (await keyed.http.get("/page/nothing.js")).status_code == 404
    answers = []
    for path in GUARDED:
        for value in (
            "",
            "Bearer wrong",
            f"Bearer {ALICE[:-1]}",
            f"Bearer {ALICE}x",
            ALICE,
            f"Basic {ALICE}",
            "Bearer",
            "Bearer \xe9",
        ):
            headers = {b"Authorization": value.encode("latin-1")} if value else {}
            answer = await keyed.http.get(path, headers=headers)
            refused(answer, "unauthorized")
            answers.append(answer.content)
    assert len(set(answers)) == 1  # missing or wrong: the same
    assert (await keyed.http.get("/jobs", headers={"authorization": f"bearer {ALICE}"})).status_code == 200
    assert (await keyed.http.get("/metrics", headers=bearer(BOB))).status_code == 200


async def test_owners_never_meet(keyed: Served) -> None:
    job = (await keyed.http.post("/jobs", content=wav(), headers=bearer(ALICE))).json()
    document = (await keyed.http.get("/openapi.json")).json()
    tried = 0
    for path, operations in document["paths"].items():
        for method in operations:
            if "{job_id}" not in path:
                continue
            url = path.replace("{job_id}", job["id"]).replace("{form}", "txt")
            refused(await keyed.http.request(method, url, headers=bearer(BOB)), "not_found")
            refused(await keyed.http.request(method, url), "unauthorized")
            never = url.replace(job["id"], "0199c1d2-7e0a-7c51-9d3b-5f3f2a90c1aa")
            refused(await keyed.http.request(method, never, headers=bearer(ALICE)), "not_found")
            tried += 1
    assert tried >= 9
    assert (await keyed.http.get("/jobs", headers=bearer(BOB))).json()["data"] == []
    assert [j["id"] for j in (await keyed.http.get("/jobs", headers=bearer(ALICE))).json()["data"]] == [job["id"]]


async def test_a_key_in_a_url(keyed: Served, capsys: pytest.CaptureFixture[str]) -> None:
    for query in (
        f"token={ALICE}",
        f"x={BOB}",
        "api_key=anything",
        "Access_Token=",
        f"a=1&b={ALICE.replace('-', '%2D')}",
    ):
        for path in ("/jobs", "/", "/docs"):
            detail = refused(await keyed.http.get(f"{path}?{query}", headers=bearer(ALICE)), "key_in_url")
            assert ALICE not in detail
    out = capsys.readouterr().out
    assert "request" in out
    assert ALICE not in out
    assert BOB not in out


async def test_every_key_is_compared(tmp_path: Path) -> None:
    settings: Settings = load_settings(api_keys=f"alice:{ALICE},bob:{BOB}", data_dir=tmp_path)
    keys: tuple[ApiKey, ...] = settings.api_keys
    authenticator = Authenticator(keys)
    assert [authenticator.owner_of(key) for key in (ALICE, BOB, "", ALICE.upper(), "\udcff")] == [
        "alice",
        "bob",
        None,
        None,
        None,
    ]
    assert ALICE.encode() not in repr(vars(authenticator)).encode()


# --- hosts and origins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "127.9.9.9:1", "[::1]:8000", "LOCALHOST"])
async def test_hosts_served_without_keys(keyless: Served, host: str) -> None:
    assert (await keyless.http.get("/jobs", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:8000",
        "localhost@evil.example",
        "",
        "10.0.0.1",
        "[::2]",
        "0.0.0.0",
        "127.0.0.1.nip.io",
    ],
)
async def test_hosts_not_served_without_keys(keyless: Served, host: str) -> None:
    for path in ("/jobs", "/", "/healthz", "/page/x.js"):
        refused(await keyless.http.get(path, headers={"Host": host}), "forbidden_origin")


async def test_two_hosts_or_none(keyless: Served) -> None:
    for headers in (["Host: evil.example"], []):
        async with raw(keyless) as client:
            whole = head(*headers, method="GET")
            client.send(whole if headers else whole.replace(b"Host: localhost\r\n", b""))
            status, _, body = await client.answer()
            assert (status, json.loads(body)["code"]) == (403, "forbidden_origin")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost:1",
        "http://localhost.evil.example",
        "file://",
        "",
        "http://localhost:8000.evil.example",
    ],
)
async def test_foreign_pages_may_not_call(keyless: Served, origin: str) -> None:
    headers = {"Origin": origin, "Host": "localhost:8000"}
    refused(await keyless.http.post("/jobs", content=wav(), headers=headers), "forbidden_origin")
    refused(await keyless.http.get("/jobs", headers=headers), "forbidden_origin")
    assert "access-control-allow-origin" not in (await keyless.http.options("/jobs", headers=headers)).headers


async def test_its_own_pages_may_call(keyless: Served) -> None:
    for host, origin in (
        ("localhost:8000", "http://localhost:8000"),
        ("localhost", "http://localhost:80"),
        ("LOCALHOST:443", "https://localhost"),
    ):
        headers = {"Origin": origin, "Host": host}
        assert (await keyless.http.post("/jobs", content=wav(), headers=headers)).status_code == 202


async def test_without_authentication(tmp_path: Path) -> None:
    async with serving(tmp_path / "a", auth="none") as served:
        assert (await served.http.get("/jobs", headers={"Host": "any.example"})).status_code == 200
        headers = {"Host": "any.example", "Origin": "https://evil.example"}
        refused(await served.http.get("/jobs", headers=headers), "forbidden_origin")
    async with serving(tmp_path / "b", auth="none", allowed_hosts="turnwire.example") as served:
        assert (await served.http.get("/jobs", headers={"Host": "Turnwire.example:443"})).status_code == 200
        assert (
            await served.http.get("/readyz", headers={"Host": "10.1.2.3:8000"})
        ).status_code == 200  # an orchestrator
        refused(await served.http.get("/jobs", headers={"Host": "other.example"}), "forbidden_origin")


async def test_a_listed_host(tmp_path: Path) -> None:
    async with serving(tmp_path, allowed_hosts="dev.example") as served:
        assert (await served.http.get("/jobs", headers={"Host": "dev.example:8000"})).status_code == 200


# --- CORS ------------------------------------------------------------------------------------------------------------


async def test_cors(tmp_path: Path) -> None:
    ours, theirs = "https://app.example", "https://app.example.evil"
    async with serving(tmp_path, api_keys=f"alice:{ALICE}", cors_origins=ours) as served:
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        answer = await served.http.options("/jobs", headers=preflight | {"Origin": ours})
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == ours
        assert "Authorization" in answer.headers["access-control-allow-headers"]
        assert "DELETE" in answer.headers["access-control-allow-methods"]
        refused(await served.http.options("/jobs", headers=preflight | {"Origin": theirs}), "unauthorized")
        for key, status in ((ALICE, 200), ("wrong", 401)):
            answer = await served.http.get("/jobs", headers=bearer(key) | {"Origin": ours})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, ours)
            assert "ETag" in answer.headers["access-control-expose-headers"]
            assert "Origin" in answer.headers["vary"]
        for headers in ({"Origin": theirs}, {}):
            answer = await served.http.get("/jobs", headers=bearer(ALICE) | headers)
            assert "access-control-allow-origin" not in answer.headers
            assert "Origin" in answer.headers["vary"]
        assert "access-control-allow-credentials" not in answer.headers


async def test_cors_is_off_unless_asked_for(keyless: Served) -> None:
    answer = await keyless.http.get("/jobs")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    refused(await keyless.http.options("/jobs"), "method_not_allowed")


# --- what every response has -----------------------------------------------------------------------------------------


async def test_request_id(keyless: Served) -> None:
    for path in ("/jobs", "/nowhere", "/", "/healthz"):
        for given in ("abc", "x" * 128, "~!@#$%^&*()"):
            assert (await keyless.http.get(path, headers={"X-Request-ID": given})).headers["x-request-id"] == given
        for given in ("x" * 129, "a b", "\xe4", ""):
            answer = await keyless.http.get(path, headers={b"X-Request-ID": given.encode("latin-1")})
            made = answer.headers["x-request-id"]
            assert made not in (given, "")
    assert (await keyless.http.get("/jobs")).headers["x-request-id"] != made


async def test_security_headers(keyless: Served) -> None:
    async def check(answer: httpx.Response) -> None:
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] in ("no-store", "no-cache")
        assert "server" not in answer.headers
        assert "set-cookie" not in answer.headers

    for path in ("/jobs", "/nowhere", "/", "/healthz", "/openapi.json"):
        await check(await keyless.http.get(path))
    await check(await keyless.http.post("/jobs", content=b"x"))
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert json.dumps(CONTENT_SECURITY_POLICY).count("'self'") >= 4
