"""A transcript as txt, json, srt or vtt, during and after the run. FLOOR 0.

Invariants of the subtitles: cues are in order of time and never overlap, have at most two lines of 42 characters broken
at words, and last at most 7 s. Words carry the times, the transcript the text: where the two disagree, the text is
spread over the time of the words. The txt layout is the one AssemblyAI's file-streaming guide saves.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from service.core.job import Job, Session, Turn, TurnWord

LINE = 42
LINES = 2
MAX_CUE_MS = 7000
PAUSE_MS = 1500  # a longer silence inside a turn ends the cue
SHORT_CUE_MS = 1000  # shorter cues stay this long when there is room
SHORTEST_CUE_MS = 200  # and this long in any case, at the cost of the next one's start
SANDBOX = "sandbox"


def to_txt(job: Job, turns: Sequence[Turn]) -> bytes:
    """The layout of the guide, without its link line."""
    head = [
        f"AssemblyAI Session ID: {', '.join(session.id for session in job.sessions) or 'unknown'}",
        f"Audio file: {job.filename}",
        f"Audio duration: {job.audio.duration_ms / 1000:.2f} seconds",
    ]
    if _sandboxed(job):
        head.append(_SANDBOX_NOTE)
    body = [f"[Turn #{turn.index + 1}]: {_labelled(turn)}" for turn in turns]
    return "\n".join([*head, "", "Transcription Output", *body, ""]).encode()


class _Transcript(msgspec.Struct, kw_only=True):
    job_id: str
    status: str
    complete: bool
    model: str | None
    sessions: list[Session]
    duration_ms: int
    text: str
    turns: Sequence[Turn]


def to_json(job: Job, turns: Sequence[Turn]) -> bytes:
    """Everything; `complete` is what the job's coverage says, false before there is one."""
    models = [session.model for session in job.sessions if session.model]
    return msgspec.json.encode(
        _Transcript(
            job_id=job.id,
            status=job.status,
            complete=job.coverage is not None and job.coverage.complete,
            model=models[-1] if models else job.options.get("speech_model"),
            sessions=job.sessions,
            duration_ms=job.audio.duration_ms,
            text=" ".join(text for text in (_clean(turn.transcript) for turn in turns) if text),
            turns=turns,
        )
    )


def to_srt(job: Job, turns: Sequence[Turn]) -> bytes:
    """SubRip. Speaker and channel, where known, stand before the first cue of a turn."""
    del job  # the format has no place for what is not a cue
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{_srt_text(cue)}\n"
        for number, cue in enumerate(_cues(turns, label_in_text=True), 1)
    ]
    return "\n".join(blocks).encode()


