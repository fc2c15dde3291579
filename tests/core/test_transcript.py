"""Folding turns: finals once, revisions with their index, partials where they may be, whatever order messages come in."""

import random
import tracemalloc
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core import protocol
from service.core.job import Partial, Turn
from service.core.transcript import RECENT, Folded, Folder

Wire = protocol.Turn | protocol.SpeakerRevision


def word(text: str, start: float, end: float, *, final: bool = True, speaker: str | None = None) -> protocol.Word:
    return protocol.Word(text=text, start=start, end=end, confidence=0.9, word_is_final=final, speaker=speaker)


def turn(
    order: int, text: str = "", *, end: bool = False, words: Sequence[protocol.Word] | None = None, **more: Any
) -> protocol.Turn:
    """A message with its words 300 ms each, all final or none, unless they are given."""
    if words is None:
        words = [
            word(w, order * 9000 + i * 300, order * 9000 + i * 300 + 300, final=end) for i, w in enumerate(text.split())
        ]
    return protocol.Turn(turn_order=order, end_of_turn=end, transcript=text, words=list(words), **more)


class Fold:
    """A folder with a job round it: counts its turns as the recorder does."""

    def __init__(self, *, offset_ms: int = 0, channel: int | None = None, turn_count: int = 0, **more: Any) -> None:
        self.folder = Folder(session_id="s", channel=channel, offset_ms=offset_ms, chunk_ms=100, **more)
        self.turn_count = turn_count
        self.out: list[Folded] = []

    def __call__(self, *messages: Wire, elapsed_ms: float = 60_000, position_ms: int = 7000) -> list[Folded]:
        """Fold; what came of these messages."""
        before = len(self.out)
        for message in messages:
            if isinstance(message, protocol.SpeakerRevision):
                self.out += self.folder.revision(message)
                continue
            folded = self.folder.turn(
                message, next_index=self.turn_count, elapsed_ms=elapsed_ms, position_ms=position_ms
            )
            if folded is not None:
                self.out.append(folded)
                self.turn_count += folded.kind == "turn.final"
        return self.out[before:]


def told(folded: Iterable[Folded]) -> list[tuple[str, int, str]]:
    return [(one.kind.removeprefix("turn."), one.turn.turn_order, one.turn.transcript) for one in folded]


def only(folded: list[Folded]) -> Turn:
    (one,) = folded
    assert isinstance(one.turn, Turn)
    return one.turn


def partial(folded: list[Folded]) -> Partial:
    (one,) = folded
    assert isinstance(one.turn, Partial)
    return one.turn


# --- the shapes of the models ----------------------------------------------------------------------------------------


def test_pro_rewrites_the_whole_turn_and_ends_it_once() -> None:
    fold = Fold()
    folded = fold(
        turn(0, "Harbor Point", turn_is_formatted=True),
        turn(0, "Harbour Point clay", turn_is_formatted=True),
        turn(
            0, "Harbor Point Claims.", end=True, turn_is_formatted=True, end_of_turn_confidence=1.0, language_code="en"
        ),
    )
    assert told(folded) == [
        ("partial", 0, "Harbor Point"), ("partial", 0, "Harbour Point clay"), ("final", 0, "Harbor Point Claims."),
    ]  # fmt: skip
    final = only(folded[2:])
    assert (final.index, final.start_ms, final.end_ms, final.formatted) == (0, 0, 900, True)
    assert (final.end_of_turn_confidence, final.language, final.session_id) == (1.0, "en", "s")
    assert [(w.text, w.start_ms, w.end_ms) for w in final.words] == [
        ("Harbor", 0, 300),
        ("Point", 300, 600),
        ("Claims.", 600, 900),
    ]


def test_us_leaves_pending_words_out_of_the_transcript_but_not_of_the_partial() -> None:
    fold = Fold()
    pending = word("my", 2800, 2880, final=False)
    assert told(fold(turn(0, "", words=[word("hi", 1920, 2000, final=False)]))) == [("partial", 0, "hi")]
    assert told(fold(turn(0, "hi", words=[word("hi", 1920, 2000), pending]))) == [("partial", 0, "hi my")]
    assert told(fold(turn(0, "hi my", words=[word("hi", 1920, 2000), word("my", 2800, 2900)]))) == [
        ("partial", 0, "hi my")
    ]
    assert told(fold(turn(0, "", words=[]))) == [], "an empty partial is normal"


