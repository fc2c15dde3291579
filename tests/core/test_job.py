"""A job's transitions, its public form, and event frames that no text can break out of."""

import datetime
import json
from collections import deque

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.core.job import (
    TERMINAL,
    TERMINAL_EVENTS,
    TRANSITIONS,
    Claim,
    Coverage,
    Event,
    Failure,
    Gap,
    Job,
    Notice,
    Stage,
    Status,
    channels,
    hint,
    job_from_json,
    make_event,
    may_become,
    rfc3339,
    to_json,
    turn_from_json,
)
from tests.doubles import Message, a_job, a_session, a_turn, parse_event_stream

# --- transitions -----------------------------------------------------------------------------------------------------


def test_every_status_has_its_row_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(Status)
    seen, ahead = {Status.QUEUED}, deque([Status.QUEUED])
    while ahead:
        for target in TRANSITIONS[ahead.popleft()].values():
            if target not in seen:
                seen.add(target)
                ahead.append(target)
    assert seen == set(Status)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("target", Status)
def test_may_become_is_the_table(status: Status, target: Status) -> None:
    legal = {
        (Status.QUEUED, Status.PROCESSING), (Status.QUEUED, Status.CANCELED), (Status.QUEUED, Status.FAILED),
        (Status.PROCESSING, Status.COMPLETED), (Status.PROCESSING, Status.FAILED), (Status.PROCESSING, Status.CANCELED),
        (Status.PROCESSING, Status.QUEUED), (Status.PROCESSING, Status.PROCESSING),
        (Status.COMPLETED, Status.QUEUED), (Status.FAILED, Status.QUEUED), (Status.CANCELED, Status.QUEUED),
    }  # fmt: skip
    assert may_become(status, target) == ((status, target) in legal)


def test_what_is_terminal_is_left_by_a_retry_only_and_told_by_an_event_of_its_name() -> None:
    assert {f"job.{status}" for status in TERMINAL} == TERMINAL_EVENTS
    for status in Status:
        assert a_job(status=status).terminal == (status in TERMINAL)
        if status in TERMINAL:
            assert list(TRANSITIONS[status].values()) == [Status.QUEUED]
            assert all(cause.startswith("retry") for cause in TRANSITIONS[status])


# --- the public form -------------------------------------------------------------------------------------------------


def members(value: object) -> str:
    return " ".join(json.loads(to_json(value)))


def test_a_job_has_the_members_of_the_contract_in_its_order() -> None:
    assert members(a_job()) == (
        "id status stage created_at started_at finished_at filename audio options progress queue_position attempt "
        "sessions turn_count coverage warnings error metadata links"
    )
    assert members(a_job().audio) == "bytes sha256 duration_ms sample_rate channels encoding converted"
    assert members(a_session()) == (
        "id model channel offset_ms sent_ms audio_duration_seconds session_duration_seconds closed"
    )
    shown = json.loads(to_json(a_job()))
    assert (shown["status"], shown["stage"], shown["error"]) == ("queued", None, None)
    assert shown["links"] == {
        "self": "/jobs/j1", "events": "/jobs/j1/events", "transcript": "/jobs/j1/transcript",
        "audio": "/jobs/j1/audio", "view": "/jobs/j1/view",
    }  # fmt: skip


def test_a_turn_has_the_members_of_the_contract_in_its_order() -> None:
    assert members(a_turn()) == (
        "index start_ms end_ms transcript words formatted session_id turn_order end_of_turn_confidence "
        "language speaker channel latency_ms"
    )
    assert members(a_turn(text="hi").words[0]) == "text start_ms end_ms confidence speaker"


def test_jobs_and_turns_come_back_as_they_went() -> None:
    job = a_job(
        status=Status.PROCESSING, stage=Stage.STREAMING, sessions=[a_session("s", channel=1)], warnings=[Notice("a", "b")],
        error=Failure("internal", "m", True, 3005), metadata={"k": [None, 1.5]},
        coverage=Coverage(file_ms=1, sent_ms=1, upstream_ms=None, gaps=[Gap(0, 1)], last_word_ms=None, complete=False),
    )  # fmt: skip
    assert job_from_json(to_json(job)) == job
    assert turn_from_json(to_json(a_turn())) == a_turn()


def test_jobs_share_nothing() -> None:
    one, other = a_job(), a_job()
    one.sessions.append(a_session())
    one.warnings.append(Notice("a", "b"))
    assert (other.sessions, other.warnings) == ([], [])


def test_a_job_split_by_channel_has_a_stream_for_each() -> None:
    stereo = msgspec.structs.replace(a_job().audio, channels=2)
    assert channels(a_job()) == [None]
    assert channels(a_job(audio=stereo, options={"channels": "mix"})) == [None]
    assert channels(a_job(audio=stereo, options={"channels": "split"})) == [0, 1]


@given(st.integers(0, 4_102_444_800_000))
@example(1_732_181_727_123)
@example(999)
def test_times_are_rfc_3339_and_exact_to_the_millisecond(unix_ms: int) -> None:
    text = rfc3339(unix_ms)
    assert len(text) == len("2026-11-21T09:35:27.123Z")
    assert text.endswith("Z")
    parsed = datetime.datetime.fromisoformat(text)
    assert (
        round((parsed - datetime.datetime.fromtimestamp(0, datetime.UTC)) / datetime.timedelta(milliseconds=1))
        == unix_ms
    )


# --- events ----------------------------------------------------------------------------------------------------------

NASTY = [
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "\u2028",
    "\u2029",
    "\0",
    "\ufeff",
    "\x85",
    "data: x",
    "event: job.failed",
    "id: 7",
    ":",
    " ",
]
TEXT = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=8)), max_size=8).map("".join)
PAYLOAD = st.dictionaries(
    TEXT, st.one_of(TEXT, st.integers(-(2**53), 2**53), st.none(), st.lists(TEXT, max_size=3)), max_size=5
)


@given(PAYLOAD, st.one_of(st.none(), st.integers(1, 10**9)), st.sampled_from(["turn.final", "job.warning"]))
@example({"text": "a\r\nid: 7\n\nevent: job.failed\ndata: {}\n\n\u2028"}, 3, "turn.final")
def test_no_text_can_start_a_field(payload: dict[str, object], seq: int | None, kind: str) -> None:
    event = make_event("j1", seq, kind, 0, payload)
    before = make_event("j1", 1, "job.status", 0, {}).sse
    dispatched = parse_event_stream(b"retry: 2000\n\n: hello\n\n" + before + event.sse + b": ping\n\n")
    assert dispatched[1:] == [Message(kind, event.json.decode(), str(seq or 1))]
    assert b"\n" not in event.json
    assert b"\r" not in event.json
    assert json.loads(dispatched[1].data) == {"id": seq, "type": kind, "job_id": "j1", "at": rfc3339(0)} | payload


def test_an_event_names_itself_before_its_payload() -> None:
    event = make_event("j1", 4, "job.status", 0, {"status": Status.PROCESSING, "stage": Stage.STREAMING})
    assert event.json == (
        b'{"id":4,"type":"job.status","job_id":"j1","at":"1970-01-01T00:00:00.000Z","status":"processing","stage":"streaming"}'
    )
    assert event.sse == b"id: 4\nevent: job.status\ndata: " + event.json + b"\n\n"


def test_an_event_without_an_id_leaves_the_clients_last_one_alone() -> None:
    event = make_event("j1", None, "turn.partial", 0, {}, after_seq=9)
    assert b"id:" not in event.sse.split(b"data:")[0]
    assert event.after_seq == 9
    assert json.loads(event.json)["id"] is None


def test_an_event_from_the_log_is_the_event_that_was_made() -> None:
    made = make_event("j1", 4, "job.failed", 0, {"job": a_job()})
    assert Event("j1", 4, "job.failed", made.json) == made
    assert made.terminal
    assert not make_event("j1", 4, "job.restarted", 0, {}).terminal


def test_hints_are_never_durable() -> None:
    assert hint("j1", "deleted").seq is None


def test_a_claim_carries_what_its_writes_need() -> None:
    claim = Claim(job=a_job(), owner="me", epoch=2, event_seq=7, finalized={"s": 900})
    assert (claim.job.id, claim.epoch, claim.event_seq, claim.finalized) == ("j1", 2, 7, {"s": 900})


def test_job_is_typed_all_the_way_down() -> None:
    with pytest.raises(msgspec.ValidationError):
        job_from_json(to_json(a_job()).replace(b'"queued"', b'"asleep"'))
    assert isinstance(job_from_json(to_json(a_job())), Job)


# --- the parser that judges them -------------------------------------------------------------------------------------


def test_the_parser_reads_as_a_browser_does() -> None:
    stream = (
        b"\xef\xbb\xbf: a comment\r\nretry: 5\r\rid: 1\rdata: one\rdata:two\r\n\r\n"
        b"event: named\ndata\ndata:  x\n\nid: 2\nevent: no data, no event\n\nid: 3\0\ndata: z\nid\nfoo: bar\n\ndata: cut off"
    )
    assert parse_event_stream(stream) == [
        Message("message", "one\ntwo", "1"),
        Message("named", "\n x", "1"),
        Message("message", "z", ""),
    ]
