"""Jobs over HTTP: upload, list, look at, wait for, cancel, retry, delete. FLOOR 5.

A handler parses, calls one use case and renders. The upload's body is never held: its pieces go through
`intake.accept` as they arrive, and what is wrong with them is said at the first byte that shows it.
"""

import asyncio
import base64
import contextlib
import datetime as dt
import re
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

import msgspec
from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from service.core.errors import CallerError, TurnwireError
from service.core.job import Job, Status, Turn, to_json
from service.intake import Accepted
from service.runtime import Runtime
from service.store import Record
from service.telemetry import metrics
from service.web.context import Owner, OwnJob, Services, has_etag, preferred, read_json
from service.web.events import NDJSON, SSE, stream
from service.web.limits import Uploads
from service.web.problems import not_found
from service.web.schemas import REFUSED_AUDIO, UPLOAD, json_answer, problem_answers, told_headers
from service.web.upload import ClientDisconnected, UploadBody

MAX_WAIT_SECONDS = 60
JSON = "application/json"
REPLAYED = "Idempotency-Replayed"

T = TypeVar("T")

router = APIRouter()


class JobList(msgspec.Struct):
    """Jobs, newest first; `next_cursor` leads to older ones."""

    data: list[Job]
    has_more: bool
    next_cursor: str | None


class TurnList(msgspec.Struct):
    """Final turns, in order."""

    data: list[Turn]
    has_more: bool


# --- uploading -------------------------------------------------------------------------------------------------------


@router.post(
    "/jobs",
    status_code=202,
    summary="Upload a WAV",
    openapi_extra=UPLOAD,
    responses={
        202: json_answer("Accepted and durable", "Job", headers=("Location",), optional=(REPLAYED,)),
        200: {
            "description": f"With `Accept: {SSE}`: the job's own events",
            "headers": told_headers("Location") | told_headers(REPLAYED, required=False),
            "content": {SSE: {}, NDJSON: {}},
        },
        **problem_answers(
            "malformed_multipart",
            "truncated_upload",
            "idempotency_in_progress",
            "upload_too_large",
            "queue_full",
            "storage_full",
            "unknown_option",
            "bad_option",
            "missing_file",
            "too_many_files",
            "idempotency_mismatch",
            *REFUSED_AUDIO,
        ),
    },
)
async def upload(
    request: Request,
    runtime: Services,
    owner: Owner,
    idempotency_key: Annotated[
        str | None,
        Header(pattern=r"^[!-~]{1,255}$", description="Of several uploads with one key, within 24 h, one makes a job"),
    ] = None,
) -> Response:
    """The file is checked while it arrives; options are form fields or query parameters."""
    accepted = await _accept(request, runtime, owner, idempotency_key or "")
    job = accepted.job
    location = {"Location": job.links["self"]} | ({REPLAYED: "true"} if accepted.replayed else {})
    accept = request.headers.get("accept", "")
    if wants_events(accept):
        return stream(runtime, job.id, accept, headers=location)
    with contextlib.suppress(TurnwireError):  # accepted is accepted, whether or not its place in the queue can be told
        record = await runtime.store.get(job.id)
        job = record.job if record is not None else job
    return _json(job, 202, location)


def wants_events(accept: str) -> bool:
    """Whether an upload is answered with its job's events; then it counts among the caller's streams."""
    return preferred(accept, (JSON, SSE, NDJSON)) in (SSE, NDJSON)


async def _accept(request: Request, runtime: Runtime, owner: str, key: str) -> Accepted:
    uploads: Uploads = request.app.state.uploads
    try:
        with uploads.one() as received:
            limit = runtime.settings.max_upload_bytes
            body = UploadBody(request.scope, request.receive, limit, received=received, turn=uploads.turn)
            query = request.query_params.multi_items()
            if key:
                accepted = await runtime.intake.accept_once(
                    body, owner=owner, query=query, raw_length=body.raw_length, key=key
                )
            else:
                accepted = Accepted(
                    await runtime.intake.accept(body, owner=owner, query=query, raw_length=body.raw_length)
                )
    except TurnwireError as exc:
        metrics.uploads.labels(result=exc.code).inc()
        raise
    except ClientDisconnected:
        metrics.uploads.labels(result="disconnected").inc()
        raise
    metrics.uploads.labels(result="replayed" if accepted.replayed else "accepted").inc()
    metrics.upload_bytes.inc(accepted.job.audio.bytes)
    return accepted


