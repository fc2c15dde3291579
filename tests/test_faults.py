"""Matrix A: what goes wrong upstream, and that every word comes exactly once all the same, or the job fails with the
right error.

The audio says where it is (`tests/marked.py`): words are numbered in the file, blocks of 10 ms are marked, so that a
seam that skips or doubles shows.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from service.sandbox import faults as f
from tests.kit import Kit, running, spoken, statuses
from tests.marked import blocks, marked_wav, words

DURATION_MS = 6000
WORDS = words(DURATION_MS // 200)


def plan(*steps: f.Step, session: str = "1") -> f.FaultPlan:
    return f.FaultPlan({session: list(steps)})


class Row(NamedTuple):
    faults: f.FaultPlan
    lost: int = 1  # session.lost events
    warning: str | None = None
    complete: bool = True


E, C = f.ErrorFrame, f.Close
HEALED: dict[str, Row] = {
    "no fault": Row(f.FaultPlan(), lost=0),
    "A1 503 once": Row(plan(f.Refuse(status=503))),
    "A1 503 three times, told once": Row(plan(f.Refuse(status=503), session="1-3")),
    "A4 3005 mid-turn": Row(plan(E(at_ms=1300))),
    "A4 3005 right after Begin": Row(plan(E(on="begin"))),
    "A4 3005 before Begin": Row(plan(E(on="open"))),
    "A4 1011 bare close": Row(plan(C(at_ms=2100, code=1011))),
    "A4 1013 before Begin": Row(plan(E(name="try_later"))),
    "A4 1001 going away": Row(plan(C(at_ms=3900, code=1001))),
    "A4 1012 restart": Row(plan(C(at_ms=700, code=1012))),
    "A4 close 1000 before Termination": Row(plan(C(at_ms=2500, code=1000))),
    "A4 empty close": Row(plan(f.Eof(at_ms=1500))),
    "A4 connection reset": Row(plan(f.Drop(at_ms=1700))),
    "A4 reset in the last chunk": Row(plan(f.Drop(at_ms=5950))),
    "A4 three losses in a row": Row(plan(f.Drop(at_ms=900), session="1-3"), lost=3),
    "A4 reset at Terminate": Row(plan(f.Drop(on="terminate"))),
    "A4 3005 at Terminate": Row(plan(E(on="terminate"))),
    "A5 too fast, once": Row(plan(E(at_ms=2000, name="rate"))),
    "A6 session expired": Row(plan(E(at_ms=2600, name="expired"))),
    "A6 rotated before it expires": Row(plan(f.ExpiresIn(seconds=4)), lost=0),
    "A6 rotated again and again": Row(f.FaultPlan({"1-4": [f.ExpiresIn(seconds=2)]}), lost=0),
    "A7 half-open": Row(plan(f.Silent(at_ms=1000))),
    "A8 stops reading": Row(plan(f.StopReading(at_ms=1000))),
    "A10 unsolicited pongs": Row(plan(f.Pong(times=20, at_ms=500)), lost=0),
    "A10 server pings": Row(plan(f.Pings(every=0.5)), lost=0),
    "A11 late Termination": Row(plan(f.LateTermination(seconds=20)), lost=0),
    "A12 no Termination, once": Row(plan(f.NoTermination(then="hang"))),
    "A12 close without Termination, once": Row(plan(f.NoTermination(then="close"))),
    "A12 eof without Termination, once": Row(plan(f.NoTermination(then="eof"))),
    "A12 never Termination": Row(plan(f.NoTermination(then="drop"), session="*"), lost=2, warning="no_termination", complete=False),
    "A13 malformed JSON": Row(plan(f.Malformed(times=3, at_ms=800)), lost=0),
    "A13 a binary frame": Row(plan(f.Binary(times=2, at_ms=800)), lost=0),
    "A13 unknown types": Row(plan(f.UnknownType(times=30, at_ms=800)), lost=0),
    "A13 a frame of 30 MB": Row(plan(f.Huge(at_ms=1200))),
    "A14 duplicate finals": Row(plan(f.DuplicateFinal()), lost=0),
    "A14 late partials": Row(plan(f.LatePartial()), lost=0),
    "A14 swapped finals": Row(plan(f.SwapFinals(turn=1)), lost=0),
    "A14 late twins": Row(plan(f.LateTwin()), lost=0),
    "A15 Error frame without code": Row(plan(E(at_ms=1500, with_code=False, with_type=False))),
    "no Begin at first": Row(plan(f.NoBegin())),
    "a slow Begin": Row(plan(f.DelayBegin(seconds=6)), lost=0),
    "no configuration in Begin": Row(plan(f.NoConfiguration()), lost=0),
    "inactivity": Row(plan(E(at_ms=1500, name="inactivity"))),
    "no close frame after Termination": Row(plan(f.NoClose()), lost=0),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALED)
async def test_every_word_exactly_once(tmp_path: Path, name: str) -> None:
    row = HEALED[name]
    async with running(tmp_path, faults=row.faults) as kit:
        job, events = await kit.run(marked_wav(DURATION_MS))
        assert (job.status, job.error) == ("completed", None)
        said = spoken(events)  # turns are in order of arrival
        assert (sorted(said, key=lambda word: int(word[1:])) if "swapped" in name else said) == WORDS
        assert sum(event["type"] == "session.lost" for event in events) == row.lost
        assert job.coverage is not None
        assert job.coverage.complete == row.complete
        codes = [notice.code for notice in job.warnings]
        assert codes == ([] if row.complete else [row.warning, "incomplete_coverage"])
        assert job.coverage.last_word_ms == DURATION_MS
        heard = {n for session in kit.sandbox.sessions for n in blocks(bytes(session.audio))}
        assert heard == set(range(DURATION_MS // 10)), "every 10 ms was handed to some session"
        _check_times(events)


def _check_times(events: list[dict[str, Any]]) -> None:
    """Words are where the file has them, whichever session heard them."""
    for event in events:
        if event["type"] == "turn.final":
            for word in event["turn"]["words"]:
                number = int(word["text"].lower().strip("w."))
                assert (word["start_ms"], word["end_ms"]) == (number * 200, number * 200 + 200)


class Fatal(NamedTuple):
    faults: f.FaultPlan
    error: str
    upstream_code: int | None
    says: str
    kept: int = 0  # words kept from before
    knocks: int = 1


FATAL: dict[str, Fatal] = {
    "A2 401": Fatal(plan(f.Refuse(status=401), session="*"), "upstream_auth", 401, "ASSEMBLYAI_API_KEY"),
    "A2 403": Fatal(plan(f.Refuse(status=403), session="*"), "upstream_auth", 403, "ASSEMBLYAI_API_KEY"),
    "A2 1008 bad key": Fatal(plan(E(name="bad_key"), session="*"), "upstream_auth", 1008, "Invalid API key"),
    "A2 1008 account": Fatal(plan(E(name="account"), session="*"), "upstream_auth", 1008, "Insufficient funds"),
    "A2 1008 expired": Fatal(plan(E(name="expired_token"), session="*"), "upstream_auth", 1008, "Signature has expired"),
    "A5 3006 bad option": Fatal(plan(E(name="validation"), session="*"), "upstream_rejected", 3006, "Invalid 'speech_model'"),
    "A5 3007 chunk length": Fatal(plan(E(at_ms=2050, name="duration")), "upstream_protocol", 3007, "Input Duration Violation", kept=8),
    "A5 too fast, again": Fatal(plan(E(at_ms=1000, name="rate"), session="*"), "upstream_protocol", 3007, "faster than real time", kept=8, knocks=2),
    "A13 ten bad frames": Fatal(plan(f.Malformed(times=10, at_ms=1050)), "upstream_protocol", None, "does not speak the streaming protocol", kept=4),
    "A16 wrong Accept": Fatal(plan(f.WrongAccept(), session="*"), "upstream_protocol", None, "TURNWIRE_UPSTREAM_URL"),
    "A16 302": Fatal(plan(f.Refuse(status=302, location="http://127.0.0.1:1/"), session="*"), "upstream_protocol", 302, "TURNWIRE_UPSTREAM_URL"),
    "A16 200": Fatal(plan(f.Refuse(status=200), session="*"), "upstream_protocol", 200, "TURNWIRE_UPSTREAM_URL"),
    "410 of the old endpoint": Fatal(plan(f.Refuse(status=410), session="*"), "upstream_rejected", 410, "TURNWIRE_UPSTREAM_URL"),
    "an unknown code, twice": Fatal(plan(C(at_ms=900, code=4242, reason="odd"), session="*"), "upstream_protocol", 4242, "4242 odd", kept=8, knocks=2),
}  # fmt: skip


@pytest.mark.parametrize("name", FATAL)
async def test_the_right_error(tmp_path: Path, name: str) -> None:
    row = FATAL[name]
    async with running(tmp_path, faults=row.faults) as kit:
        job, events = await kit.run(marked_wav(DURATION_MS))
        assert job.status == "failed"
        assert job.error is not None
        assert (job.error.code, job.error.upstream_code) == (row.error, row.upstream_code)
        assert row.says in job.error.message
        assert kit.sandbox.knocks == row.knocks
        assert spoken(events) == WORDS[: row.kept], "what was transcribed is kept"
        lost = [event for event in events if event["type"] == "session.lost"]
        assert lost[-1]["retry_in_ms"] is None
        assert job.coverage is not None
        assert not job.coverage.complete


async def test_an_outage_is_waited_out_for_the_patience_and_no_longer(tmp_path: Path) -> None:
    async with running(tmp_path, faults=plan(f.Refuse(status=503), session="2-"), upstream_patience=20) as kit:
        kit.sandbox.faults = f.FaultPlan({"1": [f.Drop(at_ms=1500)], "2-": [f.Refuse(status=503)]})
        job, events = await kit.run(marked_wav(DURATION_MS))
        assert job.error is not None
        assert (job.error.code, job.error.retryable, job.error.upstream_code) == ("upstream_unavailable", True, 503)
        assert kit.sandbox.knocks > 3
        assert spoken(events) == WORDS[:4]
        assert ("processing", "reconnecting") in statuses(events)


@pytest.mark.parametrize("fault", ["too_many", "too_many_3009"])
async def test_no_capacity_sends_the_job_back_to_the_queue(tmp_path: Path, fault: str) -> None:
    async with running(tmp_path, faults=plan(E(name=fault), session="1-2"), speed=40) as kit:
        job, events = await kit.run(marked_wav(2000))
        assert (job.status, job.attempt) == ("completed", 3)
        assert spoken(events) == words(10)
        course = statuses(events)
        assert course.count(("processing", "waiting_for_capacity")) == 2
        assert course.count(("queued", None)) == 3


async def test_429_honours_retry_after_and_keeps_what_was_said(tmp_path: Path) -> None:
    faults = f.FaultPlan({"1": [f.Drop(at_ms=2500)], "2": [f.Refuse(status=429, retry_after=7)]})
    async with running(tmp_path, faults=faults) as kit:
        job, events = await kit.run(marked_wav(DURATION_MS))
        assert (job.status, job.attempt) == ("completed", 2)
        assert spoken(events) == WORDS
        lost = [event["retry_in_ms"] for event in events if event["type"] == "session.lost"]
        assert lost[-1] == 7000


async def test_closing_at_any_chunk_loses_nothing(tmp_path: Path) -> None:
    """A4 at 20 points, all jobs at once."""
    points = range(50, DURATION_MS, DURATION_MS // 20)
    faults = f.FaultPlan(
        {str(n): [f.Drop(at_ms=at) if n % 2 else C(at_ms=at, code=1011)] for n, at in enumerate(points, 1)}
    )
    async with running(tmp_path, faults=faults, speed=4) as kit:
        await _many(kit, len(points))


async def _many(kit: Kit, count: int) -> None:
    import asyncio

    results = await asyncio.gather(*(kit.run(marked_wav(DURATION_MS)) for _ in range(count)))
    for job, events in results:
        assert job.status == "completed"
        assert spoken(events) == WORDS
