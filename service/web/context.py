"""What a handler asks of its request: the runtime, the caller, the caller's job, a small body, preferences. FLOOR 5.

A job of another owner, one that never was and an id out of form are the same 404.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Path, Request

from service.core.errors import CallerError
from service.runtime import Runtime
from service.store import Record
from service.web.problems import not_found

JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
MAX_JSON_BYTES = 16 * 1024


# Coroutines, though they wait for nothing: FastAPI runs a plain function in a thread, for each request.
async def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


async def _owner(request: Request) -> str:
    owner: str = request.state.owner
    return owner


Services = Annotated[Runtime, Depends(_runtime)]
Owner = Annotated[str, Depends(_owner)]
JobId = Annotated[str, Path(description="The job's id, a UUID.", json_schema_extra={"format": "uuid"})]


async def own_job(request: Request, job_id: JobId, runtime: Services, owner: Owner) -> Record:
    """The caller's job of that id, or the one that a token opens."""
    record = await runtime.store.get(job_id) if JOB_ID.fullmatch(job_id) else None
    opened = request.scope["state"].get("token_job") == job_id
    if record is None or not (opened or record.owner == owner):
        raise not_found()
    return record


OwnJob = Annotated[Record, Depends(own_job)]


async def read_json(request: Request) -> dict[str, Any]:
    """The object in the body; none is an empty one."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_JSON_BYTES:
            raise CallerError("bad_request", f"The body should be a JSON object of at most {MAX_JSON_BYTES} bytes.")
    try:
        return msgspec.json.decode(body or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise CallerError("bad_request", "The body should be a JSON object.") from None


def preferred(accept: str, offered: Sequence[str]) -> str | None:
    """Of the media types offered the one liked best, the first of several; None if none is taken. RFC 9110, 12.5.1."""
    ranges = [_range(item) for item in accept.split(",") if item.strip()]
    if not ranges:
        return offered[0]
    liking = {media_type: _quality(media_type, ranges) for media_type in offered}
    best = max(offered, key=lambda media_type: liking[media_type])
    return best if liking[best] > 0 else None


def _range(item: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in item.split(";"))
    quality = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
    return name, float(quality) if re.fullmatch(r"[01](\.[0-9]{0,3})?", quality) else 0.0


def _quality(media_type: str, ranges: Sequence[tuple[str, float]]) -> float:
    """What the most specific range that fits says."""
    kind = media_type.partition("/")[0]
    for wanted in (media_type, f"{kind}/*", "*/*"):
        for name, quality in ranges:
            if name == wanted:
                return quality
    return 0.0


def has_etag(header: str | None, etag: str) -> bool:
    """Whether If-None-Match names this representation; compared weakly. RFC 9110, 13.1.2."""
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags
