"""What the service demands of audio: how long a message may be, and how far ahead of real time a client may run.

Pure: byte counts and times in, an Error (code, text) out. Durations follow the *declared* rate and encoding, never the
audio itself. https://www.assemblyai.com/docs/streaming/common-session-errors-and-closures.md
"""

from dataclasses import dataclass

SHORTEST_MS = 50.0
LONGEST_MS = 1000.0
MAX_MESSAGE_BYTES = 128_000  # "128 kB", read the strict way: a client that keeps to this passes either reading
INGEST_SPEED = 1.25
MAX_AHEAD_S = 300.0
# A lone short message is tolerated (the unpadded tail of a file); a run of them is fatal. Three in a row were seen to
# die and one to live; two are in the dark, so the sandbox is the stricter of the two possible services.
FATAL_SHORT_RUN = 2


@dataclass(slots=True)
class Intake:
    """The audio of one session as it arrives."""

    sample_rate: int
    bytes_per_sample: int
    received_ms: float = 0.0
    _first_at: float | None = None
    _short_run: int = 0
    _processed_at: float = 0.0

    def take(self, size: int, now: float) -> tuple[int, str] | None:
        """Count a message of `size` bytes that came `now`; the Error it earns, if any."""
        duration_ms = size * 1000 / (self.sample_rate * self.bytes_per_sample)
        if self._first_at is None:
            self._first_at = now
        self._short_run = self._short_run + 1 if duration_ms < SHORTEST_MS else 0
        if duration_ms > LONGEST_MS or self._short_run >= FATAL_SHORT_RUN:
            return 3007, (
                f"Input Duration Error: Input Duration Violation: {duration_ms:.1f} ms. "
                f"Expected between {SHORTEST_MS:.0f} and {LONGEST_MS:.0f} ms"
            )
        self.received_ms += duration_ms
        self._processed_at = max(now, self._processed_at + duration_ms / 1000 / INGEST_SPEED)
        received, elapsed = self.received_ms / 1000, now - self._first_at
        if received - INGEST_SPEED * elapsed > MAX_AHEAD_S:
            return 3007, (
                "Input Duration Error: Audio Transmission Rate Exceeded: "
                f"Received {received:.1f} sec. audio in {elapsed:.6f} sec"
            )
        return None

    @property
    def processed_at(self) -> float:
        """When all audio so far is worked through: at once for a paced client, throttled to 1.25x for a hasty one."""
        return self._processed_at
