"""A scripted transcript: what every session shall hear, as a JSON file.

The script runs on the audio clock of each session and starts anew with each (as the service's times do): a word is
heard once the audio has passed its end, a turn ends at its `end_ms`. Audio that ends early leaves the rest unsaid;
audio beyond the script is silence.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from service.sandbox.recogniser import Heard, Opening, Recogniser, Word, spread

WORD_MS = 400
GAP_MS = 800  # between turns without times: about what makes the service end a turn

EXAMPLE = """\
{
  "turns": [
    {"text": "Harbor Point Claims, good morning."},
    {"text": "Hello, I would like to report some damage.", "start_ms": 3000, "end_ms": 6200, "speaker": "B"},
    {"text": "Sorry to hear that.", "speaker": "PENDING", "revised_speaker": "A"},
    {"text": "It was the rain.", "revised_text": "It was the train.", "double_final": true}
  ]
}
"""

HELP = f"""\
Script file (--script): JSON, {{"turns": [...]}}, or {{"sessions": [[...], [...]]}}, one per session (the last repeats).
Each turn has `text` and may have:
  start_ms, end_ms   its place in the session's audio; default: {GAP_MS} ms after the turn before, {WORD_MS} ms a word
  speaker            its label, sent when the client asks for speaker_labels (default A)
  revised_speaker    the label a SpeakerRevision gives it just before Termination
  revised_text       a second final of the same turn with this text
  double_final       true: the turn's final comes twice (unformatted, formatted on US models); false: once
Example:
{EXAMPLE}"""

Milliseconds = Annotated[int, msgspec.Meta(ge=0)]


class PlanFileError(ValueError):
    """A script or fault file that cannot be used; the message says where and why."""


class ScriptedTurn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a script."""

    text: Annotated[str, msgspec.Meta(min_length=1)]
    start_ms: Milliseconds | None = None
    end_ms: Milliseconds | None = None
    speaker: str | None = None
    revised_speaker: str | None = None
    revised_text: str | None = None
    double_final: bool | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    turns: list[ScriptedTurn] | None = None
    sessions: Annotated[list[list[ScriptedTurn]], msgspec.Meta(min_length=1)] | None = None


class Script:
    """A RecogniserFactory that makes each session hear its turns."""

    def __init__(self, *sessions: Sequence[ScriptedTurn]) -> None:
        """One list of turns for all sessions, or one for each (the last repeats)."""
        self._sessions = [_timed(turns) for turns in sessions]

    def __call__(self, opening: Opening) -> Recogniser:
        return ScriptedRecogniser(self._sessions[min(opening.ordinal, len(self._sessions)) - 1], opening.sample_rate)


def _timed(turns: Sequence[ScriptedTurn]) -> list[Heard]:
    finals: list[Heard] = []
    free_from = 0
    for number, turn in enumerate(turns, 1):
        count = len(turn.text.split())
        start = turn.start_ms if turn.start_ms is not None else free_from
        end = turn.end_ms if turn.end_ms is not None else start + count * WORD_MS
        if not count:
            raise PlanFileError(f"turn {number}: its text has no word")
        if finals and start < finals[-1].words[-1].end:
            raise PlanFileError(f"turn {number}: starts at {start} ms, before the turn before it has ended")
        if end <= start:
            raise PlanFileError(f"turn {number}: ends at {end} ms, not after its start at {start} ms")
        words = spread(turn.text, start, end, 0.95)
        finals.append(Heard(words, True, turn.speaker, turn.revised_speaker, turn.revised_text, turn.double_final))
        free_from = end + GAP_MS
    return finals


class ScriptedRecogniser:
    """One session's reading of the script."""

    def __init__(self, finals: Sequence[Heard], sample_rate: int) -> None:
        self._finals = list(finals)
        self._bytes_per_ms = sample_rate * 2 / 1000
        self._received = 0
        self._turn = 0
        self._told = 0  # words of the open turn told so far

    async def feed(self, pcm: bytes) -> Sequence[Heard]:
        self._received += len(pcm)
        now = self._received / self._bytes_per_ms
        heard: list[Heard] = []
        while self._turn < len(self._finals):
            final = self._finals[self._turn]
            passed = self._passed(final.words, now)
            heard.extend(Heard(final.words[:count]) for count in range(self._told + 1, passed + 1))
            self._told = max(self._told, passed)
            if self._told < len(final.words):
                break
            heard.append(final)
            self._turn, self._told = self._turn + 1, 0
        return heard

    def _passed(self, words: tuple[Word, ...], now: float) -> int:
        count = self._told
        while count < len(words) and words[count].end <= now:
            count += 1
        return count

    async def flush(self) -> Sequence[Heard]:
        """End the open turn with the words heard so far; the rest of it is never said."""
        if not self._told:
            return ()
        final = self._finals[self._turn]
        words, self._turn, self._told = final.words[: self._told], self._turn + 1, 0
        return (Heard(words, True, final.speaker, final.revised_speaker, None, final.double_final),)

    async def close(self) -> None:
        """Nothing is held."""


def read_file(path: Path) -> bytes:
    """The bytes of a plan file; raises PlanFileError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise PlanFileError(f"{path}: {error.strerror or error}") from error


def load_script(path: Path) -> Script:
    """Read and check a script file; raises PlanFileError with the place and the reason."""
    data = read_file(path)
    try:
        parsed = msgspec.json.decode(data, type=_File)
        if (parsed.turns is None) == (parsed.sessions is None):
            raise PlanFileError("give either `turns` or `sessions`")
        return Script(*(parsed.sessions or [parsed.turns or []]))
    except (msgspec.DecodeError, PlanFileError) as error:
        raise PlanFileError(f"{path}: {error}") from error