# --- reading ---------------------------------------------------------------------------------------------------------


@router.get(
    "/jobs",
    summary="List jobs",
    responses={
        200: json_answer("Whole jobs, newest first", "JobList", optional=("Link",)),
        **problem_answers("bad_cursor", "bad_option"),
    },
)
async def list_jobs(
    request: Request,
    runtime: Services,
    owner: Owner,
    status: Annotated[list[Status], Query(description="Only these; repeatable")] = [],  # noqa: B006 - FastAPI copies it
    created_after: Annotated[dt.datetime | None, Query(description="Inclusive")] = None,
    created_before: Annotated[dt.datetime | None, Query(description="Exclusive")] = None,
    q: Annotated[
        str, Query(max_length=255, description="Words that are each in a final or in the file's name, in any case")
    ] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
    cursor: Annotated[str, Query(description="`next_cursor` of the page before")] = "",
) -> Response:
    """Ties are ordered by id; a page is not disturbed by jobs that are new."""
    records = await runtime.store.list(
        owner=owner,
        limit=limit + 1,
        statuses=status,
        before=_position(cursor) if cursor else None,
        created_after_ms=_unix_ms(created_after),
        created_before_ms=_unix_ms(created_before),
        q=q,
    )
    shown = records[:limit]
    following = _cursor(shown[-1]) if len(records) > limit else None
    headers = {}
    if following is not None:
        others = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
        headers["Link"] = f'</jobs?{urlencode([*others, ("cursor", following)])}>; rel="next"'
    return _json(JobList([record.job for record in shown], following is not None, following), 200, headers)


