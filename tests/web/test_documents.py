"""OpenAPI, AsyncAPI, the readable docs and the page: complete, true of real output, and without anything from elsewhere."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.core import options
from service.core.errors import CallerError
from service.sandbox import faults as f
from service.web.schemas import EVENTS, OPTIONS
from tests.web.served import Json, Served, refused, serving, wav

UPS_AND_DOWNS = f.FaultPlan({"1": [f.Drop(at_ms=3500)]})


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


# --- a JSON Schema validator, of the keywords that are used -----------------------------------------------------------

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
SIMPLE: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda value, told: isinstance(value, TYPES[told]) and (told == "boolean") >= isinstance(value, bool),
    "enum": lambda value, told: value in told,
    "const": lambda value, told: bool(value == told),
    "minimum": lambda value, told: bool(value >= told),
    "minItems": lambda value, told: len(value) >= told,
    "maxItems": lambda value, told: len(value) <= told,
    "required": lambda value, told: set(told) <= set(value),
} | dict.fromkeys(("title", "description", "examples", "default", "format"), lambda value, told: True)


def check(value: Any, schema: Json, document: Json, where: str = "$") -> None:
    """Raise AssertionError where `value` does not fit, or the schema says what this does not understand."""
    for keyword, told in schema.items():
        if keyword in SIMPLE:
            assert SIMPLE[keyword](value, told), f"{where}: {value!r} is not of {keyword} {told}"
        elif keyword == "$ref":
            check(value, resolve(told, document), document, where)
        elif keyword == "anyOf":
            assert any(fits(value, choice, document) for choice in told), f"{where}: {value!r} fits none"
        else:
            for name, member, part in members(keyword, value, told):
                check(member, part, document, f"{where}.{name}")
    if "properties" in schema and "additionalProperties" not in schema:
        assert set(value) <= set(schema["properties"]), f"{where}: {set(value) - set(schema['properties'])} is not told"


def members(keyword: str, value: Any, told: Json) -> Iterator[tuple[str, Any, Json]]:
    match keyword:
        case "properties":
            yield from ((name, value[name], part) for name, part in told.items() if name in value)
        case "additionalProperties":
            yield from ((name, member, told) for name, member in value.items())
        case "items":
            yield from ((str(number), item, told) for number, item in enumerate(value))
        case _:
            raise AssertionError(f"the keyword {keyword} is not understood here")


def fits(value: Any, schema: Json, document: Json) -> bool:
    try:
        check(value, schema, document)
    except AssertionError:
        return False
    return True


def resolve(pointer: str, document: Json) -> Json:
    found: Any = document
    for part in pointer.removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from refs(value)


# --- OpenAPI ---------------------------------------------------------------------------------------------------------


async def test_openapi_is_whole(idle: Served) -> None:
    document = (await idle.http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    for pointer in refs(document):
        resolve(pointer, document)
    ids = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            ids.add(operation["operationId"])
            assert {"403", "500", "503"} <= set(operation["responses"]), where
            assert ("401" in operation["responses"]) == bool(operation["security"]), where
            for status, answer in operation["responses"].items():
                assert answer["description"], where
                if int(status) >= 400 and not (path == "/readyz" and status == "503"):
                    assert list(answer["content"]) == ["application/problem+json"], f"{where} {status}"
    assert len(ids) == sum(len(operations) for operations in document["paths"].values())
    promised = ["/jobs", "/jobs/{job_id}", "/jobs/{job_id}/events", "/jobs/{job_id}/turns", "/jobs/{job_id}/transcript", "/jobs/{job_id}/audio",
                "/jobs/{job_id}/peaks", "/jobs/{job_id}/cancel", "/jobs/{job_id}/retry", "/healthz", "/readyz", "/metrics"]  # fmt: skip
    assert set(promised) <= set(document["paths"])
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    for schema in (schemas["Job"], schemas["Turn"]):
        check(schema["examples"][0], schema, document)


def test_options_are_those_that_are_checked() -> None:
    assert set(OPTIONS) == set(options.NAMES)
    for name, schema in OPTIONS.items():
        fit = [
            *schema.get("enum", ()),
            *(schema[bound] for bound in ("minimum", "maximum", "default") if bound in schema),
        ]
        fit += ["true", "false"] if schema.get("type") == "boolean" else []
        beyond = [schema["minimum"] - 1] if "minimum" in schema else []
        beyond += [schema["maximum"] + 1] if "maximum" in schema else []
        beyond += ["something else"] if "enum" in schema or schema.get("type") == "boolean" else []
        for value in fit:
            options.parse_options([(name, str(value))], default_model="m", webhooks_enabled=True)
        for value in beyond:
            with pytest.raises(CallerError):
                options.parse_options([(name, str(value))], default_model="m", webhooks_enabled=True)


async def test_real_output_is_what_is_told(tmp_path: Path) -> None:
    async with serving(tmp_path, work=True, speed=10, faults=UPS_AND_DOWNS) as served:
        openapi = (await served.http.get("/openapi.json")).json()
        asyncapi = (await served.http.get("/asyncapi.json")).json()

        def of(name: str) -> Json:
            return {"$ref": f"#/components/schemas/{name}"}

        job = await served.upload(wav(8) + b"odd")
        check(job, of("Job"), openapi)
        seen = await served.events(job["id"], headers={"Last-Event-ID": "x"})
        await served.http.post(f"/jobs/{job['id']}/retry")
        for event in seen:
            message = asyncapi["components"]["messages"][event["type"]]
            assert message["name"] == event["type"]
            check(event, message["payload"], asyncapi)
        assert {
            "stream.reset",
            "session.lost",
            "turn.final",
            "turn.partial",
            "job.progress",
            "job.warning",
            "job.completed",
        } <= {event["type"] for event in seen}
        check((await served.http.get(f"/jobs/{job['id']}")).json(), of("Job"), openapi)
        check((await served.http.get("/jobs")).json(), of("JobList"), openapi)
        check((await served.http.get(f"/jobs/{job['id']}/turns")).json(), of("TurnList"), openapi)
        check((await served.http.get(f"/jobs/{job['id']}/peaks")).json(), of("Peaks"), openapi)
        check((await served.http.get("/readyz")).json(), of("Readiness"), openapi)
        check((await served.http.get("/nowhere")).json(), of("Problem"), openapi)


# --- AsyncAPI --------------------------------------------------------------------------------------------------------


async def test_asyncapi_is_whole(idle: Served) -> None:
    document = (await idle.http.get("/asyncapi.json")).json()
    assert document["asyncapi"] == "3.0.0"
    for pointer in refs(document):
        resolve(pointer, document)
    assert set(document["components"]["messages"]) == set(document["channels"]["job"]["messages"]) == set(EVENTS)
    assert not {"error", "open", "message"} & set(EVENTS)
    told = {name for name, form in EVENTS.items() if form.durable}
    assert told == {name for name in EVENTS if name not in ("job.progress", "turn.partial", "stream.reset")}


# --- to read ---------------------------------------------------------------------------------------------------------


async def test_docs_stand_alone(idle: Served) -> None:
    answer = await idle.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = answer.text
    for word in ("<script", "http://", "https://", "src=", "@import", "url(", " style="):
        assert word not in page, word
    assert not re.search(r"<[^>]*\son[a-z]+=", page)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    for word in ("/jobs/{job_id}/events", "keyterms_prompt", "queue_full", "coverage", "POST", "DELETE"):
        assert word in page, word
    assert len(answer.content) < 150_000


async def test_the_page_and_its_files(idle: Served) -> None:
    answer = await idle.http.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["cache-control"] == "no-cache"
    same = await idle.http.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    view = await idle.http.get("/jobs/0199c1d2-7e0a-7c51-9d3b-5f3f2a90c1aa/view")
    assert view.content == answer.content
    refused(await idle.http.get("/jobs/x/view"), "not_found")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|https?://", answer.text)
    wanted = re.findall(r'(?:src|href)="(/page/[^"]+)"', answer.text)
    assert wanted
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for path in {*wanted, *(f"/page/{name}" for name in served_modules())}:
        file = await idle.http.get(path)
        assert (file.status_code, file.headers["content-type"]) == (200, kinds[path.rpartition(".")[2]]), path
    for path in ("/page/index.py", "/page/..%2fapp.py", "/page/%2fetc%2fpasswd", "/page/nothing.js", "/page/page.js/"):
        refused(await idle.http.get(path), "not_found")


def served_modules() -> Iterator[str]:
    import service.web

    yield from (path.name for path in (Path(service.web.__file__).parent / "page").glob("*.js"))
