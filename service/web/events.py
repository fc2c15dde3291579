"""A job's events as server-sent events, or as lines of JSON. FLOOR 5.

The bytes of an event were made once, when it was; here they are only chosen and passed on. What is sent is decided
by the feed, so a stream misses nothing and doubles nothing. A client that takes nothing for ten seconds is cut; its
next connection resumes from the log. At the stop of the process streams end cleanly with a `retry`, spread so that
not everybody comes back in the same instant.
"""

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, ClassVar

import structlog
from fastapi import APIRouter, Header, Query, Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.core.errors import TurnwireError
from service.core.job import TERMINAL_EVENTS, Event, make_event
from service.runtime import Runtime
from service.web.context import OwnJob, Services, preferred
from service.web.edge import abort, afterwards, is_head, writer
from service.web.schemas import problem_answers

PING_SECONDS = 15
SEND_SECONDS = 10.0
SEND_BYTES = 64 * 1024  # what a client that is behind is sent at once, and may hold unread, give or take one event
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
               204: {"description": "The job has ended and everything was seen: an EventSource stops"},
               **problem_answers("not_found")},
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


def _all(_event: Event) -> bool:
    return True


def stream(
    runtime: Runtime,
    job_id: str,
    accept: str,
    *,
    after: int = 0,
    reset: bool = False,
    wanted: Callable[[Event], bool] = _all,
    headers: Mapping[str, str] | None = None,
) -> "EventStream":
    """The response that follows a job, in the form the client asked for."""
    form = _LINES if preferred(accept, (SSE, NDJSON)) == NDJSON else _FRAMES
    push = _Push(form, wanted)
    return EventStream(job_id, _encoded(runtime, job_id, form, after, reset, wanted, push), form, headers, push)


def _filter(types: list[str]) -> Callable[[Event], bool]:
    names = {name.strip() for item in types for name in item.split(",")} - {""}
    if not names:
        return _all
    exact = names | TERMINAL_EVENTS | {RESET}
    beginnings = tuple(name[:-1] for name in names if name.endswith("*"))
    return lambda event: event.type in exact or event.type.startswith(beginnings)


async def _encoded(
    runtime: Runtime,
    job_id: str,
    form: "_Frames",
    after: int,
    reset: bool,
    wanted: Callable[[Event], bool],
    push: "_Push",
) -> AsyncGenerator[bytes, None]:
    yield form.opening()
    if reset:
        yield form.event(make_event(job_id, None, RESET, runtime.clock.utc_ms(), {}))
    try:
        async with aclosing(runtime.feed.pages(job_id, after, push)) as pages:
            async for page in pages:
                held, size = [], 0
                for event in page:
                    if wanted(event):
                        held.append(form.event(event))
                        size += len(held[-1])
                    if size >= SEND_BYTES:
                        yield b"".join(held)
                        held, size = [], 0
                if held:
                    yield b"".join(held)
                del page, held  # most of what follows is pushed, and these would stay
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


_FRAMES, _LINES = _Frames(), _Lines()


class _Push:
    """Hands what is new to one client, if it takes it at once. What is the same for many is put together once."""

    _last: ClassVar[dict[_Frames, tuple[Sequence[Event], bytes]]] = {}

    def __init__(self, form: _Frames, wanted: Callable[[Event], bool]) -> None:
        self.write: Callable[[bytes], bool] | None = None  # how, once the response has begun; None: not at all
        self._form = form
        self._wanted = wanted

    def __call__(self, page: Sequence[Event]) -> bool:
        """Whether it was sent."""
        if self.write is None:
            return False
        if self._wanted is not _all:
            body = b"".join([self._form.event(event) for event in page if self._wanted(event)])
            return not body or self.write(body)
        last = self._last.get(self._form)
        if last is None or last[0] is not page:
            last = self._last[self._form] = page, b"".join([self._form.event(event) for event in page])
        return self.write(last[1])


class EventStream(EventSourceResponse):
    """sse-starlette's response, with its headers and its answer to HEAD, at a third of what its sending costs.

    Stock runs four tasks a subscriber and opens a cancel scope an event. Here whoever has news sends them, or else the
    request's own task; a second one notices that the client left, and one timer looks after signs of life and clients
    that take nothing. Nobody waits for uvicorn's exit signal: it never comes here, streams end through the feed.
    """

    def __init__(
        self,
        job_id: str,
        frames: AsyncGenerator[bytes, None],
        form: _Frames,
        headers: Mapping[str, str] | None = None,
        push: _Push | None = None,
    ) -> None:
        """`frames` are sent as they are; `push` is what else is sent while they are waited for."""
        super().__init__(frames, headers=headers, media_type=form.media_type)
        self._job_id = job_id
        self._push = push
        self._frames = frames
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a HEAD, or see to it that it is all sent."""
        if is_head(scope):
            await super().__call__({**scope, "method": "HEAD"}, receive, send)
        elif not afterwards(scope, self._run):
            await self._run(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the frames end, the client goes, or it does not take what it is sent."""
        watch = _Watch(send, self._form)
        leaving = asyncio.create_task(_gone(receive, watch))
        try:
            # A scope without a deadline: whoever finds that there is nobody to send to makes it end now. Cancelling
            # the task by hand would look like the stop of the server.
            async with watch.scope, aclosing(self._frames):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                if self._push is not None:
                    self._push.write = writer(scope)
                async for frames in self._frames:
                    await watch.put(frames)
                await watch.put(b"", more=False)
        except TimeoutError:
            if not watch.scope.expired():
                raise
        finally:
            watch.end()
            leaving.cancel()
        if watch.stalled:
            log.warning("event stream cut: its client takes nothing", job_id=self._job_id)
            abort(scope)


async def _gone(receive: Receive, watch: "_Watch") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    watch.stop()


class _Watch:
    """Sends for one stream, and sees to it that something is sent now and then and that the client takes it.

    One timer for both: it fires when a sign of life is due, and when a send that has begun by then has lasted too long.
    """

    def __init__(self, send: Send, form: _Frames) -> None:
        self.scope = asyncio.timeout(None)
        self.stalled = False
        self._send = send
        self._form = form
        self._open = True
        self._since = 0.0  # when the send began that has not ended; 0 if there is none
        self._ping: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._ping_due = self._loop.time() + PING_SECONDS
        self._timer = self._loop.call_later(min(SEND_SECONDS, PING_SECONDS), self._look)

    async def put(self, body: bytes, *, more: bool = True) -> None:
        self._since = self._since or self._loop.time()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._since = 0.0

    def stop(self) -> None:
        """End the stream, which is still being sent."""
        if self._open:
            self._open = False
            self.scope.reschedule(0)

    def end(self) -> None:
        """Nothing is sent any more."""
        self._open = False
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if self._since and now - self._since >= SEND_SECONDS:
            self.stalled = True
            self.stop()
            return
        if now >= self._ping_due:
            self._ping_due = now + PING_SECONDS
            if not self._since:
                self._ping = self._loop.create_task(self.put(self._form.ping().encode()))
        self._timer = self._loop.call_at(min((self._since or now) + SEND_SECONDS, self._ping_due), self._look)
