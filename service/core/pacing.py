"""The send schedule of one upstream session: which audio goes when. FLOOR 0.

A chunk is ceil(rate * chunk_ms / 1000) frames, due at start + (frames before it) / rate, where start is the arrival
of Begin and chunk 0 goes at once: positions are counted in frames, so no rate drifts. Nothing is sent early; what is
late is caught up at most at 1.05 times real time, because upstream closes sessions that are fed faster. The last
chunk is padded with silence to the shortest message upstream accepts. Source:
https://www.assemblyai.com/docs/streaming/api-spec/streaming-websocket (50 to 1000 ms a message, at most 128 kB).
"""

from math import ceil

from service.core.protocol import MAX_MESSAGE_BYTES, MIN_CHUNK_MS

FRAME_BYTES = 2  # what goes upstream is always mono s16le
CATCH_UP = 1.05
LAG = 0.02  # seconds a send may come after its plan and still count as sent then


class Schedule:
    """When chunk n is due and how long it lasts, in seconds after the session's start. One for each session."""

    def __init__(self, rate: int, chunk_ms: int) -> None:
        """`rate` in Hz as sent upstream."""
        self.rate = rate
        self.chunk_frames = min(ceil(rate * chunk_ms / 1000), MAX_MESSAGE_BYTES // FRAME_BYTES)
        self.chunk_bytes = self.chunk_frames * FRAME_BYTES
        self.chunk_seconds = self.chunk_frames / rate
        self._shortest = ceil(rate * MIN_CHUNK_MS / 1000) * FRAME_BYTES
        self._planned = float("-inf")  # when the next chunk should go, as last told

    def due(self, chunk: int) -> float:
        """Seconds after the start at which chunk number `chunk` is due."""
        return chunk * self.chunk_frames / self.rate

    def next_send(self, chunk: int, *, start: float, sent_at: float) -> float:
        """When to send `chunk` if the one before it went at `sent_at`: on time, or catching up gently.

        Counted from when the one before was planned, not from when the timer came round to it: what each chunk gains
        on a stall is less than that, and would be lost again.
        """
        before = max(self._planned, sent_at - LAG)
        self._planned = max(start + self.due(chunk), before + self.chunk_seconds / CATCH_UP)
        return self._planned

    def padded(self, chunk: bytes) -> bytes:
        """`chunk`, with silence appended if it is shorter than upstream accepts."""
        return chunk.ljust(self._shortest, b"\0")

    def seconds(self, data_bytes: int) -> float:
        """How long `data_bytes` of audio last."""
        return data_bytes / FRAME_BYTES / self.rate


def backoff(attempt: int, jitter: float) -> float:
    """Seconds before reconnect number `attempt` (0-based): full jitter over 0.5 s doubling to 30 s; `jitter` is
    uniform in 0…1.
    """
    ceiling: float = min(30.0, 0.5 * 2 ** min(attempt, 6))
    return max(0.05, ceiling * jitter)
