"""What the steps of a fault plan do to one session.

Three kinds of steps: settings the session asks for (`find`), moments (`due_on`, `due_at`) that `perform` plays out on
the wire, and changes to the stream of turns (`reshape`). A session without faults passes through here untouched.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from service.sandbox.clock import Clock
from service.sandbox.faults import (
    Binary,
    Close,
    Drop,
    DuplicateFinal,
    Ending,
    Eof,
    ErrorFrame,
    Huge,
    LatePartial,
    LateTwin,
    Malformed,
    Moment,
    Mute,
    Ping,
    Pong,
    ReviseSpeaker,
    ReviseTurn,
    Send,
    Silent,
    Step,
    StopReading,
    SwapFinals,
    TimedStep,
    TurnStep,
    UnknownType,
)
from service.sandbox.recogniser import spread
from service.sandbox.wire import Wire

Message = dict[str, Any]
S = TypeVar("S", bound=Step)


class Mischief:
    """The faults of one session."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        timed = [step for step in steps if isinstance(step, TimedStep)]
        self._moments = [step for step in timed if step.at_ms is None]
        self._waiting = sorted((step for step in timed if step.at_ms is not None), key=lambda step: step.at_ms or 0)
        self._turn_steps = [step for step in steps if isinstance(step, TurnStep)]
        self._held: list[Message] = []  # finals that go out after that of the next turn

    def find(self, kind: type[S]) -> S | None:
        """The first step of that kind."""
        return next((step for step in self._steps if isinstance(step, kind)), None)

    def due_on(self, moment: Moment) -> list[TimedStep]:
        return [step for step in self._moments if step.on == moment]

    def due_at(self, received_ms: float) -> list[TimedStep]:
        """The steps whose audio position has now been received; each once."""
        due: list[TimedStep] = []
        while self._waiting and (self._waiting[0].at_ms or 0) <= received_ms:
            due.append(self._waiting.pop(0))
        return due

    def reshape(self, message: Message) -> list[Message]:
        """What goes out in place of this message."""
        if not (self._turn_steps and message.get("end_of_turn")):
            return [message]
        order = message["turn_order"]
        out, held = [message], list[Message]()
        for step in self._turn_steps:
            if step.turn not in {None, order}:
                continue
            match step:
                case DuplicateFinal():
                    out.append(message)
                case LatePartial():
                    out.append(_as_partial(message))
                case ReviseTurn(text=text):
                    out.append(_reworded(message, text))
                case ReviseSpeaker(label=label):
                    out.append(_revision(message, label))
                case LateTwin():
                    held.append(message)
                case SwapFinals():
                    out.remove(message)
                    held.append(message)
        released = [late for late in self._held if late["turn_order"] < order]
        self._held = [late for late in self._held if late["turn_order"] >= order] + held
        return out + released

    def left_over(self) -> list[Message]:
        """What was held back for a final that never came."""
        held, self._held = self._held, []
        return held


async def perform(step: TimedStep, wire: Wire, clock: Clock) -> Ending | None:
    """Play a step out; an ending is not carried out here but returned."""
    match step:
        case ErrorFrame() | Close() | Eof() | Drop():
            return step
        case StopReading(seconds=seconds) | Silent(seconds=seconds):
            wire.muted = wire.muted or isinstance(step, Silent)
            wire.stop_reading()
            await clock.sleep(seconds)
            return Drop()
        case Mute():
            wire.muted = True
        case Ping(times=times):
            for number in range(times):
                await wire.connection.ping(f"storm-{number}")
        case Pong(times=times):
            for _ in range(times):
                await wire.connection.pong(b"unasked")
        case _:
            frame = _frame(step)
            for _ in range(getattr(step, "times", 1)):
                await wire.send(frame)
                await asyncio.sleep(0)  # a storm must not starve the other sessions
    return None


def _frame(step: Send | UnknownType | Malformed | Binary | Huge) -> str | bytes:
    match step:
        case Send(text=text):
            return text
        case UnknownType():
            return json.dumps({"type": "FromTheFuture", "turn_order": 0, "value": [1, 2, 3]})
        case Malformed():
            return '{"type":"Turn","turn_order":0,"words":['
        case Binary():
            return bytes(range(256))
        case Huge(megabytes=megabytes):
            return json.dumps({"type": "Warning", "warning_code": 1000, "warning": "x" * int(megabytes * 1_000_000)})


def _as_partial(final: Message) -> Message:
    words = [{**word, "word_is_final": False} for word in final["words"]]
    return {**final, "end_of_turn": False, "end_of_turn_confidence": 0.0, "utterance": "", "words": words}


def _reworded(final: Message, text: str) -> Message:
    start, end = (final["words"][0]["start"], final["words"][-1]["end"]) if final["words"] else (0, 0)
    words = [
        {"start": word.start, "end": word.end, "text": word.text, "confidence": word.confidence, "word_is_final": True}
        for word in spread(text, start, end)
    ]
    return {**final, "transcript": text, "utterance": text, "words": words}


def _revision(final: Message, label: str) -> Message:
    words = [{**word, "speaker": label} for word in final["words"]]
    return {
        "type": "SpeakerRevision",
        "revisions": [{"turn_order": final["turn_order"], "speaker_label": label, "words": words}],
    }
