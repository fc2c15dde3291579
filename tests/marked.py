"""Audio that says where it is, and a recogniser that reads it: how the suites prove that every 10 ms and every word
came exactly once.

Every sample of 10 ms block n is n + 1 (0 is padding). A word is 200 ms, named by its number in the *file*, so a word
heard by two sessions or by none shows; a word of which a session heard only a part is spelt with a question mark.
"""

from collections.abc import Sequence

import numpy as np

from service.sandbox.recogniser import Heard, Opening, Word
from tests.wavs import chunk, fmt, riff

RATE = 16_000
BLOCK_MS, WORD_MS, WORDS_PER_TURN = 10, 200, 4
BLOCKS_PER_WORD = WORD_MS // BLOCK_MS


def marked_pcm(duration_ms: int, *, first: int = 0) -> bytes:
    """Mono PCM16 at 16 kHz; at most 327 s."""
    blocks = np.arange(first + 1, first + 1 + duration_ms // BLOCK_MS, dtype="<i2")
    return np.repeat(blocks, RATE * BLOCK_MS // 1000).tobytes()


def marked_wav(duration_ms: int) -> bytes:
    """`marked_pcm` in a WAV."""
    return riff(fmt(), chunk(b"data", marked_pcm(duration_ms)))


def blocks(pcm: bytes) -> list[int]:
    """The block numbers heard, padding left out."""
    samples = np.frombuffer(pcm[: len(pcm) // 2 * 2], "<i2")[:: RATE * BLOCK_MS // 1000]
    return [int(n) - 1 for n in samples if n]


def words(count: int) -> list[str]:
    """The words of a file of `count` whole words."""
    return [f"w{n}" for n in range(count)]


class MarkedWords:
    """Names each word by its place in the file; a turn ends after every fourth word of the file."""

    def __init__(self, opening: Opening) -> None:
        """Made by the sandbox."""
        assert opening.sample_rate == RATE
        self._heard_bytes = 0
        self._rest = b""
        self._blocks: list[int] = []  # of the word now being heard
        self._turn: list[Word] = []

    async def feed(self, pcm: bytes) -> Sequence[Heard]:
        """Read the marks."""
        data = self._rest + pcm
        size = RATE * BLOCK_MS // 1000 * 2
        whole = len(data) - len(data) % size
        self._rest = data[whole:]
        heard: list[Heard] = []
        for at in range(0, whole, size):
            self._heard_bytes += size
            number = int.from_bytes(data[at : at + 2], "little", signed=True) - 1
            if number < 0:
                continue
            self._blocks.append(number)
            if number % BLOCKS_PER_WORD == BLOCKS_PER_WORD - 1:
                heard += self._word(number // BLOCKS_PER_WORD)
        return heard

    def _word(self, number: int) -> list[Heard]:
        whole = self._blocks == list(range(number * BLOCKS_PER_WORD, (number + 1) * BLOCKS_PER_WORD))
        end = self._heard_bytes * 1000 // (RATE * 2)
        start = end - len(self._blocks) * BLOCK_MS
        self._blocks = []
        self._turn.append(Word(f"w{number}" if whole else f"w{number}?", start, end))
        heard = [Heard(tuple(self._turn))]
        if number % WORDS_PER_TURN == WORDS_PER_TURN - 1:
            heard.append(Heard(tuple(self._turn), end_of_turn=True))
            self._turn = []
        return heard

    async def flush(self) -> Sequence[Heard]:
        """End the open turn; a word not heard whole is not said."""
        if not self._turn:
            return ()
        said, self._turn = tuple(self._turn), []
        return (Heard(said, end_of_turn=True),)

    async def close(self) -> None:
        """Nothing is held."""
