"""Whether a process may take more work: a guard fed once a second with what the last second was like. FLOOR 0.

Streams that run must keep their pace, so what does not fit waits in the queue. The guard closes when more than one
chunk in a hundred was late over five seconds (p99 above 10 ms), or when the event loop's thread was busier than 85 %
over three; it opens after five calm seconds in a row. Between the two levels it stays as it is: it does not flap.
While the thread is idle for most of a second, others on the machine make it late, and holding jobs back would not
change that, maybe for ever: then only chunks count that are too late for upstream (50 ms).
"""

from collections import deque
from dataclasses import dataclass

LATE_SECONDS, GRAVE_SECONDS = 0.01, 0.05
SECONDS = 5  # of lateness looked at, and of calm before it opens
BUSY_SECONDS = 3
CLOSE_BUSY, OPEN_BUSY = 0.85, 0.75
OWN_BUSY = 0.4  # above that lateness may be of our own making
CLOSE_LATE, OPEN_LATE = 0.01, 0.005
ALWAYS = 4  # streams that are taken in any case: a slow machine still works


@dataclass(frozen=True, slots=True)
class Second:
    """Chunks sent in one second, those of them sent more than `LATE_SECONDS` and `GRAVE_SECONDS` late, and the loop's
    share of a core.
    """

    chunks: int
    late: int
    busy: float
    grave: int = 0

    @property
    def harm(self) -> int:
        """Chunks whose lateness is a reason to take nothing more."""
        return self.late if self.busy > OWN_BUSY else self.grave


class LoadGuard:
    """Open or closed."""

    def __init__(self) -> None:
        """Open."""
        self.open = True
        self._seconds: deque[Second] = deque(maxlen=SECONDS)

    def admits(self, streams: int) -> bool:
        """Whether another stream may be taken beside `streams` running ones."""
        return self.open or streams < ALWAYS

    def feed(self, second: Second) -> bool:
        """Take note of the last second; whether that opened or closed the guard."""
        self._seconds.append(second)
        was = self.open
        if self.open:
            self.open = not self._overloaded()
        elif len(self._seconds) == SECONDS:
            self.open = all(s.busy <= OPEN_BUSY and s.harm <= OPEN_LATE * s.chunks for s in self._seconds)
        if self.open is not was:
            self._seconds.clear()  # each verdict is on seconds of its own
        return self.open is not was

    def _overloaded(self) -> bool:
        newest = list(self._seconds)[-BUSY_SECONDS:]
        busy = sum(second.busy for second in newest)
        if len(newest) == BUSY_SECONDS and busy > CLOSE_BUSY * BUSY_SECONDS:
            return True
        harm, chunks = sum(s.harm for s in self._seconds), sum(s.chunks for s in self._seconds)
        return len(self._seconds) == SECONDS and harm > CLOSE_LATE * chunks
