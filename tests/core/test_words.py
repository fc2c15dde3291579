"""What a word is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.words import searchable, words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        (" %_\\*\"'(-;\n", []),
        ("The quick, BROWN fox.", ["the", "quick", "brown", "fox"]),
        ("don't don\u2019t", ["don", "t", "don", "t"]),
        ("snake_case board-call.wav", ["snake", "case", "board", "call", "wav"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("e\u0301te\u0301 \u00e9T\u00c9", ["\u00e9t\u00e9", "\u00e9t\u00e9"]),
        ("ΣΊΣΥΦΟΣ σίσυφος", ["σίσυφοσ", "σίσυφοσ"]),
        ("हिन्दी", ["हिन्दी"]),
        ("3.5 million", ["3", "5", "million"]),
        ("a\x00b\ud800c", ["a", "b", "c"]),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


@given(st.text())
def test_words_are_the_same_however_often_they_are_taken(text: str) -> None:
    assert words(" ".join(words(text))) == words(text)
    assert words(searchable(text)) == words(text)
    assert all(f" {word} " in searchable(text) for word in words(text))


@given(st.text())
def test_nothing_means_anything_to_a_database(text: str) -> None:
    assert not set("".join(words(text))) & set("%_\\*\"'()^:-+;\x00 ")
