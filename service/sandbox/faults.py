"""A fault plan: what shall go wrong in which session, as data.

The steps are structs tagged by `do`; a JSON file and in-process code build the same objects, and a bad file is refused
at load with the place and the reason. What the steps do to a session is in `mischief.py`; nothing here knows a socket.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from service.sandbox.script import PlanFileError, read_file

Seconds = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Moment = Literal["open", "begin", "terminate"]
CloseCode = Annotated[int, Meta(ge=1000, le=4999)]
UNSENDABLE = frozenset({1004, 1005, 1006, 1015, *range(1016, 3000)})  # RFC 6455 section 7.4: reserved, never in a frame

CLOSE_REASON = "See Error message for details"

# https://www.assemblyai.com/docs/streaming/common-session-errors-and-closures.md
ERRORS: dict[str, tuple[int, str]] = {
    "missing_key": (1008, "Unauthorized Connection: Missing Authorization header"),
    "bad_key": (1008, "Unauthorized Connection: Invalid API key"),
    "expired_token": (1008, "Unauthorized Connection: Signature has expired"),
    "account": (1008, "Unauthorized Connection: Insufficient funds. Please add credits to your account"),
    "too_many": (1008, "Unauthorized Connection: Too many concurrent sessions"),
    "too_many_3009": (3009, "Too many concurrent sessions"),
    "validation": (
        3006,
        "User Input Validation Error: Invalid 'speech_model': Input should be 'u3-rt-pro' or 'universal-3-6-pro'",
    ),
    "inactivity": (3006, "Session terminated due to inactivity: No messages received for 5 seconds"),
    "cancelled": (3005, "Session Cancelled: An error occurred"),
    "duration": (3007, "Input Duration Error: Input Duration Violation: 20.0 ms. Expected between 50 and 1000 ms"),
    "duration_docs": (3007, "Input duration violation: 20 ms. Expected between 50 and 1000 ms"),
    "rate": (3007, "Input Duration Error: Audio Transmission Rate Exceeded: Received 314.9 sec. audio in 1.312326 sec"),
    "rate_docs": (3007, "Audio Transmission Rate Exceeded: too much audio buffered"),
    "expired": (3008, "Session Expired: Maximum session duration exceeded"),
    "internal": (1011, "Internal server error"),
    "try_later": (1013, "Try again later"),
}


class _Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", kw_only=True):
    """One thing that goes wrong."""


class Timed(_Step, frozen=True, kw_only=True):
    """A step with a moment: `at_ms` of audio received, else `on`: before Begin, right after it, or at Terminate."""

    at_ms: Annotated[int, Meta(ge=0)] | None = None
    on: Moment = "open"


# --- the handshake


class Refuse(_Step, frozen=True, tag="refuse"):
    status: Annotated[int, Meta(ge=200, le=599)]
    retry_after: Annotated[int, Meta(ge=0)] | None = None
    location: str | None = None
    body: str = ""


class HangUpgrade(_Step, frozen=True, tag="hang_upgrade"):
    seconds: Seconds = 120


class WrongAccept(_Step, frozen=True, tag="wrong_accept"):
    pass


# --- how it opens


class NoBegin(_Step, frozen=True, tag="no_begin"):
    pass


class DelayBegin(_Step, frozen=True, tag="delay_begin"):
    seconds: Seconds


class NoConfiguration(_Step, frozen=True, tag="no_configuration"):
    pass


class ExpiresIn(_Step, frozen=True, tag="expires_in"):
    seconds: Seconds


# --- how it ends early


def _sendable(code: int) -> None:
    if code in UNSENDABLE:
        raise ValueError(f"close code {code} cannot be sent; for a close without a frame use eof or drop")


class ErrorFrame(Timed, frozen=True, tag="error"):
    name: str | None = None
    code: CloseCode = 3005
    text: str = ERRORS["cancelled"][1]
    with_type: bool = True
    with_code: bool = True
    close: bool = True
    close_code: CloseCode | None = None
    reason: Annotated[str, Meta(max_length=123)] = CLOSE_REASON

    def __post_init__(self) -> None:
        """Accept only the names of the table."""
        if self.name is not None and self.name not in ERRORS:
            raise ValueError(f"unknown error name {self.name!r}; one of {', '.join(ERRORS)}")
        _sendable(self.said[0] if self.close_code is None else self.close_code)

    @property
    def said(self) -> tuple[int, str]:
        """The code and the text of the frame."""
        return (self.code, self.text) if self.name is None else ERRORS[self.name]


class Close(Timed, frozen=True, tag="close"):
    code: CloseCode = 1000
    reason: Annotated[str, Meta(max_length=123)] = ""

    def __post_init__(self) -> None:
        """Accept only codes that may be in a frame."""
        _sendable(self.code)


class Eof(Timed, frozen=True, tag="eof"):
    pass


class Drop(Timed, frozen=True, tag="drop"):
    pass


class _Late(Timed, frozen=True, kw_only=True):
    on: Moment = "begin"


# --- how it hangs


class StopReading(_Late, frozen=True, tag="stop_reading"):
    seconds: Seconds = 120


class Silent(_Late, frozen=True, tag="silent"):
    seconds: Seconds = 120


class Mute(_Late, frozen=True, tag="mute"):
    pass


# --- what it says besides


class Send(_Late, frozen=True, tag="send"):
    text: str
    times: Count = 1


class UnknownType(_Late, frozen=True, tag="unknown_type"):
    times: Count = 1


class Malformed(_Late, frozen=True, tag="malformed"):
    times: Count = 1


class Binary(_Late, frozen=True, tag="binary"):
    times: Count = 1


class Huge(_Late, frozen=True, tag="huge"):
    megabytes: Annotated[float, Meta(gt=0, le=256)] = 30


class Ping(_Late, frozen=True, tag="ping"):
    times: Count = 1


class Pong(_Late, frozen=True, tag="pong"):
    times: Count = 1


class Pings(_Step, frozen=True, tag="pings"):
    every: Annotated[float, Meta(gt=0)]


# --- what happens to its turns


class _TurnStep(_Step, frozen=True, kw_only=True):
    turn: Annotated[int, Meta(ge=0)] | None = None


class DuplicateFinal(_TurnStep, frozen=True, tag="duplicate_final"):
    pass


class LateTwin(_TurnStep, frozen=True, tag="late_twin"):
    pass


class LatePartial(_TurnStep, frozen=True, tag="late_partial"):
    pass


class SwapFinals(_TurnStep, frozen=True, tag="swap_finals"):
    pass


class ReviseTurn(_TurnStep, frozen=True, tag="revise_turn"):
    text: str


class ReviseSpeaker(_TurnStep, frozen=True, tag="speaker_revision"):
    label: str = "B"


# --- how it answers Terminate


class LateTermination(_Step, frozen=True, tag="late_termination"):
    seconds: Seconds


class NoTermination(_Step, frozen=True, tag="no_termination"):
    then: Literal["hang", "close", "eof", "drop"] = "hang"


class NoClose(_Step, frozen=True, tag="no_close"):
    pass


TurnStep = DuplicateFinal | LateTwin | LatePartial | SwapFinals | ReviseTurn | ReviseSpeaker
Ending = ErrorFrame | Close | Eof | Drop
TimedStep = Ending | StopReading | Silent | Mute | Send | UnknownType | Malformed | Binary | Huge | Ping | Pong
Step = (
    TimedStep
    | TurnStep
    | (Refuse | HangUpgrade | WrongAccept | NoBegin | DelayBegin | NoConfiguration | ExpiresIn)
    | (Pings | LateTermination | NoTermination | NoClose)
)

_WHICH = re.compile(r"\*|([1-9]\d*)(-([1-9]\d*)?)?")


class FaultPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Steps by session: `"2"`, `"3-5"`, `"6-"` or `"*"`; counted from 1 in the order they knock, refused ones too."""

    sessions: dict[str, list[Step]] = {}

    def __post_init__(self) -> None:
        """Check the keys."""
        for which in self.sessions:
            if not _WHICH.fullmatch(which):
                raise ValueError(f"session {which!r}: write a number from 1, a range like 3-5 or 6-, or *")

    def steps_for(self, ordinal: int) -> list[Step]:
        """The exact number wins, then the first range that holds it, then `*`."""
        for which, steps in sorted(self.sessions.items(), key=lambda item: not item[0].isdigit()):
            match = _WHICH.fullmatch(which)
            if match and match[1]:
                last = int(match[3]) if match[3] else (ordinal if match[2] else int(match[1]))
                if int(match[1]) <= ordinal <= last:
                    return steps
        return self.sessions.get("*", [])


class _RawPlan(msgspec.Struct, forbid_unknown_fields=True):
    sessions: dict[str, list[msgspec.Raw]]


def load_faults(path: Path) -> FaultPlan:
    """Read and check a fault file; raises PlanFileError with the place and the reason."""
    data = read_file(path)
    place = str(path)
    try:
        sessions: dict[str, list[Step]] = {}
        for which, raw_steps in msgspec.json.decode(data, type=_RawPlan).sessions.items():
            sessions[which] = []
            for number, raw in enumerate(raw_steps, 1):
                place = f"{path}: session {which!r}, step {number}"
                sessions[which].append(msgspec.json.decode(raw, type=Step))
        place = str(path)
        return FaultPlan(sessions)
    except (msgspec.DecodeError, ValueError) as error:
        raise PlanFileError(f"{place}: {error}") from error
