"""Every error as `application/problem+json` (RFC 9457). FLOOR 5.

`PROBLEMS` is the one place where the codes of the contract meet HTTP statuses; the error classes know no transport.
A code that is missing there is a fault of ours and answers 500. What the framework raises by itself (404, 405, a
parameter out of range) gets the same form, and so does what nobody expected: its text stays in the log.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.core.errors import AudioMissing, CallerError, TurnwireError
from service.web.upload import ClientDisconnected

MEDIA_TYPE = "application/problem+json"


class Meaning(NamedTuple):
    """What a code is in HTTP. `retry_after`: seconds after which the same request may well succeed."""

    status: int
    title: str
    retry_after: int | None = None


# fmt: off
PROBLEMS: dict[str, Meaning] = {
    "bad_request": Meaning(400, "The request cannot be understood"),
    "malformed_multipart": Meaning(400, "The multipart body is malformed"),
    "truncated_upload": Meaning(400, "The upload ended early"),
    "bad_cursor": Meaning(400, "The cursor is not one of this server"),
    "key_in_url": Meaning(400, "An API key does not belong in a URL"),
    "unauthorized": Meaning(401, "An API key is needed"),
    "forbidden_origin": Meaning(403, "Calls from there are not served"),
    "not_found": Meaning(404, "Not found"),
    "method_not_allowed": Meaning(405, "The method is not allowed here"),
    "not_acceptable": Meaning(406, "No such format"),
    "not_cancelable": Meaning(409, "The job has ended"),
    "not_retryable": Meaning(409, "The job cannot be retried"),
    "idempotency_in_progress": Meaning(409, "The first request with this key is still being received"),
    "audio_gone": Meaning(410, "The audio is gone"),
    "upload_too_large": Meaning(413, "The upload is too large"),
    "not_wav": Meaning(415, "The file is no WAV"),
    "unsupported_container": Meaning(415, "The container is not supported"),
    "unsupported_media_type": Meaning(415, "The media type is not supported"),
    "range_not_satisfiable": Meaning(416, "The range lies outside the file"),
    "unsupported_encoding": Meaning(422, "The encoding of the audio is not supported"),
    "unsupported_channels": Meaning(422, "The number of channels is not supported"),
    "unsupported_rate": Meaning(422, "The sample rate is not supported"),
    "empty_audio": Meaning(422, "There is no audio in the file"),
    "missing_fmt": Meaning(422, "The file has no fmt chunk"),
    "missing_data": Meaning(422, "The file has no data chunk"),
    "bad_fmt": Meaning(422, "The fmt chunk is wrong"),
    "truncated_header": Meaning(422, "The file ends in its header"),
    "too_many_chunks": Meaning(422, "The file has too many chunks"),
    "too_long": Meaning(422, "The audio is too long"),
    "missing_file": Meaning(422, "No file was sent"),
    "too_many_files": Meaning(422, "More than one file was sent"),
    "unknown_option": Meaning(422, "There is no such option"),
    "bad_option": Meaning(422, "A value is out of form or range"),
    "idempotency_mismatch": Meaning(422, "The key was used for another upload"),
    "queue_full": Meaning(429, "The queue is full", retry_after=30),
    "rate_limited": Meaning(429, "Too much at once", retry_after=2),
    "internal": Meaning(500, "The server failed"),
    "unavailable": Meaning(503, "The server cannot answer now", retry_after=5),
    "storage_full": Meaning(507, "The disk is full"),
}
# fmt: on
_BY_STATUS = {
    404: ("not_found", "There is nothing at this address; /docs lists what there is."),
    405: ("method_not_allowed", "This address does not take that method; see the Allow header."),
    413: ("upload_too_large", "The body is larger than this server takes."),
    415: ("unsupported_media_type", "The body is of a type that is not taken here."),
}


class Problem(msgspec.Struct, kw_only=True):
    """An error. `code` is stable; `detail` is a sentence for people, about this very request."""

    type: str
    title: str
    status: int
    code: str
    detail: str


def problem(code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer for a code of `PROBLEMS`."""
    meaning = PROBLEMS[code]
    extra = dict(headers or {})
    if meaning.retry_after is not None:
        extra.setdefault("Retry-After", str(meaning.retry_after))
    if meaning.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    body = Problem(type=f"urn:turnwire:{code}", title=meaning.title, status=meaning.status, code=code, detail=detail)
    return Response(msgspec.json.encode(body), meaning.status, extra, MEDIA_TYPE)


def internal() -> Response:
    """The answer for what nobody expected."""
    return problem(
        "internal", "Something unexpected happened here; the server's log tells more under this X-Request-ID."
    )


def of_error(exc: TurnwireError) -> Response:
    """The answer for an error of ours."""
    if isinstance(exc, AudioMissing):
        return problem(
            "audio_gone", "The audio of this job is no longer kept; its transcript is. Upload the file again."
        )
    return problem(exc.code, exc.detail) if exc.code in PROBLEMS else internal()


def not_found(what: str = "job") -> CallerError:
    """The one error for what never was, is gone, or belongs to somebody else."""
    return CallerError("not_found", f"There is no such {what}.")


def install(app: FastAPI) -> None:
    """Give every error raised in `app` its form."""
    app.add_exception_handler(TurnwireError, _ours)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(RequestValidationError, _parameter)
    app.add_exception_handler(ClientDisconnected, _nobody_there)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, TurnwireError)
    return of_error(exc)


async def _framework(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if exc.status_code >= 500:
        return internal()
    code, detail = _BY_STATUS.get(exc.status_code, ("bad_request", str(exc.detail)))
    return problem(code, detail, _allow(request) if exc.status_code == 405 else None)


def _allow(request: Request) -> dict[str, str]:
    """The router names the methods of the first route that fits; an address may have several."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.path_regex.match(request.url.path):
            methods |= route.methods
    return {"Allow": ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))}


async def _parameter(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    first: Mapping[str, Any] = exc.errors()[0]
    text = first["msg"].removeprefix("Value error, ")
    return problem("bad_option", f"{first['loc'][1]}: {text[:1].lower()}{text[1:]}.")


async def _nobody_there(_request: Request, _exc: Exception) -> Response:
    return problem("truncated_upload", "The connection ended before the upload did.")


async def _unexpected(_request: Request, _exc: Exception) -> Response:
    return internal()  # the framework raises it again after this, and the edge logs it
