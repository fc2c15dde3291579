"""The v3 wire: every message there is and what is none, the query string, and a verdict on every way a session ends."""

import json
import random
from typing import Any, get_args
from urllib.parse import parse_qsl

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core import protocol
from service.core.errors import UpstreamError
from service.core.protocol import (
    ENDS,
    Action,
    Begin,
    Configuration,
    EndKind,
    ErrorFrame,
    Malformed,
    Revision,
    SessionEnd,
    SessionEnded,
    SpeakerRevision,
    Termination,
    Turn,
    Unknown,
    Word,
    classify,
    decode,
    query,
)

# --- messages: as documented or captured -----------------------------------------------------------------------------

BEGIN = (
    '{"type":"Begin","id":"12c77068-02b3-4941-a960-275a65230e31","expires_at":1790221526,"configuration":{"model":'
    '"u3-rt-pro","mode":"balanced","api_version":"2025-05-12","speaker_labels":false,"redact_pii":false,'
    '"filter_profanity":false,"domain":null,"voice_focus":null}}'
)
PRO_FINAL = (
    '{"turn_order":0,"turn_is_formatted":true,"end_of_turn":true,"transcript":"Harbor Point.","end_of_turn_confidence":1,'
    '"words":[{"start":0,"end":472,"text":"Harbor","confidence":0.969633,"word_is_final":true},'
    '{"start":480,"end":810,"text":"Point.","confidence":0.998,"word_is_final":true,"speaker":"A","speaker_confidence":0.5}],'
    '"utterance":"Harbor Point.","language_code":"en","language_confidence":0.9,"speaker_label":"A","type":"Turn"}'
)
US_PARTIAL = (
    '{"turn_order":0,"turn_is_formatted":false,"end_of_turn":false,"transcript":"hi","end_of_turn_confidence":0.000014,'
    '"words":[{"start":1920,"end":2000,"text":"hi","confidence":0.874618,"word_is_final":true},'
    '{"start":2800,"end":2880,"text":"my","confidence":0.812831,"word_is_final":false}],"utterance":"","type":"Turn"}'
)
REVISION = (
    '{"type":"SpeakerRevision","revisions":[{"turn_order":3,"speaker_label":"B","words":[{"start":10355,"end":11615,'
    '"text":"Thanks,","confidence":0.796582,"speaker":"B","word_is_final":true}]}]}'
)
ERROR = '{"type":"Error","error_code":3008,"error":"Session Expired: Maximum session duration exceeded"}'
TERMINATION = '{"type":"Termination","audio_duration_seconds":69,"session_duration_seconds":73}'
UNUSED = {
    "SpeechStarted": '{"type":"SpeechStarted","timestamp":1216,"confidence":0.959314}',
    "Heartbeat": '{"type":"Heartbeat","total_audio_received_ms":9888,"total_duration_ms":10096,"realtime_factor":0.9983}',
    "Silence": '{"type":"Silence","start_ms":10000,"end_ms":11000}',
    "Warning": '{"type":"Warning","warning_code":1000,"warning":"text"}',
    "LLMGatewayResponse": '{"type":"LLMGatewayResponse","turn_order":0,"transcript":"Hello.","data":{"usage":{}}}',
    "Tomorrow": '{"type":"Tomorrow","error":"not one of ours","turn_order":"zero"}',
}


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (BEGIN, Begin("12c77068-02b3-4941-a960-275a65230e31", 1790221526, Configuration("u3-rt-pro"))),
        ('{"type":"Begin","id":"x"}', Begin("x")),
        ('{"type":"Begin","id":"x","expires_at":null,"configuration":null}', Begin("x")),
        (
            PRO_FINAL,
            Turn(
                0, True, True, "Harbor Point.", 1.0, language_code="en", speaker_label="A",
                words=[
                    Word(text="Harbor", start=0, end=472, confidence=0.969633, word_is_final=True),
                    Word(text="Point.", start=480, end=810, confidence=0.998, word_is_final=True, speaker="A"),
                ],
            ),
        ),
        (
            US_PARTIAL,
            Turn(
                0, False, False, "hi", 0.000014,
                words=[
                    Word(text="hi", start=1920, end=2000, confidence=0.874618, word_is_final=True),
                    Word(text="my", start=2800, end=2880, confidence=0.812831),
                ],
            ),
        ),
        ('{"type":"Turn","turn_order":4}', Turn(4)),
        (
            REVISION,
            SpeakerRevision([Revision(3, "B", [
                Word(text="Thanks,", start=10355, end=11615, confidence=0.796582, speaker="B", word_is_final=True)
            ])]),
        ),
        (
            '{"type":"SpeakerRevision","revisions":[{"turn_order":3,"words":[{"start":1,"end":2,"text":"a"}]}]}',
            SpeakerRevision([Revision(3, None, [Word(text="a", start=1, end=2)])]),
        ),
        (ERROR, ErrorFrame(3008, "Session Expired: Maximum session duration exceeded")),
        (TERMINATION, Termination(69, 73)),
        ('{"type":"Termination"}', Termination()),
    ],
)  # fmt: skip
def test_what_is_documented_is_understood(frame: str, message: protocol.Message, as_bytes: bool) -> None:
    assert decode(frame.encode() if as_bytes else frame) == message


