"""What the service does, told: OpenAPI for requests, AsyncAPI for events, and a page to read. FLOOR 5.

All are made from the routes and structs that serve, once, when the application is made, and served to anybody.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response
from starlette.routing import BaseRoute

from service.core.job import Job, Partial, Turn
from service.core.peaks import Peaks
from service.web.docs import DOCS_POLICY, render_docs
from service.web.jobs import JobList, TurnList
from service.web.ops import Readiness
from service.web.problems import MEDIA_TYPE, Problem
from service.web.schemas import EVENTS, Schema, components, event_schema, problem_answers, told_headers
from service.web.tokens import JobToken

_ABOUT = """\
Upload a WAV; it is streamed to AssemblyAI's Streaming API v3 at the pace it was recorded, its turns are relayed as
server-sent events while they are spoken, and kept. Every error is `application/problem+json` (RFC 9457) with a stable
`code`; every response carries `X-Request-ID`. Each GET answers HEAD; another method is a 405 `method_not_allowed` with
`Allow`, another address a 404 `not_found`."""
_STRUCTS = (Job, Turn, Partial, JobList, TurnList, Peaks, Readiness, Problem, JobToken)
_OPEN = frozenset({"/healthz", "/readyz"})
# Said before an operation is reached, or when it cannot be carried out.
_ANYWHERE = ("bad_request", "key_in_url", "forbidden_origin", "internal", "unavailable")
_BEHIND_THE_DOOR = ("unauthorized", "rate_limited")
_SECURITY = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key, where any are set"},
    "token": {
        "type": "apiKey", "in": "query", "name": "token",
        "description": "Made by `POST /jobs/{job_id}/token`, for that job, for a while",
    },
}  # fmt: skip

router = APIRouter(include_in_schema=False)


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Make the documents of these routes. Whether keys are needed may change while the service runs."""
    openapi = {needed: make_openapi(routes, keys_needed=needed) for needed in (False, True)}
    app.state.openapi = {needed: msgspec.json.encode(document) for needed, document in openapi.items()}
    app.state.asyncapi = msgspec.json.encode(make_asyncapi())
    app.state.docs = render_docs(openapi[True]).encode()


@router.get("/openapi.json")
async def openapi_json(request: Request) -> Response:
    """The requests."""
    return _kept(request.app.state.openapi[request.app.state.authenticator.needed], "application/json")


@router.get("/asyncapi.json")
async def asyncapi_json(request: Request) -> Response:
    """The events."""
    return _kept(request.app.state.asyncapi, "application/json")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """To read."""
    return _kept(request.app.state.docs, "text/html", {"Content-Security-Policy": DOCS_POLICY})


def _kept(body: bytes, media_type: str, headers: dict[str, str] | None = None) -> Response:
    return Response(body, headers={"Cache-Control": "no-cache"} | (headers or {}), media_type=media_type)


def make_openapi(routes: Sequence[BaseRoute], *, keys_needed: bool) -> dict[str, Any]:
    """https://spec.openapis.org/oas/v3.1.1.html"""
    document = get_openapi(title="Turnwire", version=version("turnwire"), description=_ABOUT, routes=routes)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation["responses"], public=path in _OPEN)
            schemes = ["key", "token"] if method == "get" and "{job_id}" in path else ["key"]
            ways: list[dict[str, list[str]]] = [{scheme: []} for scheme in schemes]
            operation["security"] = [] if path in _OPEN else ways if keys_needed else [*ways, {}]
    schemas = components(_STRUCTS)
    schemas["Job"]["examples"] = [_JOB]
    schemas["Turn"]["examples"] = [_TURN]
    document["components"] = {"schemas": schemas, "securitySchemes": _SECURITY}
    return document