def test_a_script_without_spaces_keeps_its_transcript() -> None:
    words = [word("こんにちは", 0, 300, final=False), word("世界", 300, 600, final=False)]
    assert told(Fold()(turn(0, "こんにちは世界", words=words))) == [("partial", 0, "こんにちは世界")]


def test_a_twin_revises_with_the_same_index_and_is_never_waited_for() -> None:
    fold = Fold(turn_count=5)
    plain = turn(0, "hi my name is sonny", end=True, end_of_turn_confidence=0.5)
    twin = turn(0, "Hi, my name is Sonny.", end=True, turn_is_formatted=True, end_of_turn_confidence=0.5)
    first = only(fold(plain, elapsed_ms=2200))
    assert (first.index, first.formatted, first.latency_ms) == (5, False, 800)
    (folded,) = fold(twin, elapsed_ms=9000)
    assert folded.kind == "turn.revised"
    revised = only([folded])
    assert (revised.index, revised.transcript, revised.formatted) == (5, "Hi, my name is Sonny.", True)
    assert revised.latency_ms == first.latency_ms, "when it first came"
    assert fold(twin) == [], "an identical repeat"


def test_a_twin_may_come_after_the_next_turn_began() -> None:
    fold = Fold()
    folded = fold(
        turn(0, "a b", end=True), turn(1, "c"), turn(0, "A b.", end=True), turn(1, "c d"), turn(1, "c d", end=True)
    )
    assert told(folded) == [
        ("final", 0, "a b"), ("partial", 1, "c"), ("revised", 0, "A b."), ("partial", 1, "c d"), ("final", 1, "c d"),
    ]  # fmt: skip


def test_empty_finals_are_dropped_but_end_their_turn() -> None:
    fold = Fold()
    assert told(fold(turn(0, "uh"), turn(0, "", end=True), turn(0, "uh"))) == [("partial", 0, "uh")]
    assert not fold.folder.speaking
    assert told(fold(turn(1, "yes", end=True))) == [("final", 1, "yes")]
    assert fold.turn_count == 1
    assert told(fold(turn(1, "", end=True))) == [], "and take nothing back"
    assert told(fold(turn(0, "Uh.", end=True))) == [("final", 0, "Uh.")], "but a text that comes after all is kept"


def test_a_final_told_in_words_only_has_their_text() -> None:
    final = only(Fold()(turn(0, "", end=True, words=[word("yes", 0, 300), word("no", 300, 600)])))
    assert final.transcript == "yes no"


def test_a_turn_without_words_stands_where_the_stream_is() -> None:
    fold = Fold(offset_ms=5000)
    final = only(fold(turn(0, "yes", end=True, words=[]), position_ms=8100))
    assert (final.start_ms, final.end_ms, final.words, final.latency_ms) == (8100, 8100, [], 0)
    assert partial(fold(turn(1, "so", words=[]), position_ms=8300)).start_ms == 8300
    twin = only(fold(turn(0, "Yes.", end=True, words=[]), position_ms=9999))
    assert (twin.start_ms, twin.end_ms) == (8100, 8100), "its place does not change"


# --- times -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**8), st.lists(st.floats(0, 10**7), min_size=2, max_size=8).map(sorted))
def test_times_are_those_of_the_file_whatever_session_they_come_from(offset_ms: int, edges: list[float]) -> None:
    words = [word(f"w{i}", a, b) for i, (a, b) in enumerate(pairwise(edges))]
    folded = Fold(offset_ms=offset_ms)(turn(0, "x", words=words), turn(0, "x", end=True, words=words))
    begun, ended = folded[0].turn, folded[1].turn
    assert isinstance(ended, Turn)
    assert begun.start_ms == ended.start_ms == offset_ms + round(edges[0])
    assert ended.end_ms == offset_ms + round(edges[-1])
    for sent, kept in zip(words, ended.words, strict=True):
        assert (kept.start_ms, kept.end_ms) == (offset_ms + round(sent.start), offset_ms + round(sent.end))


