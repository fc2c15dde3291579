"""The HTTP face of the sandbox: which paths exist, temporary tokens, and who may open a session.

By default any non-empty key is good, so that nothing needs an account; `keys` narrows that. Tokens are signed and carry
their own expiry: nothing is stored, so nothing grows. A session with bad credentials is still upgraded and told
in-band, as the service does. https://www.assemblyai.com/docs/streaming/authenticate-with-a-temporary-token
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Collection
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from service.sandbox.clock import Clock
from service.sandbox.faults import ERRORS
from service.sandbox.records import SESSION_CAP_S

WEBSOCKET_PATH = "/v3/ws"
TOKEN_PREFIX = "sandbox"  # noqa: S105 (not a secret: how a token of ours begins)
TOKEN_LENGTH = 2500  # the service's are about this long: request lines must cope


class Gate:
    """Credentials, tokens and plain HTTP answers."""

    def __init__(self, clock: Clock, keys: Collection[str] | None, *, keyless: bool = False) -> None:
        self._clock = clock
        self._keys = keys
        self._keyless = keyless
        self._secret = secrets.token_bytes(32)

    def answer(self, request: Request) -> Response | None:
        """The HTTP answer to a request that is not for the websocket path; None for one that is."""
        url = urlsplit(request.path)
        if url.path == WEBSOCKET_PATH:
            return None
        if url.path == "/v3/token":
            return self._token(parse_qs(url.query, keep_blank_values=True), request.headers.get("Authorization"))
        if url.path in {"/v3/ws/health", "/v3/health"}:
            return respond(200, {"status": "ok"})
        if url.path.startswith("/v2/"):
            return respond(410, {"error": "The v2 streaming endpoint is retired; use /v3/ws"})
        return respond(404, {"error": f"Nothing here; the websocket is at {WEBSOCKET_PATH}"})

    def admit(self, header: str | None, query_token: str | None) -> tuple[float, tuple[int, str] | None]:
        """The longest session these credentials allow, and the Error they earn."""
        credential = header or query_token
        if not credential:
            return (SESSION_CAP_S, None) if self._keyless else (0, ERRORS["missing_key"])
        if credential.startswith(f"{TOKEN_PREFIX}."):
            return self._admit_token(credential)
        # The raw key and nothing before it: https://www.assemblyai.com/docs/streaming/api-spec/streaming-websocket.md
        if credential.lower().startswith("bearer ") or (self._keys is not None and (header not in self._keys)):
            return 0, ERRORS["bad_key"]
        return SESSION_CAP_S, None

    def _admit_token(self, token: str) -> tuple[float, tuple[int, str] | None]:
        parts = token.split(".")
        if len(parts) != 5 or not hmac.compare_digest(parts[3], self._signature(parts[1], parts[2])):
            return 0, ERRORS["bad_key"]
        if self._clock.now() > float(parts[1]):
            return 0, ERRORS["expired_token"]
        return float(parts[2]), None

    def _signature(self, *fields: str) -> str:
        return hmac.new(self._secret, ".".join(fields).encode(), hashlib.sha256).hexdigest()

    def _token(self, query: dict[str, list[str]], authorization: str | None) -> Response:
        problems = []
        if not authorization:
            problems.append(
                {"type": "missing", "loc": ["header", "authorization"], "msg": "Field required", "input": None}
            )
        lifetime = _whole_number(query, "expires_in_seconds", 1, 600, None, problems)
        cap = _whole_number(query, "max_session_duration_seconds", 60, 10800, 10800, problems)
        if problems:
            return respond(422, {"detail": problems})
        key = (authorization or "").removeprefix("Bearer ")
        if self._keys is not None and key not in self._keys:
            return respond(401, {"error": "Invalid API key"})
        fields = (str(int(self._clock.now()) + lifetime), str(cap))
        token = ".".join((TOKEN_PREFIX, *fields, self._signature(*fields)))
        return respond(
            200, {"token": f"{token}.{'x' * (TOKEN_LENGTH - len(token) - 1)}", "expires_in_seconds": lifetime}
        )


def _whole_number(
    query: dict[str, list[str]], name: str, low: int, high: int, default: int | None, problems: list[dict[str, Any]]
) -> int:
    if name not in query:
        if default is None:
            problems.append({"type": "missing", "loc": ["query", name], "msg": "Field required", "input": None})
        return default or low
    text = query[name][-1]
    problem: dict[str, Any]
    try:
        number = int(text)
    except ValueError:
        message = "Input should be a valid integer, unable to parse string as an integer"
        problem = {"type": "int_parsing", "loc": ["query", name], "msg": message, "input": text}
    else:
        if low <= number <= high:
            return number
        kind, word, bound = (
            ("greater_than_equal", "greater", low) if number < low else ("less_than_equal", "less", high)
        )
        message = f"Input should be {word} than or equal to {bound}"
        problem = {"type": kind, "loc": ["query", name], "msg": message, "input": text, "ctx": {kind[0] + "e": bound}}
    problems.append(problem)
    return low


def respond(status: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None) -> Response:
    """An HTTP answer; the connection ends with it."""
    text = body if isinstance(body, str) else json.dumps(body)
    content_type = "text/plain; charset=utf-8" if isinstance(body, str) else "application/json"
    fields = {
        "Content-Type": content_type,
        "Content-Length": str(len(text.encode())),
        "Connection": "close",
        **(headers or {}),
    }
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unassigned"
    return Response(status, phrase, Headers(fields), text.encode())
