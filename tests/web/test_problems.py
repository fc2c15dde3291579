"""Every code of the contract has its status, every code of the source is one of them, and the framework's own errors look the same."""

import ast
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

import service
from service.core.errors import AudioMissing, Fenced, OurError, TurnwireError
from service.web.app import MODULES
from service.web.documents import make_openapi
from service.web.problems import MEDIA_TYPE, PROBLEMS, of_error
from tests.web.served import Served, raw, refused, serving

over_http = pytest.mark.asyncio(loop_scope="module")

CONTRACT = {
    400: "bad_request malformed_multipart truncated_upload bad_cursor key_in_url",
    401: "unauthorized",
    403: "forbidden_origin",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    409: "not_cancelable not_retryable idempotency_in_progress",
    410: "audio_gone",
    413: "upload_too_large",
    415: "not_wav unsupported_container unsupported_media_type",
    416: "range_not_satisfiable",
    422: "unsupported_encoding unsupported_channels unsupported_rate empty_audio missing_fmt missing_data bad_fmt truncated_header "
    "too_many_chunks too_long missing_file too_many_files unknown_option bad_option idempotency_mismatch",
    429: "queue_full rate_limited",
    500: "internal",
    503: "unavailable",
    507: "storage_full",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def idle(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("idle")) as served:
        yield served


def test_codes() -> None:
    assert {code: m.status for code, m in PROBLEMS.items()} == {
        code: n for n, codes in CONTRACT.items() for code in codes.split()
    }


def test_every_code_is_told_where_it_may_be_answered() -> None:
    document = make_openapi([route for module in MODULES for route in module.router.routes], keys_needed=True)
    told: dict[str, set[str]] = {}
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if content := answer.get("content", {}).get(MEDIA_TYPE):
                    told.setdefault(status, set()).update(content["schema"]["allOf"][1]["properties"]["code"]["enum"])
    assert "405 `method_not_allowed`" in document["info"]["description"], "of no operation"
    told["405"] = {"method_not_allowed"}
    assert told == {str(status): set(codes.split()) for status, codes in CONTRACT.items()}


def test_every_code_that_is_raised_is_known() -> None:
    raised = set(_raised())
    assert {"queue_full", "not_wav", "bad_option", "not_found", "rate_limited"} <= raised
    assert raised <= set(PROBLEMS)


def _raised() -> Iterator[str]:
    """The codes given to errors of the caller, and to answers, anywhere in the source."""
    for path in Path(service.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("CallerError", "InvalidAudio", "problem")
            ):
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    yield str(code.value)


def test_errors_that_are_none_of_the_callers_business() -> None:
    assert of_error(AudioMissing()).status_code == 410
    for error in (Fenced(), TurnwireError(), OurError()):
        assert of_error(error).status_code == 500


@over_http
@pytest.mark.parametrize(
    "path", ["/nowhere", "/jobs/", "/docs/", "/page/../app.py", "/page/", "/page/%2e%2e/app.py", "/JOBS", "/job"]
)
async def test_nowhere(idle: Served, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "PUT"):
        refused(await idle.http.request(method, path), "not_found")
    assert (await idle.http.head(path)).status_code == 404


@over_http
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/jobs", "GET, HEAD, POST"),
        ("PATCH", "/jobs/x", "DELETE, GET, HEAD"),
        ("GET", "/jobs/x/cancel", "POST"),
        ("HEAD", "/jobs/x/retry", "POST"),
        ("POST", "/jobs/x/events", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("OPTIONS", "/jobs", "GET, HEAD, POST"),
        ("TRACE", "/jobs", "GET, HEAD, POST"),
    ],
)
async def test_methods(idle: Served, method: str, path: str, allow: str) -> None:
    answer = await idle.http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    if method != "HEAD":
        refused(answer, "method_not_allowed")


@over_http
async def test_every_get_answers_head(idle: Served) -> None:
    job = await idle.upload()
    paths = ["/jobs", "/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json", "/asyncapi.json"]
    paths += [
        f"/jobs/{job['id']}{tail}" for tail in ("", "/turns", "/transcript", "/transcript.json", "/audio", "/view")
    ]
    for path in paths:
        got, head = await idle.http.get(path), await idle.http.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers.get("content-type") == got.headers["content-type"], path
        if path != "/metrics":
            assert head.headers.get("content-length") == got.headers["content-length"], path


@over_http
@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"POST /jobs HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_http(idle: Served, request_bytes: bytes) -> None:
    async with raw(idle) as client:
        client.send(request_bytes)
        status, headers, body = await client.answer()
        assert (status, headers["content-type"]) == (400, "application/problem+json")
        assert headers["x-request-id"]
        assert b'"code":"bad_request"' in body
        assert await client.reader.read() == b""
