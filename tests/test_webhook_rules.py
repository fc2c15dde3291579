"""How a webhook is signed and when it is tried again, without I/O."""

import base64
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from service.webhooks import SCHEDULE, judge, seconds_of, signed_headers

SECRET, OLD_SECRET = ("whsec_" + base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_the_official_library_accepts_either_secret_and_nothing_else(text: str) -> None:
    body = json.dumps({"a": text}, ensure_ascii=False).encode()
    now = int(datetime.now(UTC).timestamp())
    headers = signed_headers([SECRET, OLD_SECRET], "msg_1", now, body)
    for secret in (SECRET, OLD_SECRET):
        assert Webhook(secret).verify(body, headers) == {"a": text}
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + base64.b64encode(bytes(32)).decode()).verify(body, headers)
    for changed in ({"webhook-id": "msg_2"}, {"webhook-timestamp": str(now + 1)}):
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body, headers | changed)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body + b" ", headers)


def test_the_schedule_is_the_one_of_standard_webhooks() -> None:
    for luck, share in [(0.0, 0.9), (0.5, 1.0), (1.0, 1.1)]:
        waits = [judge(500, tries=tries, retry_after_s=0, luck=luck) for tries in range(1, 10)]
        assert [wait.status for wait in waits] == ["pending"] * 9
        total = sum(wait.again_in_s or 0 for wait in waits)
        assert total == pytest.approx(share * (75 * 3600 + 35 * 60 + 5))
    assert judge(500, tries=10, retry_after_s=0, luck=0) == ("failed", None)


@pytest.mark.parametrize("code", [None, 100, 199, 300, 301, 302, 307, 308, 400, 401, 404, 429, 500, 503, 599])
def test_whatever_is_not_2xx_is_tried_again(code: int | None) -> None:
    assert judge(code, tries=1, retry_after_s=0, luck=0.5) == ("pending", 5)


def test_success_and_410_are_final() -> None:
    for code in (200, 201, 202, 204, 299):
        assert judge(code, tries=10, retry_after_s=60, luck=0) == ("delivered", None)
    assert judge(410, tries=1, retry_after_s=60, luck=0) == ("failed", None)


def test_retry_after_can_only_lengthen_the_wait() -> None:
    assert judge(503, tries=1, retry_after_s=3600, luck=0.5).again_in_s == 3600
    assert judge(503, tries=3, retry_after_s=1, luck=0.5).again_in_s == SCHEDULE[3]
    assert judge(503, tries=1, retry_after_s=10**9, luck=0.5).again_in_s == 24 * 3600
    now = datetime(2026, 11, 21, tzinfo=UTC)
    later = format_datetime(now + timedelta(seconds=90), usegmt=True)
    given_s = {"": 0, "120": 120, later: 90, format_datetime(now - timedelta(1), usegmt=True): 0, "soon": 0, "-1": 0}
    assert {header: seconds_of(header, now.timestamp()) for header in given_s} == given_s