def _complete(responses: dict[str, Any], *, public: bool) -> None:
    """Add what any operation may answer."""
    if MEDIA_TYPE not in responses.get("422", {}).get("content", {MEDIA_TYPE: {}}):
        del responses["422"]  # the framework's own idea of it
    for status, common in problem_answers(*_ANYWHERE, *(() if public else _BEHIND_THE_DOOR)).items():
        answer = responses.setdefault(str(status), common)
        if answer is not common:
            answer["description"] += ", " + common["description"]
            content = answer["content"].setdefault(MEDIA_TYPE, common["content"][MEDIA_TYPE])
            if content is not common["content"][MEDIA_TYPE]:
                _codes(content).extend(_codes(common["content"][MEDIA_TYPE]))
    for response in responses.values():
        response["headers"] = response.get("headers", {}) | told_headers("X-Request-ID")


def _codes(content: dict[str, Any]) -> list[str]:
    codes: list[str] = content["schema"]["allOf"][1]["properties"]["code"]["enum"]
    return codes


def make_asyncapi() -> dict[str, Any]:
    """https://www.asyncapi.com/docs/reference/specification/v3.0.0"""
    schemas = components((Job, Turn, Partial))
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Turnwire events", "version": version("turnwire"), "description": _ABOUT},
        "defaultContentType": "application/json",
        "channels": {
            "job": {
                "address": "/jobs/{id}/events",
                "description": "Server-sent events (text/event-stream), or lines of JSON (application/x-ndjson).",
                "parameters": {"id": {"description": "The job's id"}},
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in EVENTS},
            }
        },
        "operations": {
            "follow": {
                "action": "send",
                "channel": {"$ref": "#/channels/job"},
                "summary": "Everything from the start or after Last-Event-ID, then live; ends with the job.",
            }
        },
        "components": {
            "messages": {
                name: {
                    "name": name,
                    "summary": form.summary,
                    "contentType": "application/json",
                    "payload": event_schema(name),
                }
                for name, form in EVENTS.items()
            },
            "schemas": schemas,
        },
    }


# --- examples --------------------------------------------------------------------------------------------------------

_ID = "0199c1d2-7e0a-7c51-9d3b-5f3f2a90c1aa"
_JOB: Schema = {
    "id": _ID,
    "status": "processing",
    "stage": "streaming",
    "created_at": "2026-11-21T09:35:27.123Z",
    "started_at": "2026-11-21T09:35:27.180Z",
    "finished_at": None,
    "filename": "audio.wav",
    "audio": {
        "bytes": 352044,
        "sha256": "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
        "duration_ms": 11000,
        "sample_rate": 16000,
        "channels": 1,
        "encoding": "pcm_s16le",
        "converted": False,
    },
    "options": {"speech_model": "u3-rt-pro", "chunk_ms": 100},
    "progress": {"sent_ms": 4200, "total_ms": 11000},
    "queue_position": None,
    "attempt": 1,
    "sessions": [
        {
            "id": "f37d7c4e-6be9-47ed-b6fc-7600fc78e34d",
            "model": "u3-rt-pro",
            "channel": None,
            "offset_ms": 0,
            "sent_ms": 4200,
            "audio_duration_seconds": None,
            "session_duration_seconds": None,
            "closed": None,
        }
    ],
    "turn_count": 2,
    "coverage": None,
    "warnings": [],
    "error": None,
    "metadata": {},
    "links": {
        "self": f"/jobs/{_ID}",
        "events": f"/jobs/{_ID}/events",
        "transcript": f"/jobs/{_ID}/transcript",
        "audio": f"/jobs/{_ID}/audio",
        "view": f"/jobs/{_ID}/view",
    },
}
_TURN: Schema = {
    "index": 0,
    "start_ms": 480,
    "end_ms": 600,
    "transcript": "The.",
    "words": [{"text": "The.", "start_ms": 480, "end_ms": 600, "confidence": 0.98, "speaker": None}],
    "formatted": True,
    "session_id": "f37d7c4e-6be9-47ed-b6fc-7600fc78e34d",
    "turn_order": 0,
    "end_of_turn_confidence": 1.0,
    "language": None,
    "speaker": None,
    "channel": None,
    "latency_ms": 640,
}
