"""The JSON of the HTTP side as JSON Schema: components, options, events. FLOOR 5.

What core encodes is described by msgspec from the very structs it encodes, so the two cannot drift; only what has
no struct (options, which are text on the wire, and the payloads of events) is written down here. A test validates
real output against all of it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from service.core.job import Stage
from service.web.problems import MEDIA_TYPE, PROBLEMS

Schema = dict[str, Any]
REF = "#/components/schemas/{name}"


def ref(name: str) -> Schema:
    """A component by name."""
    return {"$ref": REF.format(name=name)}


def components(structs: Iterable[type[msgspec.Struct]]) -> dict[str, Schema]:
    """Schemas of the structs and of all they hold. Whatever is encoded is always there, so every member is required."""
    _, schemas = msgspec.json.schema_components(structs, ref_template=REF)
    for schema in schemas.values():
        if "properties" in schema:
            schema["required"] = list(schema["properties"])
            for member in schema["properties"].values():
                member.pop("default", None)
    schemas["Stage"] = {"title": "Stage", "type": "string", "examples": [stage.value for stage in Stage],
                        "description": "What a processing job is doing; more may come."}  # fmt: skip
    return schemas


REFUSED_AUDIO = (
    "not_wav", "unsupported_container", "unsupported_media_type", "unsupported_encoding", "unsupported_channels",
    "unsupported_rate", "empty_audio", "missing_fmt", "missing_data", "bad_fmt", "truncated_header", "too_many_chunks",
    "too_long",
)  # fmt: skip


# --- answers ---------------------------------------------------------------------------------------------------------


def json_answer(
    description: str, name: str, headers: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A response whose body is that component; `headers` it always has, `optional` ones it may have."""
    return {
        "description": description,
        "headers": told_headers(*headers) | told_headers(*optional, required=False),
        "content": {"application/json": {"schema": ref(name)}},
    }


def told_headers(*names: str, required: bool = True) -> dict[str, Schema]:
    """Headers of a response."""
    return {name: {"required": required, "schema": {"type": "string"}} for name in names}