def test_no_word_starts_before_the_file() -> None:
    final = only(Fold()(turn(0, "yes", end=True, words=[word("yes", -900, 300)])))
    assert (final.start_ms, final.words[0].start_ms) == (0, 0)


@pytest.mark.parametrize(
    ("end", "elapsed_ms", "latency_ms"),
    [
        (940, 1540, 640),  # 900…1000 ms is on the wire from 900
        (900, 1540, 740),  # the last sample before 900 ms went with 800…900
        (901, 1540, 640),
        (60, 700, 700),
        (0, 700, 700),
        (5000, 1000, 0),  # a word said to end after what was sent
    ],
)
def test_latency_is_counted_from_when_the_audio_of_the_last_word_was_due(
    end: float, elapsed_ms: float, latency_ms: int
) -> None:
    final = turn(0, "a b", end=True, words=[word("a", 0, 10), word("b", 10, end)])
    assert only(Fold(offset_ms=70_000)(final, elapsed_ms=elapsed_ms)).latency_ms == latency_ms


# --- partials --------------------------------------------------------------------------------------------------------


def test_stable_words_are_final_or_as_they_were() -> None:
    fold = Fold()

    def stable(text: str, finals: int = 0) -> int:
        words = [word(w, i * 100, i * 100 + 100, final=i < finals) for i, w in enumerate(text.split())]
        return partial(fold(turn(0, text, words=words))).stable_words

    assert stable("one") == 0
    assert stable("one two") == 1
    assert stable("one too three") == 1, "a word that changed, and those after it, are not"
    assert stable("won too three") == 0
    assert stable("one too three four", finals=2) == 3, "two are final, the third is as it was"
    assert stable("uno", finals=1) == 1
    fold(turn(0, "uno", end=True))
    words = [word("uno", 9000, 9100, final=False)]
    assert partial(fold(turn(1, "uno", words=words))).stable_words == 0, "another turn starts anew"


def test_a_partial_carries_the_next_free_index_and_its_key() -> None:
    fold = Fold(channel=1, offset_ms=500, turn_count=3)
    seen = partial(fold(turn(0, "hello")))
    assert (seen.index, seen.session_id, seen.turn_order, seen.channel, seen.start_ms) == (3, "s", 0, 1, 500)


def test_a_partial_waits_for_the_turn_before_it() -> None:
    fold = Fold()
    assert told(fold(turn(1, "second"))) == []
    assert told(fold(turn(0, "first"))) == [("partial", 0, "first")]
    assert told(fold(turn(1, "second one"))) == []
    assert fold.folder.speaking
    assert told(fold(turn(0, "first.", end=True), turn(1, "second one here"))) == [
        ("final", 0, "first."), ("partial", 1, "second one here"),
    ]  # fmt: skip
    assert partial(fold.out[-1:]).stable_words == 2, "what it said while it waited counts"


def test_a_turn_that_upstream_has_passed_over_is_waited_for_no_longer() -> None:
    """Its final was in a frame that could not be read, say: what follows must not be hidden for the rest of the session."""
    fold = Fold()
    fold(turn(0, "lost"), turn(1, "held back"))
    assert told(fold(turn(1, "kept", end=True))) == [("final", 1, "kept")]
    assert not fold.folder.speaking
    assert told(fold(turn(2, "shown"))) == [("partial", 2, "shown")]
    assert told(fold(turn(0, "lost again"))) == [], "a turn passed over has no partials"
    assert told(fold(turn(0, "Found.", end=True))) == [("final", 0, "Found.")], "but its words are never lost"
    assert fold.turn_count == 2


