"""Job tokens: what opens the GET routes of one job, for a while, from where no header can be sent. FLOOR 5.

A token is the job's id, when it ends, and an HMAC-SHA256 over both; nothing is kept of it. It is checked when a
connection opens. It outlives the key it was made with, by a day at most.
"""

import base64
import contextlib
import hashlib
import hmac
import uuid

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.core.errors import CallerError
from service.core.job import rfc3339, to_json
from service.web.context import OwnJob, Services, read_json
from service.web.schemas import json_answer, problem_answers

# Less than a minute is over before a page has opened, or its EventSource has come back once.
MIN_SECONDS, DEFAULT_SECONDS, MAX_SECONDS = 60, 3600, 86_400
_PURPOSE = b"turnwire job token 1\0"
_TIME_BYTES, _MAC_BYTES = 6, 32

router = APIRouter()


class JobToken(msgspec.Struct, kw_only=True):
    """A token for the GET routes of a job; `events_url` has it in it."""

    token: str
    expires_at: str
    events_url: str


class Tokens:
    """Makes and checks tokens."""

    def __init__(self, secret: bytes) -> None:
        """Whoever has the `secret` can make tokens."""
        self._secret = secret

    def make(self, job_id: str, expires_ms: int) -> str:
        """A token for that job until then."""
        told = uuid.UUID(job_id).bytes + expires_ms.to_bytes(_TIME_BYTES)
        return base64.urlsafe_b64encode(told + self._mac(told)).decode()

    def job_of(self, token: str, now_ms: int) -> str | None:
        """The job a token opens now; None: it is not one of ours, or its time is over."""
        raw = b""
        with contextlib.suppress(ValueError):
            raw = base64.b64decode(token, b"-_", validate=True)
        told, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if not hmac.compare_digest(self._mac(told), mac) or now_ms >= int.from_bytes(told[16:]):
            return None
        return str(uuid.UUID(bytes=told[:16]))

    def _mac(self, told: bytes) -> bytes:
        return hmac.digest(self._secret, _PURPOSE + told, hashlib.sha256)


@router.post(
    "/jobs/{job_id}/token",
    summary="Make a token for one job",
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "expires_in": {
                                "type": "integer", "minimum": MIN_SECONDS, "maximum": MAX_SECONDS,
                                "default": DEFAULT_SECONDS, "description": "Seconds",
                            }
                        },
                    },
                    "example": {"expires_in": DEFAULT_SECONDS},
                }
            }
        }
    },
    responses={200: json_answer("Sent as `?token=` it opens this job's GET routes", "JobToken"),
               **problem_answers("not_found", "unknown_option", "bad_option")},
)  # fmt: skip
async def make_token(request: Request, record: OwnJob, runtime: Services) -> Response:
    """For an EventSource, an `<audio>`, a download: read-only, signed, expiring."""
    options = await read_json(request)
    if options.keys() - {"expires_in"}:
        raise CallerError("unknown_option", 'The only option is {"expires_in": seconds}.')
    seconds = options.get("expires_in", DEFAULT_SECONDS)
    if type(seconds) is not int or not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise CallerError(
            "bad_option", f"expires_in: should be a whole number of seconds, {MIN_SECONDS} to {MAX_SECONDS}."
        )
    tokens: Tokens = request.app.state.tokens
    expires_ms = runtime.clock.utc_ms() + seconds * 1000
    token = tokens.make(record.job.id, expires_ms)
    made = JobToken(
        token=token, expires_at=rfc3339(expires_ms), events_url=f"{record.job.links['events']}?token={token}"
    )
    return Response(to_json(made), media_type="application/json")
