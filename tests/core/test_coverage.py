"""What became of every millisecond, against a count of each of them; and where the next session starts."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.coverage import OVERLAP_MS, TOLERANCE_MS, coverage, known_to, resume_from
from service.core.job import Coverage, Gap, Session
from tests.doubles import a_session

FILE_MS = 60


def account(
    sessions: Sequence[Session],
    finalized: Mapping[str, int] | None = None,
    *,
    file_ms: int = 10_000,
    channels: Sequence[int | None] = (None,),
) -> Coverage:
    return coverage(file_ms=file_ms, sessions=sessions, finalized=finalized or {}, channels=channels)


def session(
    name: str, offset_ms: int, sent_ms: int, upstream_s: float | None = None, channel: int | None = None
) -> Session:
    return a_session(name, offset_ms=offset_ms, sent_ms=sent_ms, audio_duration_seconds=upstream_s, channel=channel)


# --- one case at a time ----------------------------------------------------------------------------------------------


def test_a_session_that_took_it_all_and_terminated() -> None:
    whole = account([session("s", 0, 10_000, 10)], {"s": 9_400})
    assert whole == Coverage(
        file_ms=10_000, sent_ms=10_000, upstream_ms=10_000, gaps=[], last_word_ms=9_400, complete=True
    )


def test_nothing_happened() -> None:
    assert account([]) == Coverage(
        file_ms=10_000, sent_ms=0, upstream_ms=None, gaps=[Gap(0, 10_000)], last_word_ms=None, complete=False
    )


def test_a_session_without_termination_counts_up_to_its_last_final() -> None:
    lost = account([session("s", 0, 8_000)], {"s": 5_000})
    assert (lost.sent_ms, lost.upstream_ms, lost.gaps, lost.complete) == (8_000, None, [Gap(5_000, 10_000)], False)


def test_a_lost_session_and_its_successor_leave_no_gap() -> None:
    healed = account([session("a", 0, 8_000), session("b", 5_000, 5_000, 5)], {"a": 5_000, "b": 9_900})
    assert (healed.sent_ms, healed.upstream_ms, healed.gaps, healed.complete) == (10_000, 5_000, [], True)


def test_what_was_skipped_between_sessions_is_a_gap() -> None:
    holed = account([session("a", 0, 4_000, 4), session("b", 6_000, 4_000, 4)])
    assert (holed.sent_ms, holed.gaps, holed.complete) == (8_000, [Gap(4_000, 6_000)], False)


def test_a_word_said_to_end_after_what_was_sent_covers_no_more_than_that() -> None:
    """Upstream stretches the last word of a turn by up to 1.3 s."""
    early = account([session("s", 0, 4_200)], {"s": 5_000})
    assert early.gaps == [Gap(4_200, 10_000)]
    assert early.last_word_ms == 5_000
    assert resume_from([session("s", 0, 4_200)], {"s": 5_000}) == 4_200


@pytest.mark.parametrize(
    ("upstream_s", "complete"), [(10, True), (8.5, True), (11.5, True), (8.499, False), (11.501, False), (0, False)]
)
def test_upstream_may_differ_by_a_second_and_a_half(upstream_s: float, complete: bool) -> None:
    judged = account([session("s", 0, 10_000, upstream_s)])
    assert judged.complete == complete
    assert judged.gaps == []
    assert judged.upstream_ms == round(upstream_s * 1000)
    assert TOLERANCE_MS == 1500


def test_each_terminated_session_is_judged_by_itself() -> None:
    """Two errors that cancel out are still two errors."""
    assert not account([session("a", 0, 5_000, 3), session("b", 5_000, 5_000, 7)]).complete
    assert account([session("a", 0, 5_000, 4), session("b", 5_000, 5_000, 6)]).complete


def test_what_a_session_denies_may_be_heard_again() -> None:
    denied = session("a", 0, 10_000, 4)
    assert resume_from([denied], {"a": 3_000}) == 3_000
    assert account([denied, session("b", 3_000, 7_000, 7)], {"a": 3_000}).complete
    assert not account([denied, session("b", 3_001, 6_999, 7)], {"a": 3_000}).complete, "a part is still denied"
    assert not account([denied, session("b", 3_000, 7_000, 5)], {"a": 3_000}).complete, "denied again"
    assert not account([session("b", 3_000, 7_000, 7), denied], {"a": 3_000}).complete, "it was denied after that"
    assert account([denied, session("b", 9_999, 1, 0)], {"a": 10_000}).complete


def test_the_newest_session_of_a_channel_must_have_terminated() -> None:
    finals_to_the_end = [session("a", 0, 10_000)]
    assert account(finals_to_the_end, {"a": 10_000}).gaps == []
    assert not account(finals_to_the_end, {"a": 10_000}).complete


def test_each_channel_is_accounted_for_by_itself() -> None:
    left, right = session("l", 0, 10_000, 10, channel=0), session("r", 0, 7_000, 7, channel=1)
    split = account([left, right], channels=[0, 1])
    assert (split.sent_ms, split.upstream_ms, split.gaps) == (7_000, 17_000, [Gap(7_000, 10_000)])
    assert not split.complete
    assert account([left], channels=[0, 1]).gaps == [Gap(0, 10_000)]
    assert account([left], channels=[0]).complete


# --- against a count of every millisecond ----------------------------------------------------------------------------

SESSIONS = st.lists(
    st.tuples(
        st.integers(0, FILE_MS), st.integers(0, FILE_MS + 5), st.one_of(st.none(), st.floats(0, 0.1)),
        st.sampled_from([0, 1]), st.one_of(st.none(), st.integers(0, FILE_MS + 5)),
    ),
    max_size=6,
)  # fmt: skip


@given(SESSIONS)
def test_every_millisecond_is_judged_as_the_contract_says(
    rows: list[tuple[int, int, float | None, int, int | None]],
) -> None:
    sessions, finalized = [], {}
    for n, (offset, sent, upstream, channel, final) in enumerate(rows):
        sessions.append(session(f"s{n}", offset, sent, upstream, channel))
        if final is not None:
            finalized[f"s{n}"] = final
    judged = account(sessions, finalized, file_ms=FILE_MS, channels=[0, 1])

    def got(one: Session, ms: int) -> bool:
        return one.offset_ms <= ms < one.offset_ms + one.sent_ms

    def known(one: Session, ms: int) -> bool:
        terminated = one.audio_duration_seconds is not None
        return got(one, ms) and (terminated or ms < finalized.get(one.id, 0))

    gap_ms = set()
    handed = {0: 0, 1: 0}
    for ms in range(FILE_MS):
        for channel in (0, 1):
            own = [one for one in sessions if one.channel == channel]
            handed[channel] += any(got(one, ms) for one in own)
            if not any(known(one, ms) for one in own):
                gap_ms.add(ms)
    assert {ms for gap in judged.gaps for ms in range(gap.from_ms, gap.to_ms)} == gap_ms
    assert all(a.to_ms < b.from_ms for a, b in zip(judged.gaps, judged.gaps[1:], strict=False)), (
        "in order, none touching"
    )
    assert all(0 <= gap.from_ms < gap.to_ms <= FILE_MS for gap in judged.gaps)
    assert judged.sent_ms == min(handed.values())
    assert judged.last_word_ms == max(finalized.values(), default=None)
    told = [one for one in sessions if one.audio_duration_seconds is not None]
    assert (judged.upstream_ms is None) == (not told)
    if judged.complete:
        assert not gap_ms


# --- where the next session starts -----------------------------------------------------------------------------------


def test_the_first_session_starts_at_the_beginning() -> None:
    assert resume_from([], {}) == 0


def test_after_a_loss_at_the_last_final() -> None:
    assert resume_from([session("a", 0, 8_000)], {"a": 5_000}) == 5_000
    assert resume_from([session("a", 0, 8_000)], {}) == 0
    assert resume_from([session("a", 0, 8_000), session("b", 5_000, 600)], {"a": 5_000}) == 5_000


def test_after_a_proper_end_with_a_little_said_again() -> None:
    assert resume_from([session("a", 0, 8_000, 8)], {"a": 5_000}) == 8_000 - OVERLAP_MS
    assert resume_from([session("a", 0, 8_000, 8)], {"a": 7_900}) == 7_900, "but never what is final"


@given(SESSIONS)
def test_no_audio_is_skipped(rows: list[tuple[int, int, float | None, int, int | None]]) -> None:
    """A session starts where the one before was known to have heard everything, or earlier, never before its last final."""
    sessions: list[Session] = []
    finalized: dict[str, int] = {}
    for n, (_, sent, upstream, _, final) in enumerate(rows):
        start = resume_from(sessions, finalized)
        assert start <= max((known_to(one, finalized) for one in sessions), default=0)
        assert start >= max(finalized.values(), default=0)
        sessions.append(session(f"s{n}", start, sent, upstream))
        if final is not None:
            finalized[f"s{n}"] = min(start + final, start + sent)
    reached = max((known_to(one, finalized) for one in sessions), default=0)
    judged = account(sessions, finalized, file_ms=reached)
    assert judged.gaps == []