@pytest.mark.parametrize("name", UNUSED)
def test_a_type_of_no_use_is_a_value(name: str) -> None:
    assert decode(UNUSED[name]) == Unknown(name)


@pytest.mark.parametrize(
    ("frame", "code", "text"),
    [
        ('{"error":"Not authorized"}', None, "Not authorized"),
        ('{"error_code":1008,"error":"Unauthorized Connection"}', 1008, "Unauthorized Connection"),
        ('{"type":"Error","error":"Session Cancelled"}', None, "Session Cancelled"),
        ('{"type":null,"error":"x","extra":[1]}', None, "x"),
        ('{"type":"Error","error_code":"3005","error":"a code as text"}', None, "a code as text"),
        ('{"error":{"message":"an object"},"error_code":3005}', 3005, '{"message":"an object"}'),
        ('{"type":"Error"}', None, ""),
    ],
)
def test_errors_of_older_services_are_errors(frame: str, code: int | None, text: str) -> None:
    assert decode(frame) == ErrorFrame(code, text)


@pytest.mark.parametrize(
    "frame",
    [
        "", "{", "null", "[]", '"Begin"', "5", "{}", '{"type":5}', '{"type":"Turn"}', '{"type":"Begin"}', '{"error":null}',
        '{"type":"Turn","turn_order":"0"}', '{"type":"Turn","turn_order":0,"words":[{"text":"a"}]}',
        '{"type":"Turn","turn_order":-1}', '{"type":"Turn","turn_order":1e400}', '{"type":"Turn","turn_order":9999999999}',
        '{"type":"Turn","turn_order":0,"words":[{"text":"a","start":1e300,"end":2}]}',
        '{"type":"Turn","turn_order":0,"words":[{"text":"a","start":0,"end":-1e300}]}',
        '{"type":"Termination","audio_duration_seconds":NaN}', '{"type":"Begin","id":"\\ud800"}',
        '{"type":"Turn","turn_order":0,"words":' + "[" * 100_000, '{"type":"X","y":' + "[" * 100_000,
        b"\xff\xfe", b'{"type":"Begin","id":"\xff"}', b"\x00" * 3200,
    ],
)  # fmt: skip
def test_what_cannot_be_is_malformed_and_says_so_shortly(frame: str | bytes) -> None:
    with pytest.raises(Malformed) as caught:
        decode(frame)
    assert isinstance(caught.value, UpstreamError)
    assert caught.value.code == "upstream_protocol"
    assert len(caught.value.detail) < 200, "the frame is not quoted"


def test_ten_thousand_mutated_frames_are_messages_or_malformed() -> None:
    dice = random.Random(7)
    sources = [
        frame.encode() for frame in (BEGIN, PRO_FINAL, US_PARTIAL, REVISION, ERROR, TERMINATION, *UNUSED.values())
    ]
    counts = {"understood": 0, "malformed": 0}
    for _ in range(10_000):
        frame = bytearray(dice.choice(sources))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(frame))
            match dice.randrange(4):
                case 0:
                    frame[at] = dice.randrange(256)
                case 1:
                    del frame[at : at + dice.randint(1, 30)]
                case 2:
                    frame[at:at] = dice.choice([b"0", b"-", b"e9", b"null", b'"', b"{", b"[", b"\\u0000", b"9" * 30])
                case _:
                    frame[at:at] = dice.choice(sources)
            if not frame:
                break
        try:
            message = decode(bytes(frame))
        except Malformed:
            counts["malformed"] += 1
        else:
            assert isinstance(message, get_args(protocol.Message))
            counts["understood"] += 1
    assert min(counts.values()) > 500, "both kinds were met"


# --- the query string ------------------------------------------------------------------------------------------------


def test_the_query_is_encoded_as_the_service_wants_it() -> None:
    options: dict[str, Any] = {
        "speech_model": "u3-rt-pro", "format_turns": True, "language_detection": False, "vad_threshold": 0.4,
        "min_turn_silence": 400, "keyterms_prompt": ["a b", 'c"&=', "ü"], "prompt": "a + b\nc",
    }  # fmt: skip
    text = query(options, sample_rate=11_025)
    assert text.startswith("sample_rate=11025&encoding=pcm_s16le&speech_model=u3-rt-pro&format_turns=true&")
    pairs = parse_qsl(text, strict_parsing=True)
    assert len(pairs) == len(dict(pairs)) == 9, "nothing is repeated"
    sent = dict(pairs)
    assert (sent["language_detection"], sent["vad_threshold"], sent["min_turn_silence"]) == ("false", "0.4", "400")
    assert json.loads(sent["keyterms_prompt"]) == ["a b", 'c"&=', "ü"], "one JSON list"
    assert sent["prompt"] == "a + b\nc"
    assert text.isascii()