def _unix_ms(moment: dt.datetime | None) -> int | None:
    """Rounded up: what is inclusive, and what is exclusive, stays so to the microsecond."""
    if moment is None:
        return None
    whole = moment if moment.tzinfo is not None else moment.replace(tzinfo=dt.UTC)
    return -((dt.datetime.fromtimestamp(0, dt.UTC) - whole) // dt.timedelta(milliseconds=1))


def _cursor(last: Record) -> str:
    return base64.urlsafe_b64encode(f"{last.created_ms}.{last.job.id}".encode()).decode().rstrip("=")


def _position(cursor: str) -> tuple[int, str]:
    with contextlib.suppress(ValueError):
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode()
        if match := re.fullmatch(r"([0-9]{1,15})\.([0-9a-f-]{36})", text):
            return int(match[1]), match[2]
    raise CallerError("bad_cursor", "This cursor is not one that /jobs gave; start again without it.")


@router.get(
    "/jobs/{job_id}",
    summary="Look at a job, or wait for it",
    responses={
        200: json_answer("The job as it is now", "Job", headers=("ETag",), optional=("Preference-Applied",)),
        304: {"description": "Nothing new since If-None-Match", "headers": told_headers("ETag")},
        **problem_answers("not_found"),
    },
)
async def get_job(
    request: Request,
    record: OwnJob,
    runtime: Services,
    if_none_match: Annotated[str | None, Header()] = None,
    prefer: Annotated[
        str, Header(description="`wait=N`: answer when there is news, or after N seconds (at most 60)")
    ] = "",
) -> Response:
    """`Prefer: wait=N` waits for another status; with `If-None-Match` for any event."""
    headers = {"Cache-Control": "no-cache"}
    wait = re.search(r'(?:^|,)\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(?:[;,]|$)', prefer, re.IGNORECASE)
    if wait is not None:
        seconds = min(int(wait[1]), MAX_WAIT_SECONDS)
        headers["Preference-Applied"] = f"wait={seconds}"
        record = await _news(request, runtime, record, seconds, if_none_match)
    headers["ETag"] = _etag(record)
    if has_etag(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return _json(record.job, 200, headers)


def _etag(record: Record) -> str:
    return f'W/"{record.event_seq}"'


async def _news(
    request: Request, runtime: Runtime, record: Record, seconds: float, if_none_match: str | None
) -> Record:
    """The job once its status has changed (with `if_none_match`: its ETag), or as it is after `seconds`.

    Raises `ClientDisconnected` as soon as nobody waits any more.
    """

    def is_news(now: Record) -> bool:
        other = (
            now.job.status != record.job.status if if_none_match is None else not has_etag(if_none_match, _etag(now))
        )
        return other or now.job.terminal

    async def wait() -> Record | None:
        async with contextlib.aclosing(runtime.feed.follow(record.job.id, record.event_seq)) as events:
            async for event in events:
                if event.seq is None:
                    continue
                now = await runtime.store.get(record.job.id)
                if now is None or is_news(now):
                    return now
        return await runtime.store.get(record.job.id)  # the process is being stopped, or the job was deleted

    if is_news(record):
        return record
    try:
        async with asyncio.timeout(runtime.clock.real(seconds)):
            found = await _unless_left(request, wait())
    except TimeoutError:
        found = await runtime.store.get(record.job.id)
    if found is None:
        raise not_found()
    return found


async def _unless_left(request: Request, waiting: Coroutine[Any, Any, T]) -> T:
    """What is waited for, while somebody does. Raises `ClientDisconnected`."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    news, left = asyncio.create_task(waiting), asyncio.create_task(leave())
    try:
        await asyncio.wait((news, left), return_when=asyncio.FIRST_COMPLETED)
        if not news.done():
            raise ClientDisconnected
        return news.result()
    finally:
        news.cancel()
        left.cancel()
        await asyncio.wait((news, left))


@router.get(
    "/jobs/{job_id}/turns",
    summary="Final turns",
    responses={200: json_answer("Final turns in order", "TurnList"), **problem_answers("not_found", "bad_option")},
)
async def list_turns(
    record: OwnJob,
    runtime: Services,
    after: Annotated[int, Query(ge=-1, le=2**31 - 1, description="Index of the last turn seen")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> Response:
    """As they stand now, revisions included."""
    turns = await runtime.store.turns(record.job.id, after=after, limit=limit + 1)
    return _json(TurnList(list(turns[:limit]), len(turns) > limit))


# --- changing --------------------------------------------------------------------------------------------------------


@router.post(
    "/jobs/{job_id}/cancel",
    status_code=202,
    summary="Cancel a job",
    responses={
        202: json_answer("Canceled if it was queued; a running job ends within seconds", "Job"),
        200: json_answer("Canceled, or asked to, before", "Job"),
        **problem_answers("not_found", "not_cancelable"),
    },
)
async def cancel(record: OwnJob, runtime: Services) -> Response:
    """What was transcribed is kept."""
    repeated = record.cancel_requested or record.job.status == Status.CANCELED
    after = await runtime.intake.cancel(record.job.id)
    if after is None:
        raise not_found()
    return _json(after.job, 200 if repeated else 202)


@router.post(
    "/jobs/{job_id}/retry",
    status_code=202,
    summary="Run a job again",
    openapi_extra={
        "requestBody": {
            "content": {
                JSON: {
                    "schema": {"type": "object", "properties": {"from": {"enum": ["start"]}}},
                    "example": {"from": "start"},
                }
            }
        }
    },
    responses={
        202: json_answer("Queued again", "Job"),
        **problem_answers("not_found", "not_retryable", "audio_gone", "unknown_option", "bad_option"),
    },
)
async def retry(request: Request, record: OwnJob, runtime: Services) -> Response:
    """From the last final turn; with `{"from": "start"}` all turns are withdrawn first."""
    options = await read_json(request)
    if options.keys() - {"from"}:
        raise CallerError("unknown_option", 'The only option is {"from": "start"}.')
    if options.get("from", "start") != "start":
        raise CallerError("bad_option", "from: should be start, or be left out to go on after the last final turn.")
    await runtime.blobs.read(record.job.id, 0, 1)  # says so when the audio is gone
    after = await runtime.intake.retry(record.job.id, from_start="from" in options)
    if after is None:
        raise not_found()
    return _json(after.job, 202)


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    summary="Delete a job with its audio",
    response_class=Response,
    responses=problem_answers("not_found"),
)
async def delete(record: OwnJob, runtime: Services) -> Response:
    """A running job is canceled; whoever follows it sees the stream end."""
    if not await runtime.intake.delete(record.job.id):
        raise not_found()
    return Response(status_code=204)


def _json(value: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, JSON)
