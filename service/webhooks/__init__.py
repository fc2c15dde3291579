"""Webhooks: signed after Standard Webhooks, sent from the outbox until they are taken or their schedule ends. FLOOR 3.

An attempt that nothing came of is repeated with the same id and body, over restarts too: at least once, never in vain.
Jobs never wait for a webhook, and an endpoint that is slow holds no more than its own few slots. The URL is a
stranger's; `call` says where it may lead.
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import hashlib
import hmac
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import msgspec
import structlog

from service.core.errors import TurnwireError
from service.core.job import rfc3339, to_json
from service.ports import Clock
from service.store.outbox import DELIVERED, FAILED, PENDING, Attempt, Due, Outbox
from service.telemetry import metrics
from service.webhooks.call import Answer, Caller, NoAnswer

# Seconds from one attempt to the next, the first at once: three days in all.
SCHEDULE = (0, 5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
JITTER = 0.1
POLL_SECONDS = 1.0
AT_ONCE, AT_ONCE_PER_ENDPOINT = 64, 4

log = structlog.get_logger(__name__)


# --- what is sent (pure) ---------------------------------------------------------------------------------------------


class _Told(msgspec.Struct):
    type: str
    at: str
    job: msgspec.Raw


_told = msgspec.json.Decoder(_Told).decode


def body_of(event: bytes) -> bytes:
    """The body that tells a terminal event, the same in every attempt."""
    told = _told(event)
    return to_json({"type": told.type, "timestamp": told.at, "data": {"job": told.job}})


def signed_headers(secrets: Iterable[str], message_id: str, unix_s: int, body: bytes) -> dict[str, str]:
    """The three headers; one signature per secret, so that a receiver may know the old or the new one."""
    signatures = []
    for secret in secrets:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        digest = hmac.digest(key, b"%s.%d.%s" % (message_id.encode(), unix_s, body), hashlib.sha256)
        signatures.append(f"v1,{base64.b64encode(digest).decode()}")
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(unix_s),
        "webhook-signature": " ".join(signatures),
    }


# --- what comes of an attempt (pure) ---------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The delivery's status after an attempt, and when the next is due."""

    status: str
    again_in_s: float | None


def judge(status_code: int | None, *, tries: int, retry_after_s: float, luck: float) -> Verdict:
    """`tries`: attempts made, this one included; `luck`: 0 to 1. A redirect is a failure like any other."""
    if status_code is not None and 200 <= status_code < 300:
        return Verdict(DELIVERED, None)
    if status_code == 410 or tries >= len(SCHEDULE):
        return Verdict(FAILED, None)
    delay = SCHEDULE[tries] * (1 - JITTER + 2 * JITTER * luck)
    return Verdict(PENDING, max(delay, min(retry_after_s, SCHEDULE[-1])))


def seconds_of(retry_after: str, now_s: float) -> float:
    """What a Retry-After header asks for, 0 if it says nothing. https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3"""
    if re.fullmatch("[0-9]{1,9}", retry_after):
        return float(retry_after)
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now_s)
    return 0.0


# --- sending ---------------------------------------------------------------------------------------------------------


class Webhooks:
    """Sends what is due in the outbox."""

    def __init__(self, outbox: Outbox, clock: Clock, caller: Caller, secrets: Sequence[str]) -> None:
        """`secrets` as in the settings, `whsec_…`."""
        self._outbox = outbox
        self._clock = clock
        self._caller = caller
        self._secrets = secrets
        self._running: dict[str, str] = {}  # attempts under way: webhook → endpoint
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                try:
                    await self._take(group)
                except TurnwireError:
                    log.warning("webhooks wait: the outbox cannot be read")
                except Exception:
                    log.exception("webhooks could not be taken")
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._clock.real(POLL_SECONDS)):
                        await self._wake.wait()

    async def _take(self, group: asyncio.TaskGroup) -> None:
        """Begin an attempt at everything due, as far as there are slots."""
        while (free := AT_ONCE - len(self._running)) > 0:
            busy = Counter(self._running.values())
            full = [endpoint for endpoint, attempts in busy.items() if attempts >= AT_ONCE_PER_ENDPOINT]
            begun = 0
            for due in await self._outbox.due(free, but_for=full):
                if due.id not in self._running and busy[due.endpoint] < AT_ONCE_PER_ENDPOINT:
                    busy[due.endpoint] += 1
                    self._running[due.id] = due.endpoint
                    group.create_task(self._attempt(due), name=f"webhook-{due.id}")
                    begun += 1
            if not begun:
                return

    async def _attempt(self, due: Due) -> None:
        try:
            await self._send(due)
        except Exception:
            log.exception("a webhook could not be attempted", webhook_id=due.id, job_id=due.job_id)
        else:
            self._wake.set()  # there is a slot again; after a fault the next poll is early enough
        finally:
            del self._running[due.id]

    async def _send(self, due: Due) -> None:
        sending = await self._outbox.claim(due)
        if sending is None:
            return
        began, at_ms = self._clock.now(), self._clock.utc_ms()
        body = body_of(sending.event)
        answer, error = None, None
        try:
            headers = signed_headers(self._secrets, sending.id, at_ms // 1000, body)
            answer = await self._caller.post(sending.url, headers, body)
        except NoAnswer as exc:
            error = str(exc)
        attempt = Attempt(
            at=rfc3339(at_ms),
            status_code=answer.status if answer else None,
            error=error,
            duration_ms=round((self._clock.now() - began) * 1000),
        )
        verdict = self._judge(answer, tries=sending.tries + 1)
        await self._outbox.record(sending, attempt, verdict.status, verdict.again_in_s)
        metrics.webhook_deliveries.labels(result=verdict.status).inc()
        log.info("webhook attempted", webhook_id=due.id, job_id=due.job_id, result=verdict.status,
                 status_code=attempt.status_code, error=error)  # fmt: skip

    def _judge(self, answer: Answer | None, *, tries: int) -> Verdict:
        wait_s = seconds_of(answer.retry_after, self._clock.utc_ms() / 1000) if answer else 0.0
        luck = random.random()  # noqa: S311 - spreads load, hides nothing
        return judge(answer.status if answer else None, tries=tries, retry_after_s=wait_s, luck=luck)
