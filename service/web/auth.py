"""Who may call: the rules of Host and Origin, CORS, and API keys, before a byte of the body is read. FLOOR 5.

Without keys only this machine's own pages and programs are served: a web page elsewhere must not spend the user's
money, nor a name that somebody points at 127.0.0.1. With keys the key decides, and its name owns the jobs. All is
judged on the raw scope: what is authorised is what is routed. No cookies, hence nothing a foreign page could ride
on.
"""

import asyncio
import contextlib
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import TurnwireError
from service.runtime import Runtime
from service.settings import ApiKey, is_loopback
from service.store.keys import StoredKey, key_id
from service.web.jobs import wants_events
from service.web.limits import Limits
from service.web.problems import problem
from service.web.tokens import Tokens

_OPEN = re.compile(r"/|/jobs/[^/]+/view|/healthz|/readyz|/docs|/openapi\.json|/asyncapi\.json|/page/.*")
_PROBES = frozenset({"/healthz", "/readyz"})  # asked by an orchestrator, which calls a machine by its address
_KEY_NAMES = frozenset({"key", "api_key", "apikey", "api-key", "access_token"})
_EVENTS = re.compile(r"/jobs/[^/]+/events")
_JOB = re.compile(r"/jobs/([^/]+)(/.*)?")
REFRESH_SECONDS = 2.0
Stored = Awaitable[Sequence[StoredKey]]
_METHODS = "GET, HEAD, POST, DELETE"
_REQUEST_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, If-None-Match, If-Range, Last-Event-ID, Prefer, Range, X-Request-ID"
)
_RESPONSE_HEADERS = (
    "Content-Disposition, Content-Range, ETag, Idempotency-Replayed, Link, Location, Preference-Applied, Retry-After, "
    "X-Request-ID, X-Transcript-Complete"
)


