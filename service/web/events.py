"""A job's events as server-sent events, or as lines of JSON. FLOOR 5.

The bytes of an event were made once, when it was; here they are only chosen and passed on. What is sent is decided
by the feed, so a stream misses nothing and doubles nothing. A client that takes nothing for ten seconds is cut; its
next connection resumes from the log. At the stop of the process streams end cleanly with a `retry`, spread so that
not everybody comes back in the same instant.
"""

import random
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Annotated

import structlog
from fastapi import APIRouter, Header, Query, Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.core.errors import TurnwireError
from service.core.job import TERMINAL_EVENTS, Event, make_event
from service.runtime import Runtime
from service.web.context import OwnJob, Services, preferred
from service.web.edge import abort, is_head

PING_SECONDS = 15
SEND_SECONDS = 10.0
RETRY_MS = (1000, 5000)
SSE, NDJSON = "text/event-stream", "application/x-ndjson"
RESET = "stream.reset"

log = structlog.get_logger(__name__)
router = APIRouter()


@router.get(
    "/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=Response,
    responses={200: {"description": "The events, live; see /asyncapi.json", "content": {SSE: {}, NDJSON: {}}},
               204: {"description": "The job has ended and everything was seen: an EventSource stops"}},
)  # fmt: skip
async def follow(
    request: Request,
    record: OwnJob,
    runtime: Services,
    types: Annotated[
        list[str], Query(description="Names, or beginnings with a trailing `*`; comma-separated or repeated")
    ] = [],  # noqa: B006
    last_event_id: Annotated[str, Query(description="Like the header; the header wins")] = "",
    last_event_id_header: Annotated[str, Header(alias="Last-Event-ID", description="Resume after this event")] = "",
) -> Response:
    """Everything from the start, or after `Last-Event-ID`; then live. The response ends with the job."""
    given = last_event_id_header or last_event_id
    after = int(given) if re.fullmatch(r"0|[1-9][0-9]{0,8}", given) else None
    if record.job.terminal and after == record.event_seq:
        return Response(status_code=204)
    known = after is not None and after <= record.event_seq
    return stream(
        runtime, record.job.id, request.headers.get("accept", ""),
        after=after or 0 if known else 0, reset=bool(given) and not known, wanted=_filter(types),
    )  # fmt: skip


def stream(
    runtime: Runtime,
    job_id: str,
    accept: str,
    *,
    after: int = 0,
    reset: bool = False,
    wanted: Callable[[Event], bool] = lambda _: True,
    headers: Mapping[str, str] | None = None,
) -> "EventStream":
    """The response that follows a job, in the form the client asked for."""
    form = _Lines() if preferred(accept, (SSE, NDJSON)) == NDJSON else _Frames()
    return EventStream(job_id, _encoded(runtime, job_id, form, after, reset, wanted), form, headers)


def _filter(types: list[str]) -> Callable[[Event], bool]:
    names = {name.strip() for item in types for name in item.split(",")} - {""}
    if not names:
        return lambda _: True
    exact = names | TERMINAL_EVENTS | {RESET}
    beginnings = tuple(name[:-1] for name in names if name.endswith("*"))
    return lambda event: event.type in exact or event.type.startswith(beginnings)


async def _encoded(
    runtime: Runtime, job_id: str, form: "_Frames", after: int, reset: bool, wanted: Callable[[Event], bool]
) -> AsyncIterator[bytes]:
    yield form.opening()
    if reset:
        yield form.event(make_event(job_id, None, RESET, runtime.clock.utc_ms(), {}))
    try:
        async with aclosing(runtime.feed.follow(job_id, after)) as events:
            async for event in events:
                if wanted(event):
                    yield form.event(event)
    except TurnwireError as exc:
        log.warning("event stream ended early", job_id=job_id, reason=exc)
    if runtime.draining.is_set():
        yield form.opening()  # when to come back


class _Frames:
    """Server-sent events. https://html.spec.whatwg.org/multipage/server-sent-events.html"""

    media_type = SSE

    def opening(self) -> bytes:
        """At once, so that proxies pass the headers on and the client knows how long to wait before it comes back."""
        return b"retry: %d\n: turnwire\n\n" % random.randint(*RETRY_MS)  # noqa: S311 - nothing to guess here

    def event(self, event: Event) -> bytes:
        return event.sse

    def ping(self) -> ServerSentEvent:
        return ServerSentEvent(comment="ping", sep="\n")


class _Lines(_Frames):
    """One JSON object a line; an empty line is a sign of life."""

    media_type = NDJSON

    def opening(self) -> bytes:
        return b"\n"

    def event(self, event: Event) -> bytes:
        return event.json + b"\n"

    def ping(self) -> ServerSentEvent:
        return _EmptyLine()


class _EmptyLine(ServerSentEvent):
    def encode(self) -> bytes:
        return b"\n"


class EventStream(EventSourceResponse):
    """sse-starlette's response (pings, disconnects, no buffering by proxies), that cuts who does not read."""

    def __init__(
        self, job_id: str, frames: AsyncIterator[bytes], form: _Frames, headers: Mapping[str, str] | None = None
    ) -> None:
        """`frames` are sent as they are."""
        super().__init__(
            frames,
            headers=headers,
            media_type=form.media_type,
            ping=PING_SECONDS,
            ping_message_factory=form.ping,
            send_timeout=SEND_SECONDS,
        )
        self._job_id = job_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the frames end, the client goes, or it does not take what it is sent."""
        if is_head(scope):
            scope = {**scope, "method": "HEAD"}
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("event stream cut: its client takes nothing", job_id=self._job_id)
            abort(scope)
