"""One upstream conversation as a state machine: opening → streaming → draining → done. FLOOR 0.

It knows how long each state may last, when a session should be replaced before it expires, and which ends were asked
for. Times are seconds of the caller's monotonic clock; nothing here reads one. Source:
https://www.assemblyai.com/docs/streaming/api-spec/streaming-websocket (sessions live at most three hours; Terminate
is answered by the open turn, then Termination).
"""

from enum import StrEnum
from typing import Literal

from service.core.protocol import SessionEnd

OPENING_SECONDS = 10.0  # from the upgrade to Begin
DRAINING_SECONDS = 30.0  # from Terminate to Termination
LIFETIME_SECONDS = 10_800.0

Reason = Literal["end", "rotate", "cancel", "drain", "failed"]


class State(StrEnum):
    """Where a conversation is."""

    OPENING = "opening"
    STREAMING = "streaming"
    DRAINING = "draining"
    DONE = "done"


# What takes a conversation from one state to the next; a missing key is an illegal step.
STEPS: dict[State, dict[str, State]] = {
    State.OPENING: {"begin": State.STREAMING, "finish": State.DRAINING, "end": State.DONE},
    State.STREAMING: {"finish": State.DRAINING, "end": State.DONE},
    State.DRAINING: {"finish": State.DRAINING, "terminated": State.DONE, "end": State.DONE},
    State.DONE: {},
}


class Conversation:
    """The life of one session."""

    def __init__(self, now: float) -> None:
        """The websocket is open as of `now`."""
        self.state = State.OPENING
        self.deadline = now + OPENING_SECONDS
        self.reason: Reason | None = None  # why Terminate was sent
        self._plan(now, LIFETIME_SECONDS)

    def _step(self, step: str) -> None:
        self.state = STEPS[self.state][step]

    def begin(self, *, now: float, lifetime: float | None) -> None:
        """Begin has arrived; `lifetime` in seconds if it told when the session expires."""
        self._step("begin")
        self.deadline = float("inf")
        self._plan(now, LIFETIME_SECONDS if lifetime is None else min(LIFETIME_SECONDS, max(1.0, lifetime)))

    def _plan(self, now: float, lifetime: float) -> None:
        self._rotate_idle = now + lifetime - min(300.0, 0.25 * lifetime)
        self._rotate_speaking = now + lifetime - min(60.0, 0.1 * lifetime)

    def finish(self, reason: Reason, *, now: float, within: float = DRAINING_SECONDS) -> None:
        """Terminate is being sent. A second reason only shortens the wait."""
        self.reason = self.reason or reason
        self.deadline = min(self.deadline, now + within) if self.state == State.DRAINING else now + within
        self._step("finish")

    def terminated(self) -> None:
        """Termination has arrived."""
        self._step("terminated" if self.state == State.DRAINING else "end")

    def overdue(self) -> SessionEnd:
        """How the session ends when `deadline` passes."""
        waited_for_begin = self.state == State.OPENING
        self._step("end")
        if waited_for_begin:
            return SessionEnd(kind="no_begin", reason="no Begin came")
        return SessionEnd(kind="no_termination", reason="no Termination came")

    def should_rotate(self, now: float, *, speaking: bool) -> bool:
        """Whether to go on in a new session: from a few minutes before expiry at the next turn boundary, shortly
        before it anyway.
        """
        due = self._rotate_speaking if speaking else self._rotate_idle
        return now > due and self.state is State.STREAMING