class Authenticator:
    """Knows the API keys, by their SHA-256 only: those of the settings, and the stored ones as they were of late."""

    def __init__(
        self, keys: Sequence[ApiKey], stored: Sequence[StoredKey] = (), read: Callable[[], Stored] | None = None
    ) -> None:
        """Without any key everybody is let in, in the name of nobody; `read` reads the stored ones again."""
        self._keys = [(_digest(key.key.get_secret_value()), key.name) for key in keys]
        self._read = read
        self._read_at = time.monotonic()
        self._stored: dict[str, StoredKey] = {}
        self.needed = bool(self._keys)
        self._know(stored)

    def _know(self, stored: Sequence[StoredKey]) -> None:
        """Where a key was needed one stays needed: who revokes the last one does not mean to let everybody in."""
        self._stored = {key.id: key for key in stored}
        self.needed = self.needed or bool(stored)

    async def refresh(self) -> None:
        """Read the stored keys again if that was long ago; while the database is away they stay as they are."""
        now = time.monotonic()
        if self._read is not None and now - self._read_at >= REFRESH_SECONDS:
            self._read_at = now  # one request at a time waits for it
            with contextlib.suppress(TurnwireError, TimeoutError):
                async with asyncio.timeout(1):
                    self._know(await self._read())

    def owner_of(self, key: str) -> str | None:
        """The name of a key. Every key of the settings is compared, whatever is found, and all in constant time."""
        digest = _digest(key)
        found = None
        for known, name in self._keys:
            if hmac.compare_digest(known, digest):
                found = name
        stored = self._stored.get(key_id(key) or "")
        if stored is not None and hmac.compare_digest(stored.sha256, digest):
            found = stored.name
        return found

    async def identify(self, scope: Scope) -> str | None:
        """The owner in whose name the request acts; None: nobody known."""
        if not self.needed:
            return ""
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return self.owner_of(key.strip()) if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Guard:
    """Refuses, or hands on with `state.owner` set."""

    def __init__(self, app: ASGIApp, runtime: Runtime, authenticator: Authenticator, tokens: Tokens) -> None:
        """`app` is served to those who may call."""
        self._app = app
        self._clock = runtime.clock
        self._tokens = tokens
        self._limits = Limits()
        settings = runtime.settings
        self._authenticator = authenticator
        self._origins = frozenset(settings.cors_origins)
        self._hosts = frozenset(settings.allowed_hosts)
        self._open_to_all = settings.auth is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["path"] not in _PROBES:
            await self._authenticator.refresh()
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if self._origins:
            send = _with_cors(send, origin if origin in self._origins else None)
        if origin in self._origins and _is_preflight(scope, headers):
            answer: ASGIApp = Response(
                status_code=204, headers={"Vary": "Origin, Access-Control-Request-Headers"} | _ALLOWED
            )
        elif (refusal := self._forbidden(scope, headers)) is not None:
            answer = refusal
        elif self._key_in_url(scope):
            answer = problem(
                "key_in_url",
                "Send the key as 'Authorization: Bearer <key>'; what is in a URL ends up in logs. Replace this key.",
            )
        else:
            answer = await self._authenticated(scope)
        await answer(scope, receive, send)

    def _forbidden(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        only_here = not self._authenticator.needed and not self._open_to_all
        exempt = scope["path"] in _PROBES and not only_here
        if (only_here or self._hosts) and not exempt and not self._serves(headers.getlist("host")):
            return problem(
                "forbidden_origin",
                f"The host {_shown(host)} is not served; TURNWIRE_ALLOWED_HOSTS lists those that are.",
            )
        origin = headers.get("origin")
        foreign = origin is not None and origin not in self._origins and not _same(origin, host)
        if foreign and not self._authenticator.needed:
            hint = "TURNWIRE_CORS_ORIGINS lists the origins that may call"
            return problem("forbidden_origin", f"Pages of {_shown(origin or '')} may not call this server; {hint}.")
        return None

    def _serves(self, hosts: Sequence[str]) -> bool:
        if len(hosts) != 1:
            return False
        name = re.sub(r":[0-9]*$", "", hosts[0]).lower()
        return is_loopback(name) or name in self._hosts

    def _key_in_url(self, scope: Scope) -> bool:
        return any(
            name.lower() in _KEY_NAMES or self._authenticator.owner_of(value) is not None
            for name, value in _query(scope)
        )

    async def _authenticated(self, scope: Scope) -> ASGIApp:
        owner = await self._authenticator.identify(scope)
        token_job = self._token_job(scope) if owner is None else None
        caller = f"key:{owner}" if owner else f"job:{token_job}" if token_job else f"peer:{(scope['client'] or '?')[0]}"
        wait = 0 if scope["path"] in _PROBES else self._limits.wait_for(caller)
        if wait > 0:
            return problem("rate_limited", "Too many requests; slow down.", {"Retry-After": str(wait)})
        if owner is None and token_job is None and not _OPEN.fullmatch(scope["path"]):
            return problem("unauthorized", "Send 'Authorization: Bearer <key>' with a key of this server.")
        scope.setdefault("state", {}).update(owner=owner, token_job=token_job)
        return self._limits.streaming(caller, self._app) if _streams(scope) else self._app

    def _token_job(self, scope: Scope) -> str | None:
        """The job whose token came with a request to read that very job."""
        path = _JOB.fullmatch(scope["path"])
        given = [value for name, value in _query(scope) if name == "token"]
        if path is None or scope["method"] != "GET" or len(given) != 1:
            return None
        job_id = self._tokens.job_of(given[0], self._clock.utc_ms())
        return job_id if job_id == path[1] else None


def _streams(scope: Scope) -> bool:
    """Whether the answer will be a job's events."""
    if scope["path"] == "/jobs" and scope["method"] == "POST":
        return wants_events(Headers(scope=scope).get("accept", ""))
    return _EVENTS.fullmatch(scope["path"]) is not None


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


_ALLOWED = {
    "Access-Control-Allow-Methods": _METHODS,
    "Access-Control-Allow-Headers": _REQUEST_HEADERS,
    "Access-Control-Max-Age": "600",
}


def _with_cors(send: Send, origin: str | None) -> Send:
    """The answer depends on the origin, so caches must know; one that is listed may read it."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.add_vary_header("Origin")
            if origin is not None:
                headers["Access-Control-Allow-Origin"] = origin
                headers["Access-Control-Expose-Headers"] = _RESPONSE_HEADERS
        await send(message)

    return wrapped


def _same(origin: str, host: str) -> bool:
    """Whether a page of `origin` came from this Host; a proxy may have taken the TLS off: the scheme does not count."""
    scheme, _, authority = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return port is not None and authority.removesuffix(port) == host.lower().removesuffix(port)


def _shown(text: str) -> str:
    return repr(text[:100])
