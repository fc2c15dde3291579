"""Folding one upstream session's messages into the turns of the job. FLOOR 0.

Upstream counts time and turns from zero in every session; here they become positions in the file and one running
index. Invariants, whatever order upstream sends in: a turn is final once per (session, turn_order); what changes it
later is a revision with the same index; a partial never follows the final of its turn nor precedes an earlier turn's
final (a turn that upstream has passed over, because a later one has ended, is waited for no longer); finals without
text are dropped. What a session takes does not grow with its length, unless its speakers are labelled. Source: https://www.assemblyai.com/docs/streaming/universal-streaming/message-sequence
"""

from collections.abc import Iterator
from math import ceil
from typing import Literal, NamedTuple
from zlib import compress, decompress

from msgspec.structs import replace

from service.core import protocol
from service.core.job import Partial, Turn, TurnWord, to_json, turn_from_json

RECENT = 4  # finals that may still change where no speakers are labelled; a twin comes before the next turn's final


class Folded(NamedTuple):
    """What a message means for the job."""

    kind: Literal["turn.partial", "turn.final", "turn.revised"]
    turn: Turn | Partial


class Folder:
    """Folds the messages of one session."""

    def __init__(
        self, *, session_id: str, channel: int | None, offset_ms: int, chunk_ms: float, labelled: bool = False
    ) -> None:
        """`offset_ms`: where in the file the session's audio began; `chunk_ms`: the audio one message carries;
        `labelled`: speakers are, and until the end any turn's may be revised.
        """
        self._session_id = session_id
        self._channel = channel
        self._offset_ms = offset_ms
        self._chunk_ms = chunk_ms
        self._labelled = labelled
        self._finals: dict[int, bytes] = {}  # order → the turn as `_pack` makes it
        self._forgotten = -1  # the highest order that is not among them any more
        self._ended = -1  # the highest order that has ended, with or without text; each turn has the next one
        self._open: dict[int, list[str]] = {}  # orders after that → words of the latest partial

    @property
    def speaking(self) -> bool:
        """True while some turn has begun and not ended."""
        return bool(self._open)

    def turn(self, message: protocol.Turn, *, next_index: int, elapsed_ms: float, position_ms: int) -> Folded | None:
        """Fold one Turn message.

        `next_index` is the job's next free turn index, `elapsed_ms` the time since the session's first chunk was due,
        `position_ms` the position of the stream in the file, which stands in for the times of a turn without words.
        """
        if not message.end_of_turn:
            return self._partial(message, next_index, position_ms)
        order = message.turn_order
        text = message.transcript or _join(message.words)
        self._ended = max(self._ended, order)
        self._open = {later: words for later, words in self._open.items() if later > self._ended}
        if order in self._finals:
            if not text:
                return None
            before = _unpack(self._finals[order])
            return self._revise(before, self._build(message, text, before.index, before.latency_ms, before.end_ms))
        if not text or order <= self._forgotten:
            return None
        turn = self._build(message, text, next_index, 0, position_ms)
        if message.words:
            # A chunk is on the wire from the moment its first sample was due.
            on_wire = max(0, ceil(message.words[-1].end / self._chunk_ms) - 1) * self._chunk_ms
            turn.latency_ms = max(0, round(elapsed_ms - on_wire))
        self._finals[order] = _pack(turn)
        if len(self._finals) > RECENT and not self._labelled:
            self._forgotten = min(self._finals)
            del self._finals[self._forgotten]
        return Folded("turn.final", turn)

    def revision(self, message: protocol.SpeakerRevision) -> Iterator[Folded]:
        """Fold new speaker labels; turns that are not final here are ignored."""
        for revision in message.revisions:
            if revision.turn_order not in self._finals:
                continue
            before = _unpack(self._finals[revision.turn_order])
            words = self._relabelled(before.words, revision.words)
            turn = replace(before, words=words, speaker=revision.speaker_label or before.speaker)
            if folded := self._revise(before, turn):
                yield folded

    def _relabelled(self, before: list[TurnWord], words: list[protocol.Word]) -> list[TurnWord]:
        """Only labels change; the words they come with may lack what the final had."""
        if len(words) != len(before):
            return [self._word(word) for word in words] or before
        return [replace(old, speaker=new.speaker or old.speaker) for old, new in zip(before, words, strict=True)]

    def _revise(self, before: Turn, turn: Turn) -> Folded | None:
        if turn == before:
            return None
        self._finals[turn.turn_order] = _pack(turn)
        return Folded("turn.revised", turn)

    def _partial(self, message: protocol.Turn, next_index: int, position_ms: int) -> Folded | None:
        order = message.turn_order
        words = [word.text for word in message.words]
        final = [word.word_is_final for word in message.words]
        text = message.transcript
        pending = not all(final)
        if not text or (pending and len(text.split()) <= sum(final)):  # some models leave those out of `transcript`
            text = " ".join(words)
        if not text or order <= self._ended:
            return None
        before = self._open.get(order, [])
        self._open[order] = words
        if order > self._ended + 1:  # held: the one before may still become final
            return None
        stable = [*final, False].index(False)
        while stable < len(words) and (final[stable] or before[stable : stable + 1] == [words[stable]]):
            stable += 1
        start_ms = self._ms(message.words[0].start) if message.words else position_ms
        return Folded("turn.partial", Partial(
            index=next_index, transcript=text, stable_words=stable, start_ms=start_ms,
            session_id=self._session_id, turn_order=order, channel=self._channel,
        ))  # fmt: skip

    def _build(self, message: protocol.Turn, text: str, index: int, latency_ms: int, position_ms: int) -> Turn:
        words = [self._word(word) for word in message.words]
        return Turn(
            index=index,
            start_ms=words[0].start_ms if words else position_ms,
            end_ms=words[-1].end_ms if words else position_ms,
            transcript=text,
            words=words,
            formatted=message.turn_is_formatted,
            session_id=self._session_id,
            turn_order=message.turn_order,
            end_of_turn_confidence=message.end_of_turn_confidence,
            language=message.language_code,
            speaker=message.speaker_label,
            channel=self._channel,
            latency_ms=latency_ms,
        )

    def _word(self, word: protocol.Word) -> TurnWord:
        return TurnWord(
            text=word.text,
            start_ms=self._ms(word.start),
            end_ms=self._ms(word.end),
            confidence=word.confidence,
            speaker=word.speaker,
        )

    def _ms(self, session_ms: float) -> int:
        return max(0, self._offset_ms + round(session_ms))


def _pack(turn: Turn) -> bytes:
    """An eighth of the memory, for 13 µs: a session with labelled speakers keeps hours of turns."""
    return compress(to_json(turn), 1)


def _unpack(packed: bytes) -> Turn:
    return turn_from_json(decompress(packed))


def _join(words: list[protocol.Word]) -> str:
    return " ".join(word.text for word in words)
