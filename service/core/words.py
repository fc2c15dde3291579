"""What a word is to a search. FLOOR 0.

A word is a run of letters, digits and the marks on them, its case folded and its accents composed (NFC); everything
else stands between words. So "Don't!" has the words "don" and "t", "board-call.wav" has three, and nothing that a
database could take for an operator or a wildcard is left.
"""

import unicodedata


def words(text: str) -> list[str]:
    """The words of `text`, in its order."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in folded).split()


def searchable(text: str) -> str:
    """The words of `text`, a space around each: it has the word `w` where it contains `f" {w} "`."""
    return f" {' '.join(words(text))} "
