"""What became of every millisecond of the file. FLOOR 0.

A range counts as covered when a session that ended with Termination was handed it, or when a session finalized past
it. Anything else is a gap. `complete` means: no gap, and each terminated session says it processed what it was sent,
give or take 1,500 ms, because upstream counts whole seconds, or what it did not finalize was heard again by sessions
that do; and each channel's newest session was properly terminated, for only that says that nothing was still to be
said.
"""

from collections.abc import Mapping, Sequence

from service.core.job import Coverage, Gap, Session

TOLERANCE_MS = 1500
OVERLAP_MS = 1000


def coverage(
    *, file_ms: int, sessions: Sequence[Session], finalized: Mapping[str, int], channels: Sequence[int | None]
) -> Coverage:
    """Account for the file; `finalized` maps a session's id to the end of its last final turn (ms of the file)."""
    gaps: list[tuple[int, int]] = []
    sent, ended = file_ms, True
    for channel in channels:
        own = [session for session in sessions if session.channel == channel]
        handed = _union([(s.offset_ms, s.offset_ms + s.sent_ms) for s in own], file_ms)
        known = _union([(s.offset_ms, known_to(s, finalized)) for s in own], file_ms)
        sent = min(sent, sum(end - start for start, end in handed))
        gaps += _complement(known, file_ms)
        ended = ended and bool(own) and own[-1].audio_duration_seconds is not None
    terminated = [s for s in sessions if s.audio_duration_seconds is not None]
    agrees = all(confirmed(s) or _heard_again(s, sessions, finalized) for s in terminated)
    merged = _union(gaps, file_ms)
    return Coverage(
        file_ms=file_ms,
        sent_ms=sent,
        upstream_ms=sum(_upstream_ms(s) for s in terminated) if terminated else None,
        gaps=[Gap(start, end) for start, end in merged],
        last_word_ms=max(finalized.values(), default=None),
        complete=not merged and agrees and ended,
    )


def known_to(session: Session, finalized: Mapping[str, int]) -> int:
    """The position (ms of the file) up to which a session is known to have processed its audio."""
    if session.audio_duration_seconds is not None:
        return session.offset_ms + session.sent_ms
    return max(session.offset_ms, _final_to(session, finalized))


def confirmed(session: Session) -> bool:
    """Whether upstream says that it processed what it was sent, to its end."""
    return session.audio_duration_seconds is not None and abs(_upstream_ms(session) - session.sent_ms) <= TOLERANCE_MS


def _heard_again(session: Session, sessions: Sequence[Session], finalized: Mapping[str, int]) -> bool:
    """Whether later sessions, that agree, were handed all that this one did not finalize: what a retry is for."""
    later = [s for s in sessions[sessions.index(session) + 1 :] if s.channel == session.channel and confirmed(s)]
    end = session.offset_ms + session.sent_ms
    start = min(max(session.offset_ms, _final_to(session, finalized)), end - 1)
    return all(
        gap_end <= start
        for _, gap_end in _complement(_union([(s.offset_ms, known_to(s, finalized)) for s in later], end), end)
    )


def resume_from(sessions: Sequence[Session], finalized: Mapping[str, int]) -> int:
    """Where in the file (ms) the next session of a channel starts, given those before it.

    At the end of the last final turn; what a session heard after that and did not finalize when it ended properly is
    known to be silence, but for a word that its end cut in two: that much is heard again, and not said twice because
    it was never said. A session that upstream does not confirm is believed only what it finalized.
    """
    return max((max(_final_to(s, finalized), _silent_to(s, finalized), s.offset_ms) for s in sessions), default=0)


def _silent_to(session: Session, finalized: Mapping[str, int]) -> int:
    return known_to(session, finalized) - OVERLAP_MS if confirmed(session) else 0


def _final_to(session: Session, finalized: Mapping[str, int]) -> int:
    """Upstream stretches the last word of a turn into the silence after it, even past what it has been sent."""
    return min(finalized.get(session.id, 0), session.offset_ms + session.sent_ms)


def _upstream_ms(session: Session) -> int:
    return round((session.audio_duration_seconds or 0) * 1000)


def _union(ranges: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted((start, min(end, limit)) for start, end in ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _complement(ranges: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for pair in ranges for edge in pair), limit]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
