"""The speaking half of a session: Begin, what was heard of the audio, Termination; strictly in the order things
arrived.

It takes audio and controls from a queue, each with the moment the service would have worked through it: a hasty client
is not refused but throttled. https://www.assemblyai.com/docs/streaming/message-sequence.md
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from service.sandbox import faults
from service.sandbox.clock import Clock
from service.sandbox.faults import Close, Drop, Ending, Eof
from service.sandbox.mischief import Mischief, perform
from service.sandbox.parameters import Parameters
from service.sandbox.pcm import Decoder
from service.sandbox.recogniser import Heard, Opening, RecogniserFactory
from service.sandbox.records import SessionRecord
from service.sandbox.turns import Message, TurnWriter
from service.sandbox.wire import Wire

MODEL = "sandbox"  # what Begin calls it: nobody shall take its transcripts for AssemblyAI's
API_VERSION = "2025-05-12"


class Control(Enum):
    """What a client can ask for in between audio."""

    FORCE_ENDPOINT = auto()
    TERMINATE = auto()


@dataclass(frozen=True, slots=True)
class House:
    """What all sessions of a sandbox share."""

    clock: Clock
    recogniser: RecogniserFactory
    double_finals: bool


class Speaker:
    """Says everything a session has to say; `run` returns how it wants to end."""

    def __init__(
        self,
        wire: Wire,
        house: House,
        record: SessionRecord,
        mischief: Mischief,
        parameters: Parameters,
        expires: float,
    ) -> None:
        self.queue: asyncio.Queue[tuple[float, bytes | Control]] = asyncio.Queue()
        self.begun: float | None = None
        self._wire = wire
        self._clock = house.clock
        self._record = record
        self._mischief = mischief
        self._parameters = parameters
        self._expires = expires
        self._decoder = Decoder(parameters.encoding)
        self._writer = TurnWriter(parameters, double_finals=house.double_finals)
        self._recogniser = house.recogniser(Opening(record.ordinal, parameters.sample_rate))

    async def run(self) -> Ending:
        try:
            return await self._begin() or await self._listen()
        finally:
            await self._recogniser.close()

    async def _begin(self) -> Ending | None:
        if self._mischief.find(faults.NoBegin) is not None:
            await asyncio.Event().wait()
        if (late := self._mischief.find(faults.DelayBegin)) is not None:
            await self._clock.sleep(late.seconds)
        message = {
            "type": "Begin",
            "id": str(uuid.uuid4()),
            "expires_at": int(self._clock.unix_in(self._expires - self._clock.now())),
            "configuration": self._configuration(),
        }
        if self._mischief.find(faults.NoConfiguration) is not None:
            del message["configuration"]
        self.begun, self._record.begin_at = self._clock.now(), time.monotonic()
        self._record.session_id = str(message["id"])
        await self._wire.send(message)
        return await self._play("begin")

    def _configuration(self) -> Message:
        """The eight settings that are echoed."""
        given = self._parameters.values
        return {
            "model": MODEL,
            "mode": given.get("mode", "balanced") if self._parameters.is_pro else None,
            "api_version": self._record.headers.get("AssemblyAI-Version", API_VERSION),
            **{name: self._parameters.on(name) for name in ("speaker_labels", "redact_pii", "filter_profanity")},
            **{name: given.get(name) for name in ("domain", "voice_focus")},
        }

    async def _listen(self) -> Ending:
        while True:
            ready_at, item = await self.queue.get()
            if (wait := ready_at - self._clock.now()) > 0:
                await self._clock.sleep(wait)
            if isinstance(item, bytes):
                await self._say(await self._recogniser.feed(self._decoder.decode(item)))
            elif item is Control.FORCE_ENDPOINT:
                await self._say(await self._recogniser.flush())
            else:
                return await self._terminate()

    async def _terminate(self) -> Ending:
        """Turn(s), SpeakerRevision, Termination, close 1000: in this order."""
        if (ending := await self._play("terminate")) is not None:
            return ending
        last = await self._recogniser.flush()
        await self._say(last)
        if not last:
            await self._tell(self._writer.empty_final())
        for message in (*self._mischief.left_over(), *self._writer.speaker_revision()):
            await self._wire.send(message)
        if (swallow := self._mischief.find(faults.NoTermination)) is not None:
            if swallow.then == "hang":
                await asyncio.Event().wait()
            endings: dict[str, Ending] = {"close": Close(), "eof": Eof(), "drop": Drop()}
            return endings[swallow.then]
        if (late := self._mischief.find(faults.LateTermination)) is not None:
            await self._clock.sleep(late.seconds)
        assert self.begun is not None
        # Integers: the official SDK's reader dies of a fraction.
        termination = {
            "type": "Termination",
            "audio_duration_seconds": round(self._record.audio_ms / 1000),
            "session_duration_seconds": round(self._clock.now() - self.begun),
        }
        self._record.termination_at = time.monotonic()
        await self._wire.send(termination)
        if self._mischief.find(faults.NoClose) is not None:
            await asyncio.Event().wait()
        return Close(code=1000, reason="Session Ended")

    async def _say(self, heard: Sequence[Heard]) -> None:
        for one in heard:
            await self._tell(self._writer.write(one))

    async def _tell(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._record.turns += message.get("end_of_turn", False)
            for shaped in self._mischief.reshape(message):
                await self._wire.send(shaped)

    async def _play(self, moment: faults.Moment) -> Ending | None:
        for step in self._mischief.due_on(moment):
            if ending := await perform(step, self._wire, self._clock):
                return ending
        return None