def to_vtt(job: Job, turns: Sequence[Turn]) -> bytes:
    """WebVTT. Speaker and channel, where known, are the voice of a cue. https://www.w3.org/TR/webvtt1/"""
    blocks = ["WEBVTT\n"]
    if _sandboxed(job):
        blocks.append(f"NOTE {_SANDBOX_NOTE}\n")
    for cue in _cues(turns, label_in_text=False):
        voice = f"<v {_escape(cue.label)}>" if cue.label else ""
        text = _escape("\n".join(cue.lines))
        blocks.append(f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{voice}{text}\n")
    return "\n".join(blocks).encode()


class Export(NamedTuple):
    """One format: how it is served and how it is made."""

    media_type: str
    render: Callable[[Job, Sequence[Turn]], bytes]


EXPORTS: dict[str, Export] = {
    "txt": Export("text/plain; charset=utf-8", to_txt),
    "json": Export("application/json", to_json),
    "srt": Export("application/x-subrip; charset=utf-8", to_srt),
    "vtt": Export("text/vtt; charset=utf-8", to_vtt),
}


# --- text ------------------------------------------------------------------------------------------------------------

_SANDBOX_NOTE = "Model: sandbox (a local endpoint, not AssemblyAI)"
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")


def _sandboxed(job: Job) -> bool:
    return any(session.model == SANDBOX for session in job.sessions)


def _clean(text: str) -> str:
    """One line: a line break of the text would end a cue or fake a turn."""
    return " ".join(_CONTROLS.sub("", text).split())


def _label(speaker: str | None, channel: int | None) -> str:
    parts = [] if channel is None else [f"Channel {channel}"]
    if speaker and speaker not in ("PENDING", "UNKNOWN"):
        parts.append(f"Speaker {_clean(speaker)[:16]}")
    return ", ".join(parts)


def _labelled(turn: Turn) -> str:
    label = _label(turn.speaker, turn.channel)
    return f"{label}: {_clean(turn.transcript)}" if label else _clean(turn.transcript)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _srt_text(cue: "_Cue") -> str:
    return re.sub("-{2,}>", "->", "\n".join(cue.lines))  # SubRip has no escape for its arrow


def _clock(ms: int, point: str) -> str:
    seconds, ms = divmod(ms, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{ms:03}"


# --- tokens: what may not be broken, with its time -------------------------------------------------------------------


class _Token(NamedTuple):
    text: str
    start: int
    end: int
    label: str
    glued: bool = False  # no space before it: scripts without spaces, or pieces of what is longer than a line


def _tokens(turn: Turn) -> Iterator[_Token]:
    text = _clean(turn.transcript)
    words = [word for word in turn.words if _clean(word.text)]
    aligned = _align(text, words)
    if aligned is None:
        start, end = (words[0].start_ms, words[-1].end_ms) if words else (turn.start_ms, turn.end_ms)
        yield from _spread(text, start, end, _label(turn.speaker, turn.channel))
        return
    for (piece, glued), word in zip(aligned, words, strict=True):
        label = _label(word.speaker or turn.speaker, turn.channel)
        yield from _spread(piece, word.start_ms, word.end_ms, label, glued=glued)


def _align(text: str, words: Sequence[TurnWord]) -> list[tuple[str, bool]] | None:
    """Each word's share of `text` with its punctuation, and whether no space precedes it; None where they disagree."""
    at = []
    position = 0
    for word in words:
        needle = _clean(word.text)
        found = text.find(needle, position)
        if found < 0 or any(c.isalnum() for c in text[position:found]):
            return None
        at.append(found)
        position = found + len(needle)
    if not at or any(c.isalnum() for c in text[position:]):
        return None
    return [(text[a:b].strip(), a > 0 and text[a - 1] != " ") for a, b in pairwise([0, *at[1:], len(text)])]


def _spread(text: str, start: int, end: int, label: str, *, glued: bool = False) -> Iterator[_Token]:
    """Tokens of at most a line each, sharing the time by their length."""
    span, total = max(0, end - start), len(text.replace(" ", ""))
    position = 0
    for word in text.split():
        for cut in range(0, len(word), LINE):
            piece = word[cut : cut + LINE]
            begin, position = position, position + len(piece)
            times = (start + span * begin // total, start + span * position // total)
            yield _Token(piece, *times, label, glued=cut > 0 or (glued and begin == 0))


# --- cues ------------------------------------------------------------------------------------------------------------


class _Cue(NamedTuple):
    start: int
    end: int
    lines: list[str]
    label: str


def _cues(turns: Sequence[Turn], *, label_in_text: bool) -> list[_Cue]:
    cues = [cue for turn in turns for cue in _turn_cues(turn, label_in_text=label_in_text)]
    return _without_overlap(sorted(cues, key=lambda cue: cue.start))


def _turn_cues(turn: Turn, *, label_in_text: bool) -> Iterator[_Cue]:
    """Fill line after line, cue after cue; a pause or another speaker starts a new cue."""
    cue: _Cue | None = None
    label = ""
    for token in _tokens(turn):
        if cue is not None and not _joins(cue, token):
            yield cue
            cue = None
        if cue is None:
            prefix = f"{token.label}:" if label_in_text and token.label != label and token.label else ""
            start = max(0, token.start)
            cue = _Cue(start, start, [prefix] if prefix else [], token.label)
            label = token.label
        _append(cue.lines, token)
        cue = cue._replace(end=max(cue.end, token.end))
    if cue is not None:
        yield cue


def _joins(cue: _Cue, token: _Token) -> bool:
    fits = len(cue.lines) < LINES or len(cue.lines[-1]) + (not token.glued) + len(token.text) <= LINE
    close = token.start - cue.end <= PAUSE_MS and token.end - cue.start <= MAX_CUE_MS
    return fits and close and token.label == cue.label


def _append(lines: list[str], token: _Token) -> None:
    space = "" if token.glued else " "
    if lines and len(lines[-1]) + len(space) + len(token.text) <= LINE:
        lines[-1] += space + token.text
    else:
        lines.append(token.text)


def _without_overlap(cues: Sequence[_Cue]) -> list[_Cue]:
    """Sorted cues made to follow each other: each ends where the next begins at the latest, and can be read."""
    shown: list[_Cue] = []
    free = 0
    for cue, following in zip(cues, [*(cue.start for cue in cues[1:]), None], strict=True) if cues else ():
        start = max(cue.start, free)
        end = min(max(cue.end, start + SHORT_CUE_MS), start + MAX_CUE_MS)
        if following is not None:
            end = max(min(end, following), start + SHORTEST_CUE_MS)
        shown.append(cue._replace(start=start, end=end))
        free = end
    return shown
