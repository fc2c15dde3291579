"""What a word is to a search. FLOOR 0.

A word is a run of letters, digits and the marks on them, its case folded and its accents composed (NFC); everything
else stands between words. So "Don't!" has the words "don" and "t", "board-call.wav" has three, and nothing that a
database could take for an operator or a wildcard is left.
"""

import unicodedata


class _Spaced(dict[int, str]):
    """What each character is to `str.translate`, of the scripts below CJK looked up once."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        found = char if unicodedata.category(char)[0] in "LMN" else " "
        if code < 0x2E80:
            self[code] = found
        return found


_spaced = _Spaced()


def words(text: str) -> list[str]:
    """The words of `text`, in its order."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return folded.translate(_spaced).split()


def searchable(text: str) -> str:
    """The words of `text`, a space around each: it has the word `w` where it contains `f" {w} "`."""
    return f" {' '.join(words(text))} "