def problem_answers(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The responses that are problems of these codes, by status."""
    statuses = sorted({PROBLEMS[code].status for code in codes})
    return {status: problem_answer([code for code in codes if PROBLEMS[code].status == status]) for status in statuses}


def problem_answer(codes: list[str]) -> dict[str, Any]:
    """One response that is a problem."""
    meaning = PROBLEMS[codes[0]]
    always = ["Retry-After"] * (meaning.retry_after is not None) + ["WWW-Authenticate"] * (meaning.status == 401)
    return {
        "description": ", ".join(f"`{code}`" for code in codes),
        "headers": told_headers(*always),
        "content": {MEDIA_TYPE: {"schema": {"allOf": [ref("Problem"), {"properties": {"code": {"enum": codes}}}]}}},
    }


# --- options of an upload --------------------------------------------------------------------------------------------

_FLAG = {"type": "boolean"}
_FRACTION = {"type": "number", "minimum": 0, "maximum": 1}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _names(**item: Any) -> Schema:  # noqa: ANN401 - schema keywords
    return {"type": "array", "items": {"type": "string", **item}}


OPTIONS: dict[str, Schema] = {
    "speech_model": {"type": "string", "pattern": "^[a-z0-9._-]{1,64}$", "examples": ["u3-rt-pro"]},
    "format_turns": _FLAG,
    "prompt": {"type": "string", "maxLength": 1750},
    "language_detection": _FLAG,
    "speaker_labels": _FLAG,
    "max_speakers": _whole(1, 10),
    "min_turn_silence": {**_whole(50, 10_000), "description": "ms"},
    "max_turn_silence": {"type": "integer", "minimum": 0, "description": "ms"},
    "end_of_turn_confidence_threshold": _FRACTION,
    "vad_threshold": _FRACTION,
    "mode": {"enum": ["min_latency", "balanced", "max_accuracy"]},
    "domain": {"enum": ["medical-v1"]},
    "filter_profanity": _FLAG,
    "redact_pii": _FLAG,
    "redact_pii_sub": {"enum": ["hash", "entity_name"]},
    "continuous_partials": _FLAG,
    "include_partial_turns": _FLAG,
    "voice_focus": {"enum": ["near-field", "far-field"]},
    "keyterms_prompt": {**_names(maxLength=50), "maxItems": 100},
    "language_codes": {**_names(), "maxItems": 10},
    "redact_pii_policies": _names(),
    "channels": {
        "enum": ["reject", "mix", "first", "split"],
        "default": "reject",
        "description": "What to do with more than one channel; split transcribes each on its own",
    },
    "chunk_ms": {**_whole(50, 1000), "default": 100},
    "filename": {"type": "string", "maxLength": 255, "description": "For a raw body"},
    "metadata": {
        "type": "string",
        "contentMediaType": "application/json",
        "description": "A JSON object of at most 4 KB, returned as given",
    },
    "webhook_url": {"type": "string", "format": "uri"},
    "webhook_events": _names(enum=["job.completed", "job.failed", "job.canceled"]),
}
_FILE = {"type": "string", "format": "binary"}
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": _FILE, **OPTIONS}, "required": ["file"]}
            },
            "audio/wav": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
        },
    },
    "parameters": [
        {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "See the form field")}
        for name, schema in OPTIONS.items()
    ],
}


# --- events ----------------------------------------------------------------------------------------------------------


class EventForm(NamedTuple):
    """One type of event: whether it is durable (has an id), what it tells, and its members beside those of all."""

    durable: bool
    summary: str
    members: Mapping[str, Schema]


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT, _INTEGER = {"type": "string"}, {"type": "integer"}
_TURN, _JOB = {"turn": ref("Turn")}, {"job": ref("Job")}

EVENTS: dict[str, EventForm] = {
    "job.status": EventForm(
        True, "Another status or stage", {"status": ref("Status"), "stage": _or_null(ref("Stage"))}
    ),
    "job.progress": EventForm(
        False, "About once a second; never goes back", {"sent_ms": _INTEGER, "total_ms": _INTEGER}
    ),
    "session.begin": EventForm(
        True,
        "AssemblyAI began a session",
        {"session_id": _TEXT, "model": _or_null(_TEXT), "offset_ms": _INTEGER, "channel": _or_null(_INTEGER)},
    ),
    "session.lost": EventForm(
        True,
        "A session ended unasked; open partials are void",
        {
            "session_id": _or_null(_TEXT),
            "code": _or_null(_INTEGER),
            "reason": _TEXT,
            "retry_in_ms": _or_null(_INTEGER),
        },
    ),
    "turn.partial": EventForm(False, "The open turn so far", {"turn": ref("Partial")}),
    "turn.final": EventForm(True, "A turn ended", _TURN),
    "turn.revised": EventForm(True, "A final turn changed: formatted, or with other speakers", _TURN),
    "job.restarted": EventForm(True, "Turns from this index on are withdrawn", {"from_turn": _INTEGER}),
    "job.warning": EventForm(True, "Something odd that was mended", {"code": _TEXT, "message": _TEXT}),
    "job.completed": EventForm(True, "The end", _JOB),
    "job.failed": EventForm(True, "The end; what was transcribed is kept", _JOB),
    "job.canceled": EventForm(True, "The end; what was transcribed is kept", _JOB),
    "stream.reset": EventForm(
        False, "The id to resume after is none of this job; everything follows from the start", {}
    ),
}


def event_schema(name: str) -> Schema:
    """The `data` of one type of event."""
    form = EVENTS[name]
    properties: dict[str, Schema] = {
        "id": {"type": "integer", "minimum": 1} if form.durable else {"type": "null"},
        "type": {"const": name},
        "job_id": {"type": "string", "format": "uuid"},
        "at": {"type": "string", "format": "date-time"},
        **form.members,
    }
    return {"type": "object", "description": form.summary, "properties": properties, "required": list(properties)}
