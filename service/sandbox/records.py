"""What a session did, kept for tests to judge: pacing, coverage, how it ended and what it would have cost.

Stamps are `time.monotonic()`, undistorted by the sandbox's speed. Keys and tokens are never kept. Lists inside a record
are capped, so a long session cannot grow without bound.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

MAX_ARRIVALS = 200_000  # 5.5 hours of 100 ms messages
MAX_CONTROLS = 1_000
SESSION_CAP_S = 10_800.0

Credential = Literal["none", "header", "query"]
EndedBy = Literal["open", "refused", "terminated", "server", "client_close", "dropped"]


@dataclass(slots=True)
class SessionRecord:
    """One knock at the door, from upgrade to close."""

    ordinal: int
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    credential: Credential
    opened_at: float = field(default_factory=time.monotonic)
    refused_status: int | None = None
    session_id: str | None = None
    begin_at: float | None = None
    terminate_at: float | None = None
    termination_at: float | None = None
    closed_at: float | None = None
    ended_by: EndedBy = "open"
    error: tuple[int, str] | None = None  # the Error frame that was sent, code and text
    close_code: int | None = None  # as the connection saw it; 1006 when no close frame came
    close_reason: str | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # of each audio message: stamp, bytes
    messages: int = 0  # audio messages, also those beyond the cap of `arrivals`
    audio_bytes: int = 0
    audio_ms: float = 0.0
    audio: bytearray = field(default_factory=bytearray)  # only with keep_audio
    controls: list[tuple[float, str]] = field(default_factory=list)  # of each text message: stamp, type
    turns: int = 0  # finals sent
    billed_seconds: float = 0.0  # in sandbox seconds; settled when it is closed

    def audio_arrived(self, message: bytes, *, keep: bool) -> None:
        self.messages += 1
        self.audio_bytes += len(message)
        if len(self.arrivals) < MAX_ARRIVALS:
            self.arrivals.append((time.monotonic(), len(message)))
        if keep:
            self.audio += message

    def control_arrived(self, kind: str) -> None:
        if len(self.controls) < MAX_CONTROLS:
            self.controls.append((time.monotonic(), kind))