@given(st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.lists(st.text()), st.integers()), max_size=4))
def test_every_value_arrives_as_it_was_given(options: dict[str, Any]) -> None:
    sent = parse_qsl(query(options, sample_rate=8000), keep_blank_values=True)
    assert sent[:2] == [("sample_rate", "8000"), ("encoding", "pcm_s16le")]
    for (name, value), (given_name, given_value) in zip(sent[2:], options.items(), strict=True):
        assert name == given_name
        assert (json.loads(value) if isinstance(given_value, list) else value) in (given_value, str(given_value))


# --- how sessions end ------------------------------------------------------------------------------------------------

KINDS: tuple[EndKind, ...] = get_args(EndKind)
CODES = {
    "refused": [*range(100, 600)],
    "closed": [None, *range(1000, 1016), *range(3000, 3020), *range(4000, 4104), 65_535],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reason", ["", "See Error message for details", "odd {text} {0} 100 %", "x" * 5000])
def test_every_end_has_a_verdict(kind: EndKind, reason: str) -> None:
    for code in CODES.get(kind, [None]):
        verdict = classify(SessionEnd(kind=kind, code=code, reason=reason))
        assert verdict.action in get_args(Action)
        assert verdict.error in ("upstream_auth", "upstream_rejected", "upstream_unavailable", "upstream_protocol")
        assert verdict.message[0].isupper()
        assert verdict.message[-1] == "."


def test_every_row_of_the_table_is_reached_and_names_its_source() -> None:
    reached = set()
    texts = ["", *(row.text.split("|")[0].replace("(concurrent )?", "").replace(r"\b", "") for row in ENDS)]
    for kind in KINDS:
        for code in CODES.get(kind, [None]):
            for text in texts:
                end = SessionEnd(kind=kind, code=code, reason=text)
                verdict = classify(end)
                reached |= {
                    at for at, row in enumerate(ENDS)
                    if kind in row.kinds and (row.action, row.error) == (verdict.action, verdict.error)
                    and verdict.message.startswith(row.message.partition("{")[0])
                }  # fmt: skip
    assert reached == set(range(len(ENDS)))
    assert all(row.source for row in ENDS)


DOCUMENTED: list[tuple[EndKind, int | None, str, Action, str]] = [
    ("closed", 1000, "", "retry", "upstream_unavailable"),
    ("closed", 1000, "Session Ended", "retry", "upstream_unavailable"),
    ("closed", 1001, "", "retry", "upstream_unavailable"),
    ("closed", 1005, "", "retry", "upstream_unavailable"),
    ("closed", 1006, "", "retry", "upstream_unavailable"),
    ("closed", None, "", "retry", "upstream_unavailable"),
    ("closed", 1008, "Unauthorized Connection: Missing Authorization header", "fail", "upstream_auth"),
    ("closed", 1008, "Unauthorized Connection: Invalid API key", "fail", "upstream_auth"),
    ("closed", 1008, "Unauthorized Connection: Signature has expired", "fail", "upstream_auth"),
    ("closed", 1008, "Unauthorized Connection: Insufficient funds", "fail", "upstream_auth"),
    ("closed", 1008, "See Error message for details", "fail", "upstream_auth"),
    ("closed", 1008, "Unauthorized Connection: Too many concurrent sessions", "wait", "upstream_unavailable"),
    ("closed", 1008, "UNAUTHORIZED CONNECTION: TOO MANY CONCURRENT SESSIONS", "wait", "upstream_unavailable"),
    ("closed", 3009, "Too many concurrent sessions", "wait", "upstream_unavailable"),
    ("closed", 3009, "", "wait", "upstream_unavailable"),
    ("closed", 3005, "Too many concurrent sessions", "wait", "upstream_unavailable"),
    ("closed", 1009, "", "fail", "upstream_protocol"),
    ("closed", 1011, "", "retry", "upstream_unavailable"),
    ("closed", 1012, "", "retry", "upstream_unavailable"),
    ("closed", 1013, "", "retry", "upstream_unavailable"),
    ("closed", 3005, "Session Cancelled: An error occurred", "retry", "upstream_unavailable"),
    ("closed", 3005, "See Error message for details", "retry", "upstream_unavailable"),
    (
        "closed", 3006, "User Input Validation Error: Invalid 'sample_rate': Value error, sample_rate must be at least 8,000 Hz",
        "fail", "upstream_rejected",
    ),
    (
        "closed", 3006, "User Input Validation Error: Invalid 'keyterms_prompt': Value error, Invalid JSON array",
        "fail", "upstream_rejected",
    ),
    (
        "closed", 3006, "User Input Validation Error: Invalid 'inactivity_timeout': Value error, must be at least 5",
        "fail", "upstream_rejected",
    ),
    (
        "closed", 3005, "User Input Validation Error: Invalid 'prompt': too long", "fail", "upstream_rejected",
    ),
    ("closed", 3006, "Invalid JSON: Expecting property name enclosed in double quotes", "fail", "upstream_protocol"),
    ("closed", 3006, "Invalid Message Type: Bogus", "fail", "upstream_protocol"),
    ("closed", 3006, "", "fail", "upstream_rejected"),
    (
        "closed", 3006, "Session terminated due to inactivity: No messages received for 5 seconds",
        "retry", "upstream_unavailable",
    ),
    (
        "closed", 3007, "Input Duration Error: Input Duration Violation: 20.0 ms. Expected between 50 and 1000 ms",
        "fail", "upstream_protocol",
    ),
    (
        "closed", 3007,
        "Input Duration Error: Audio Transmission Rate Exceeded: Received 314.9 sec. audio in 1.312326 sec",
        "once", "upstream_protocol",
    ),
    ("closed", 3007, "Audio Transmission Rate Exceeded: too much audio buffered", "once", "upstream_protocol"),
    ("closed", 3005, "Audio Transmission Rate Exceeded: Received 545 sec. audio", "once", "upstream_protocol"),
    ("closed", 3007, "", "fail", "upstream_protocol"),
    ("closed", 3008, "Session Expired: Maximum session duration exceeded", "rotate", "upstream_unavailable"),
    ("closed", 3008, "", "rotate", "upstream_unavailable"),
    ("closed", 3005, "Session Expired: Maximum session duration exceeded", "rotate", "upstream_unavailable"),
    ("closed", 4242, "odd", "once", "upstream_protocol"),
    ("closed", 3010, "", "once", "upstream_protocol"),
    ("refused", 401, "", "fail", "upstream_auth"),
    ("refused", 403, "", "fail", "upstream_auth"),
    ("refused", 404, "", "fail", "upstream_rejected"),
    ("refused", 410, "", "fail", "upstream_rejected"),
    ("refused", 408, "", "retry", "upstream_unavailable"),
    ("refused", 429, "", "wait", "upstream_unavailable"),
    ("refused", 500, "", "retry", "upstream_unavailable"),
    ("refused", 503, "", "retry", "upstream_unavailable"),
    ("refused", 200, "", "fail", "upstream_protocol"),
    ("refused", 302, "", "fail", "upstream_protocol"),
    ("lost", None, "reset", "retry", "upstream_unavailable"),
    ("silent", None, "", "retry", "upstream_unavailable"),
    ("stalled", None, "", "retry", "upstream_unavailable"),
    ("oversized", None, "", "retry", "upstream_unavailable"),
    ("unreachable", None, "no such host", "retry", "upstream_unavailable"),
    ("no_begin", None, "", "retry", "upstream_unavailable"),
    ("no_termination", None, "", "retry", "upstream_unavailable"),
    ("invalid", None, "", "fail", "upstream_protocol"),
    ("malformed", None, "", "fail", "upstream_protocol"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "code", "reason", "action", "error"), DOCUMENTED)
def test_each_documented_end_gets_its_verdict(
    kind: EndKind, code: int | None, reason: str, action: Action, error: str
) -> None:
    verdict = classify(SessionEnd(kind=kind, code=code, reason=reason))
    assert (verdict.action, verdict.error) == (action, error)


def test_the_text_of_a_failure_tells_what_upstream_said_and_what_to_do() -> None:
    verdict = classify(SessionEnd(kind="closed", code=1008, reason="Unauthorized Connection: Invalid API key"))
    assert "Invalid API key" in verdict.message
    assert "ASSEMBLYAI_API_KEY" in verdict.message
    refused = classify(SessionEnd(kind="refused", code=410))
    assert "410" in refused.message
    assert "TURNWIRE_UPSTREAM_URL" in refused.message


def test_the_end_travels_with_its_exception() -> None:
    end = SessionEnd(kind="closed", code=3005, reason="gone", retry_after=2.5)
    assert SessionEnded(end).end is end
    assert "3005" in str(SessionEnded(end))
    with pytest.raises(AttributeError):
        end.code = 1  # type: ignore[misc]
    assert msgspec.structs.asdict(end)["retry_after"] == 2.5
