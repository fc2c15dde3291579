"""What holds for every response, in pure ASGI around the whole application. FLOOR 5.

`Edge`: an X-Request-ID, the security headers, one line in the log, and an answer to what nobody caught. `Linger`:
an answer given before the request's body was read reaches the client. `Afterwards`: what lasts is sent without the
framework in between. None touches the body of a response, so streams pass through as they are.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.telemetry import bind
from service.web.problems import internal, problem

# No inline script or style, nothing from elsewhere; what the page makes itself (icons, audio) may be shown.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "media-src 'self' blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # a default like the others: what may be kept says so itself
}
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
KEY_CHARS = 16  # the fewest a key has
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = structlog.get_logger(__name__)


class Edge:
    """The outermost layer.

    A HEAD goes in as the GET it asks about, marked in the scope (`is_head`); the server drops the body.
    """

    def __init__(self, app: ASGIApp) -> None:
        """`app` is everything else."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        assert scope["type"] == "http", "the server is run without lifespan and websockets"
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        answer = _Answer(send, request_id)
        began = time.perf_counter()
        inner = {**scope, "method": "GET", "turnwire.head": True} if scope["method"] == "HEAD" else scope
        with bind(request_id=request_id):
            try:
                await self._app(inner, receive, answer.send)
            except asyncio.CancelledError:
                # Only the server cancels: it is being stopped and has waited long enough. The task ends right here.
                log.warning("request cut short by the stop", method=scope["method"], path=_shown(scope["path"]))
                await answer.rescue(problem("unavailable", "The server is being stopped; try again in a moment."))
            except Exception:
                log.exception("request failed", method=scope["method"], path=_shown(scope["path"]))
                await answer.rescue(internal())
            tell = log.debug if scope["path"] in _PROBES else log.info
            tell(
                "request",
                method=scope["method"],
                path=_shown(scope["path"]),
                status=answer.status,
                seconds=round(time.perf_counter() - began, 3),
            )


def _shown(path: str) -> str:
    """For the log: what may be a key or a token that somebody put there is none of a job's id, and long."""
    return "/".join(part if len(part) < KEY_CHARS or _UUID.fullmatch(part) else "…" for part in path.split("/"))


def is_head(scope: Scope) -> bool:
    """Whether only the headers are asked for; what would stream for long must look."""
    return "turnwire.head" in scope


class _Answer:
    """The response on its way out."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status: int | None = None
        self._send = send
        self._request_id = request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)

    async def rescue(self, response: ASGIApp) -> None:
        """Answer after all; a response that has begun stays cut, and the server closes the connection."""
        if self.status is None:
            await response({"type": "http"}, _nothing, self.send)


async def _nothing() -> Message:
    raise AssertionError("a plain response reads nothing")


# Many a client (of Python's, all) looks for an answer only when all is sent: whoever may call is heard for longer.
DRAIN_BYTES, DRAIN_BYTES_STRANGER = 64 << 20, 2 << 20
DRAIN_SECONDS = 5.0


class Linger:
    """Lets an early answer be read.

    Closing a connection with bytes unread makes the kernel reset it, and the answer is lost on the way. So: answer
    at once, with `Connection: close`, take in what still comes within bounds, and only then end.
    """

    def __init__(self, app: ASGIApp) -> None:
        """`app` may answer before it has read the body."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if _has_body(scope):
            body = _Body(scope, receive, send)
            await self._app(scope, body.receive, body.send)
        else:
            await self._app(scope, receive, send)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


class _Body:
    """One request body and the response to it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._state = scope.setdefault("state", {})
        self._receive = receive
        self._send = send
        self._read = False
        self._closing = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._read = not message.get("more_body")  # true of a disconnect too
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._read:
            self._closing = True
            MutableHeaders(scope=message)["Connection"] = "close"
        elif self._closing and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _drain(self) -> None:
        left = DRAIN_BYTES_STRANGER if self._state.get("owner") is None else DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._read and left > 0:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass


class Afterwards:
    """Runs what the application leaves to be done when it has returned.

    A stream would hold its frames, exit stacks and request objects, 15 KB of them, for as long as it lasts.
    """

    def __init__(self, app: ASGIApp) -> None:
        """`app` leaves it by `afterwards`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        left: list[ASGIApp] = []
        await self._app({**scope, "turnwire.afterwards": left.append}, receive, send)
        for response in left:
            await response(scope, receive, send)


def afterwards(scope: Scope, response: ASGIApp) -> bool:
    """Leave a response to be sent when the application has returned; False where nobody would send it then."""
    leave = scope.get("turnwire.afterwards")
    if leave is not None:
        leave(response)
    return leave is not None


def abort(scope: Scope) -> None:
    """Cut the connection, whatever is unsent: of a client that takes nothing any more."""
    cut: Callable[[], Any] | None = scope.get("extensions", {}).get("turnwire.abort")
    if cut is not None:
        cut()


def writer(scope: Scope) -> Callable[[bytes], bool] | None:
    """Sends a part of a body that has begun, at once and past all layers, which leave bodies as they are; False where
    the client has to be waited for.
    """
    write: Callable[[bytes], bool] | None = scope.get("extensions", {}).get("turnwire.write")
    return write