def test_speaking_from_the_first_partial_to_the_end_of_the_turn() -> None:
    fold = Fold()
    said = [turn(0, "", words=[]), turn(0, "well"), turn(0, "well then"), turn(0, "Well then.", end=True)]
    speaking = []
    for message in said:
        fold(message)
        speaking.append(fold.folder.speaking)
    assert speaking == [False, True, True, False]


# --- speakers --------------------------------------------------------------------------------------------------------


def revision(*revised: tuple[int, str | None, list[protocol.Word]]) -> protocol.SpeakerRevision:
    return protocol.SpeakerRevision([protocol.Revision(order, label, words) for order, label, words in revised])


def test_a_speaker_revision_changes_labels_and_nothing_else() -> None:
    fold = Fold(offset_ms=1000)
    said = [word("Thanks,", 100, 400, speaker="A"), word("bye.", 400, 900, speaker="A")]
    before = only(fold(turn(0, "Thanks, bye.", end=True, words=said, speaker_label="A")))
    # As in the vendor's examples, without confidences.
    bare = [protocol.Word(text=w.text, start=w.start, end=w.end, speaker="B") for w in said]
    after = only(fold(revision((0, "B", bare))))
    assert fold.out[-1].kind == "turn.revised"
    assert after.speaker == "B"
    assert [w.speaker for w in after.words] == ["B", "B"]
    after.speaker = before.speaker
    for mine, theirs in zip(after.words, before.words, strict=True):
        mine.speaker = theirs.speaker
    assert after == before


def test_speaker_revisions_last_wins_and_repeats_are_dropped() -> None:
    fold = Fold()
    fold(turn(0, "a", end=True, speaker_label="A"), turn(1, "b", end=True, speaker_label="A"))
    folded = fold(revision((0, "A", []), (1, "B", []), (9, "C", [])), revision((1, "B", [])), revision((1, "C", [])))
    assert [(one.turn.turn_order, one.turn.speaker) for one in folded if isinstance(one.turn, Turn)] == [
        (1, "B"),
        (1, "C"),
    ]


def test_a_revision_with_other_words_takes_them() -> None:
    fold = Fold()
    fold(turn(0, "a b", end=True))
    changed = only(fold(revision((0, "B", [word("a b", 0, 600, speaker="B")]))))
    assert [w.text for w in changed.words] == ["a b"]


def test_any_turn_of_a_labelled_session_may_be_revised_at_its_end() -> None:
    fold = Fold(labelled=True)
    finals = fold(*(turn(order, f"w{order}", end=True, speaker_label="A") for order in range(100)))
    folded = fold(revision(*((order, "B", []) for order in range(100))))
    assert [one.turn.index for one in folded] == [one.turn.index for one in finals] == list(range(100))
    assert {one.turn.speaker for one in folded if isinstance(one.turn, Turn)} == {"B"}


# --- long sessions ---------------------------------------------------------------------------------------------------


def test_only_the_newest_finals_are_kept_and_none_is_told_twice() -> None:
    fold = Fold()
    said = [turn(order, f"w{order} and so on", end=True) for order in range(200)]
    fold(*said[:100])
    tracemalloc.start()
    try:
        fold(*said[100:150])
        fold.out.clear()
        before = tracemalloc.get_traced_memory()[0]
        fold(*said[150:])
        fold.out.clear()
        assert tracemalloc.get_traced_memory()[0] - before < 2000
    finally:
        tracemalloc.stop()
    oldest = 200 - RECENT
    assert told(fold(turn(oldest, "Again.", end=True), *said[:oldest])) == [("revised", oldest, "Again.")]
    assert fold.turn_count == 200


def test_finals_may_come_late_and_in_any_order_within_the_newest() -> None:
    dice = random.Random(7)
    late = sorted(range(200), key=lambda order: order + dice.uniform(0, RECENT - 1))
    fold = Fold()
    fold(*(turn(order, f"w{order}", end=True) for order in late))
    assert sorted(one.turn.turn_order for one in fold.out) == list(range(200))


