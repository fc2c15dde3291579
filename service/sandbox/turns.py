"""How what was heard is told: the Turn messages of the two model families.

Pure. Pro tells the whole turn anew each time, all words open until its one formatted final. The US models let words
settle one by one and never take one back; `transcript` holds settled words only, and with `format_turns` a formatted
twin of the final may follow. Every message carries all fields the official SDK requires: one missing field would
silently end its reader. https://www.assemblyai.com/docs/streaming/message-sequence.md
"""

from typing import Any

from service.sandbox.parameters import Parameters
from service.sandbox.recogniser import Heard, Word, spread

Message = dict[str, Any]

PENDING = "PENDING"
CADENCE_MS, SLOW_CADENCE_MS = 1000, 3000


def plain(text: str) -> str:
    """A word as the US models tell it unformatted: lower case, no punctuation at its edges."""
    return text.strip(".,;:!?\"'()[]…").lower()


def formatted(text: str) -> str:
    """Capital letter and full stop, where they are missing."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) or not text else text.rstrip(",;:-") + "."


class TurnWriter:
    """The turns of one session, in order."""

    def __init__(self, parameters: Parameters, *, double_finals: bool) -> None:
        self._parameters = parameters
        self._double_finals = double_finals
        self._order = 0
        self._told_at: int | None = None  # audio time of the last partial of the open turn
        self._previous: tuple[Word, ...] = ()
        self._settled: tuple[Word, ...] = ()
        self._speech_started = False
        self._revisions: list[Message] = []

    def write(self, heard: Heard) -> list[Message]:
        """The messages that tell it, possibly none."""
        if not heard.words:
            return []
        pro = self._parameters.is_pro
        if not heard.end_of_turn:
            return self._pro_partial(heard) if pro else self._us_partial(heard)
        finals = self._pro_final(heard) if pro else self._us_final(heard)
        if heard.revised_text is not None:
            words = spread(heard.revised_text, heard.words[0].start, heard.words[-1].end)
            finals.append(self._final(words, heard, formatted=finals[-1]["turn_is_formatted"]))
        self._order += 1
        self._told_at, self._previous, self._settled, self._speech_started = None, (), (), False
        return finals

    def empty_final(self) -> list[Message]:
        """What US models answer to Terminate when no turn is open."""
        return [] if self._parameters.is_pro else [self._turn((), "", end=True, formatted=False, confidence=0.0)]

    def speaker_revision(self) -> list[Message]:
        """The one revision before Termination, if any label changed."""
        if not (self._revisions and self._parameters.on("speaker_labels")):
            return []
        return [{"type": "SpeakerRevision", "revisions": self._revisions}]

    def _partials_wanted(self) -> bool:
        return self._parameters.on("include_partial_turns", default=not self._parameters.on("redact_pii"))

    def _speech_start(self, words: tuple[Word, ...]) -> list[Message]:
        if self._speech_started:
            return []
        self._speech_started = True
        return [{"type": "SpeechStarted", "timestamp": words[0].start, "confidence": 0.95}]

    def _pro_partial(self, heard: Heard) -> list[Message]:
        now = heard.words[-1].end
        steady = self._parameters.on("continuous_partials", default=not self._parameters.on("speaker_labels"))
        due = self._told_at is None or now - self._told_at >= (CADENCE_MS if steady else SLOW_CADENCE_MS)
        if not (due and self._partials_wanted()):
            return []
        self._told_at = now
        text = " ".join(word.text for word in heard.words)
        return [
            *self._speech_start(heard.words),
            self._turn(heard.words, text[:1].upper() + text[1:], end=False, formatted=True, settled=0, confidence=0.0),
        ]

    def _pro_final(self, heard: Heard) -> list[Message]:
        final = self._final(heard.words, heard, formatted=True)
        return [*self._speech_start(heard.words), *[final] * (2 if heard.double_final else 1)]

    def _us_partial(self, heard: Heard) -> list[Message]:
        # A word settles once two readings in a row agree on it and on all before it; the last one always stays open.
        agreed = len(self._settled)
        while agreed < min(len(self._previous), len(heard.words) - 1):
            if plain(self._previous[agreed].text) != plain(heard.words[agreed].text):
                break
            agreed += 1
        self._previous = heard.words
        words = self._settled + heard.words[len(self._settled) :]
        self._settled = words[:agreed]
        if not self._partials_wanted():
            return []
        text = " ".join(plain(word.text) for word in self._settled)
        return [self._turn(words, text, end=False, formatted=False, settled=agreed, confidence=0.01)]

    def _us_final(self, heard: Heard) -> list[Message]:
        words = self._settled + heard.words[len(self._settled) :]
        format_turns = self._parameters.on("format_turns")
        twice = self._double_finals if heard.double_final is None else heard.double_final
        if not format_turns:
            return [self._final(words, heard, formatted=False)] * (2 if heard.double_final else 1)
        if not twice:  # documented since March 2026: formatting happens in the model, each turn ends once
            return [self._final(words, heard, formatted=True)]
        # ... but the pair is still reported; the twin has the same turn_order and an empty utterance.
        return [
            self._final(words, heard, formatted=False),
            self._final(words, heard, formatted=True) | {"utterance": ""},
        ]

    def _final(self, words: tuple[Word, ...], heard: Heard, *, formatted: bool) -> Message:
        message = self._turn(
            words, self._final_text(words, formatted=formatted), end=True, formatted=formatted, confidence=1.0
        )
        if self._parameters.on("language_detection"):
            message |= {"language_code": "en", "language_confidence": 0.99}
        if self._parameters.on("speaker_labels"):
            # A first turn is too little to know a voice by; the revision before Termination settles it.
            label = heard.speaker or (PENDING if self._order == 0 else "A")
            self._label(message, label)
            revised = heard.revised_speaker or ("A" if label == PENDING else None)
            if revised is not None and all(known["turn_order"] != self._order for known in self._revisions):
                relabelled = [{**word, "speaker": revised} for word in message["words"]]
                self._revisions.append({"turn_order": self._order, "speaker_label": revised, "words": relabelled})
        return message

    @staticmethod
    def _label(message: Message, label: str) -> None:
        message["speaker_label"] = label
        if label != PENDING:
            message["words"] = [{**word, "speaker": label} for word in message["words"]]

    @staticmethod
    def _final_text(words: tuple[Word, ...], *, formatted: bool) -> str:
        if formatted:
            return _format(" ".join(word.text for word in words))
        return " ".join(filter(None, (plain(word.text) for word in words)))

    def _turn(
        self,
        words: tuple[Word, ...],
        text: str,
        *,
        end: bool,
        formatted: bool,
        confidence: float,
        settled: int | None = None,
    ) -> Message:
        final_words = len(words) if settled is None else settled
        # The words carry the very spelling of the text, also the full stop that formatting added to the last one.
        spelling = text.split() if formatted else [plain(word.text) for word in words]
        if len(spelling) != len(words):
            spelling = [word.text for word in words]
        return {
            "turn_order": self._order,
            "turn_is_formatted": formatted,
            "end_of_turn": end,
            "transcript": text,
            "end_of_turn_confidence": confidence,
            "words": [
                {
                    "start": word.start,
                    "end": word.end,
                    "text": spelled,
                    "confidence": word.confidence,
                    "word_is_final": i < final_words,
                }
                for i, (word, spelled) in enumerate(zip(words, spelling, strict=True))
            ],
            "utterance": text if end else "",
            "type": "Turn",
        }


_format = formatted  # the methods above have a flag of that name
