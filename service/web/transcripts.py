"""What a job leaves: its transcript in four formats, at any time, the audio it was made from and its peaks. FLOOR 5.

Turns are read page by page and rendered in a thread: a transcript of twelve hours must not hold up the streams.
Audio is read in pieces, never whole, and served as an attachment only, so that nothing uploaded is ever shown by a
browser as a page.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response, StreamingResponse

from service.core.errors import CallerError
from service.core.exports import EXPORTS
from service.core.job import Job, Turn
from service.ports import BlobStore
from service.runtime import Runtime
from service.web.context import OwnJob, Services, has_etag, preferred
from service.web.edge import is_head
from service.web.problems import not_found, problem
from service.web.schemas import json_answer, problem_answers, told_headers

PAGE = 200
PIECE = 256 * 1024
COMPLETE = "X-Transcript-Complete"
_FORMATS = {export.media_type.partition(";")[0]: name for name, export in EXPORTS.items()}
_ANSWERS = {
    200: {
        "description": f"The transcript so far; until the job has ended the response says `{COMPLETE}: false`",
        "headers": {COMPLETE: {"required": True, "schema": {"enum": ["true", "false"]}}},
        "content": {media_type: {} for media_type in _FORMATS},
    },
    **problem_answers("not_found", "not_acceptable"),
}

router = APIRouter()


@router.get("/jobs/{job_id}/transcript", summary="The transcript", response_class=Response, responses=_ANSWERS)
async def transcript(
    record: OwnJob,
    runtime: Services,
    form: Annotated[str | None, Query(alias="format", description=", ".join(EXPORTS))] = None,
    accept: Annotated[str, Header()] = "",
) -> Response:
    """In the format asked for with `format`, else by `Accept`, else as text."""
    name = form if form is not None else _FORMATS.get(preferred(accept, list(_FORMATS)) or "")
    if name not in EXPORTS:
        raise CallerError("not_acceptable", f"A transcript comes as one of: {', '.join(EXPORTS)}.")
    return await _render(runtime, record.job, name)


@router.get(
    "/jobs/{job_id}/transcript.{form}",
    summary="The transcript in one format",
    response_class=Response,
    responses=_ANSWERS,
)
async def transcript_as(record: OwnJob, runtime: Services, form: str) -> Response:
    """The suffix is one of `txt`, `json`, `srt` and `vtt`."""
    if form not in EXPORTS:
        raise not_found("format of a transcript")
    return await _render(runtime, record.job, form)


async def _render(runtime: Runtime, job: Job, name: str) -> Response:
    turns: list[Turn] = []
    while len(page := await runtime.store.turns(job.id, after=turns[-1].index if turns else -1, limit=PAGE)) == PAGE:
        turns += page
    turns += page
    body = await asyncio.to_thread(EXPORTS[name].render, job, turns)
    headers = {COMPLETE: "true" if job.terminal else "false", "Vary": "Accept"}
    return Response(body, headers=headers, media_type=EXPORTS[name].media_type)


# --- audio -----------------------------------------------------------------------------------------------------------


@router.get(
    "/jobs/{job_id}/audio",
    summary="The upload as it came",
    response_class=Response,
    responses={
        200: {"description": "All of it", "headers": told_headers("ETag"), "content": {"audio/wav": {}}},
        206: {
            "description": "The range asked for",
            "headers": told_headers("ETag", "Content-Range"),
            "content": {"audio/wav": {}},
        },
        304: {"description": "The same as If-None-Match names", "headers": told_headers("ETag")},
        **problem_answers("not_found", "audio_gone", "range_not_satisfiable"),
    },
)
async def audio(
    request: Request,
    record: OwnJob,
    runtime: Services,
    byte_range: Annotated[str, Header(alias="Range", description="One range of bytes; of several none is taken")] = "",
    if_range: Annotated[str, Header()] = "",
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """With `Range` support, so that players can seek."""
    job, size, etag = record.job, record.job.audio.bytes, f'"{record.job.audio.sha256}"'
    await runtime.blobs.read(job.id, 0, 1)  # says so when the audio is gone
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(job.filename, safe='')}",
    }
    if has_etag(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    part = _part(byte_range, size) if if_range in ("", etag) else None
    if part is not None and not part:
        return problem("range_not_satisfiable", f"The file has {size} bytes.", {"Content-Range": f"bytes */{size}"})
    wanted = part or range(size)
    if part is not None:
        headers["Content-Range"] = f"bytes {part[0]}-{part[-1]}/{size}"
    headers["Content-Length"] = str(len(wanted))
    status = 200 if part is None else 206
    if is_head(request.scope):
        return Response(status_code=status, headers=headers, media_type="audio/wav")
    return StreamingResponse(_read(runtime.blobs, job.id, wanted), status, headers, "audio/wav")


def _part(header: str, size: int) -> range | None:
    """The one range asked for, empty if outside; None: all. RFC 9110, 14.2: what is malformed is ignored."""
    match = re.fullmatch(r"bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})\s*", header, re.IGNORECASE)
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        return range(max(0, size - int(match[2])), size)
    first, last = int(match[1]), int(match[2] or size - 1)
    return None if match[2] and last < first else range(first, min(last + 1, size))


@router.get(
    "/jobs/{job_id}/peaks",
    summary="The outline of the audio",
    response_class=Response,
    responses={
        200: json_answer("At most 2,000 peaks, to draw a waveform", "Peaks"),
        **problem_answers("not_found", "audio_gone"),
    },
)
async def peaks(record: OwnJob, runtime: Services) -> Response:
    """Lowest and highest sample of each stretch, over all channels; computed once."""
    doc = await runtime.waveforms.peaks(record.job.id)
    return Response(doc, headers={"Cache-Control": "private, no-cache"}, media_type="application/json")


async def _read(blobs: BlobStore, job_id: str, wanted: range) -> AsyncIterator[bytes]:
    at = wanted.start
    while at < wanted.stop and (piece := await blobs.read(job_id, at, min(PIECE, wanted.stop - at))):
        yield piece
        at += len(piece)
