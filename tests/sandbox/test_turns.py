"""The two families' turns, without a socket: what a US model has settled it never takes back."""

import random
from itertools import pairwise

from service.sandbox.parameters import parse_query
from service.sandbox.recogniser import Heard, Word
from service.sandbox.turns import TurnWriter, formatted, plain


def heard(text: str, *, end: bool = False) -> Heard:
    return Heard(tuple(Word(word, i * 300, i * 300 + 250) for i, word in enumerate(text.split())), end_of_turn=end)


def us(*readings: Heard, extra: str = "") -> list[dict[str, object]]:
    writer = TurnWriter(parse_query(f"speech_model=universal-streaming-english{extra}"), double_finals=True)
    return [message for reading in readings for message in writer.write(reading)]


def test_words_settle_when_two_readings_agree() -> None:
    told = us(
        heard("I scream"),
        heard("Ice cream, you"),
        heard("Ice cream you scream"),
        heard("Ice cream, you scream.", end=True),
    )
    assert [message["transcript"] for message in told] == ["", "", "ice cream you", "ice cream you scream"]


def test_settled_words_are_never_taken_back() -> None:
    chance = random.Random(7)
    for _ in range(50):
        readings = [heard(" ".join(chance.choices("abc", k=chance.randint(1, 9)))) for _ in range(20)]
        texts = [str(message["transcript"]).split() for message in us(*readings, heard("a b c", end=True))]
        for before, after in pairwise(texts):
            assert after[: len(before)] == before


def test_pro_replaces_the_whole_turn() -> None:
    writer = TurnWriter(parse_query("speech_model=u3-rt-pro"), double_finals=True)
    first = writer.write(heard("I scream"))[-1]
    final = writer.write(heard("ice cream,", end=True))[-1]
    assert (first["transcript"], final["transcript"]) == ("I scream", "Ice cream.")
    assert [word["text"] for word in final["words"]] == ["Ice", "cream."]
    assert writer.write(Heard((), end_of_turn=True)) == []


def test_formats() -> None:
    assert formatted("hello") == "Hello."
    assert formatted("Who?") == "Who?"
    assert formatted("so,") == "So."
    assert formatted("") == ""
    assert plain('"Well-known,"') == "well-known"
    assert plain("can't") == "can't"