# --- any order -------------------------------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn) -> list[Wire]:
    """What a session may say, in its proper order."""
    said: list[Wire] = []
    for order in range(draw(st.integers(1, 4))):
        text = [f"w{order}.{n}" for n in range(draw(st.integers(0, 4)))]
        said += [turn(order, " ".join(text[:n])) for n in range(draw(st.integers(0, len(text))))]
        said.append(turn(order, " ".join(text), end=True))
        if draw(st.booleans()):
            said.append(turn(order, " ".join(text).title(), end=True, turn_is_formatted=True))
        if draw(st.booleans()):
            said.append(revision((order, draw(st.sampled_from("AB")), [])))
    return said


def check(messages: Sequence[Wire], folded: Sequence[Folded], *, strict: bool) -> None:
    """Every rule there is for the folding of `messages`; `strict`: finals came in the order of their turns."""
    finals = [message for message in messages if isinstance(message, protocol.Turn) and message.end_of_turn]
    with_text = {message.turn_order for message in finals if message.transcript}
    now: dict[int, Turn] = {}
    shown: set[int] = set()
    for kind, one in folded:
        if isinstance(one, Partial):
            assert kind == "turn.partial"
            assert one.turn_order not in now, "a partial after its final"
            assert one.index == len(now), "the next free index"
            shown.add(one.turn_order)
        elif kind == "turn.final":
            assert one.turn_order not in now, "final once"
            assert one.index == len(now), "in order of commit"
            if strict:
                assert not any(order > one.turn_order for order in shown), "a partial before an earlier turn's final"
            now[one.turn_order] = one
        else:
            assert kind == "turn.revised"
            assert one.index == now[one.turn_order].index
            assert one != now[one.turn_order], "a revision changes something"
            now[one.turn_order] = one
    assert now.keys() == with_text, "every turn with text, and no other"
    for order, last in now.items():
        said = [message.transcript for message in finals if message.turn_order == order and message.transcript]
        assert last.transcript == said[-1], "as upstream said it last"
    assert all(one is not None and one.transcript for _, one in folded)


@given(conversations(), st.randoms(use_true_random=False))
def test_doubled_and_shuffled_messages_break_no_rule(said: list[Wire], dice: random.Random) -> None:
    messages = said + [message for message in said if dice.random() < 0.5]
    dice.shuffle(messages)
    check(messages, Fold()(*messages), strict=False)


@given(conversations(), st.randoms(use_true_random=False))
def test_while_turns_end_in_order_no_partial_precedes_an_earlier_final(said: list[Wire], dice: random.Random) -> None:
    """Partials, twins and revisions anywhere at all."""
    ends = {order: next(at for at, m in enumerate(said) if isinstance(m, protocol.Turn) and m.end_of_turn and m.turn_order == order)
            for order in {m.turn_order for m in said if isinstance(m, protocol.Turn)}}  # fmt: skip
    firsts = [said[at] for at in sorted(ends.values())]
    messages = list(firsts)
    for at, message in enumerate(said):
        if at not in ends.values():
            floor = 0
            if isinstance(message, protocol.Turn) and message.end_of_turn:
                floor = messages.index(firsts[message.turn_order]) + 1  # a twin after its first
            for _ in range(dice.choice([1, 1, 2])):
                messages.insert(dice.randint(floor, len(messages)), message)
    check(messages, Fold()(*messages), strict=True)


@given(conversations())
def test_in_its_proper_order_nothing_is_held_back(said: list[Wire]) -> None:
    folded = Fold()(*said)
    partials = [m for m in said if isinstance(m, protocol.Turn) and not m.end_of_turn and m.transcript]
    assert [one.turn.transcript for one in folded if one.kind == "turn.partial"] == [m.transcript for m in partials]
    check(said, folded, strict=True)
    assert Fold()(*said, *said)[: len(folded)] == folded


def test_the_checker_can_fail() -> None:
    said = [turn(0, "a", end=True), turn(1, "b", end=True)]
    good = Fold()(*said)
    late = Fold()(turn(0, "a"))[0]
    for wrong in (good[:1], [*good, good[0]], [*good, late], list(reversed(good))):
        with pytest.raises(AssertionError):
            check(said, wrong, strict=True)
    check(said, good, strict=True)
