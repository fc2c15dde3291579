"""The outline of a file's loudness: lowest and highest sample of each of at most 2,000 stretches. FLOOR 0.

The louder of the channels counts. Blocks may end anywhere, even within a sample: however the file is cut, the peaks are
the same.
"""

from typing import Annotated, Final

import msgspec
import numpy as np

from service.core.formats import AudioFormat
from service.core.samples import decode

MAX_PEAKS: Final = 2_000


class Peaks(msgspec.Struct, frozen=True):
    """`[lowest, highest]` of every `ms_per_peak` of the file, -1 to 1; the last stretch may be shorter."""

    ms_per_peak: int
    peaks: list[Annotated[list[float], msgspec.Meta(min_length=2, max_length=2)]]


class PeakFinder:
    """Feed it the audio in blocks of any size, then `finish`."""

    def __init__(self, fmt: AudioFormat, frames: int) -> None:
        """`frames` is how many there are in all."""
        self._fmt = fmt
        self._ms = max(1, -(-frames * 1_000 // (fmt.sample_rate * MAX_PEAKS)))
        count = -(-frames * 1_000 // (fmt.sample_rate * self._ms))
        # The first frame of each stretch; a millisecond has at least eight frames, so none is empty.
        self._starts = -(-np.arange(count, dtype=np.int64) * self._ms * fmt.sample_rate // 1_000)
        self._low, self._high = np.full(count, np.inf), np.full(count, -np.inf)
        self._at = 0
        self._rest = b""

    def feed(self, block: bytes) -> None:
        """The next block of audio."""
        data = self._rest + block if self._rest else block
        frames = len(data) // self._fmt.frame_bytes
        self._rest = data[frames * self._fmt.frame_bytes :]
        if not frames:
            return
        samples = decode(self._fmt.encoding, data[: len(data) - len(self._rest)])
        first, last = np.searchsorted(self._starts, (self._at, self._at + frames - 1), side="right") - 1
        touched = slice(first, last + 1)
        cuts = np.maximum(self._starts[touched] - self._at, 0) * self._fmt.channels
        self._low[touched] = np.minimum(self._low[touched], np.minimum.reduceat(samples, cuts))
        self._high[touched] = np.maximum(self._high[touched], np.maximum.reduceat(samples, cuts))
        self._at += frames

    def finish(self) -> Peaks:
        """What was found; a stretch that was never fed is silent."""
        pairs = np.stack((self._low, self._high), axis=1) / 32_768
        pairs[~np.isfinite(pairs)] = 0
        rounded = np.round(np.clip(pairs, -1, 1), 3) + 0.0  # no -0.0
        return Peaks(self._ms, rounded.tolist())
