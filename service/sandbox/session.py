"""One conversation: the rules of Streaming v3, from the upgrade to the close.

Three tasks share a session and the first that ends, ends it: the reader (arrival, framing, pace; never waits for
recognition), the speaker (`speaker.py`) and the watch (expiry, inactivity, heartbeat). Each returns how the session
ends, as data; one place carries it out. https://www.assemblyai.com/docs/streaming/common-session-errors-and-closures.md
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Sequence

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from service.sandbox import faults
from service.sandbox.faults import ERRORS, Ending, ErrorFrame, Step
from service.sandbox.mischief import Mischief, perform
from service.sandbox.parameters import ParameterError, parse_query
from service.sandbox.pcm import BYTES_PER_SAMPLE
from service.sandbox.records import SessionRecord
from service.sandbox.rules import Intake
from service.sandbox.speaker import Control, House, Speaker
from service.sandbox.wire import Wire

HEARTBEAT_S = 5.0
LONGEST_NAP_S = 1.0
ECHO = 200  # characters of a bad message that an Error repeats

logger = logging.getLogger(__name__)


class Gone:
    """The client left first."""


class Session:
    """One accepted connection. `run` returns when it is over."""

    def __init__(
        self,
        connection: ServerConnection,
        house: House,
        record: SessionRecord,
        steps: Sequence[Step],
        *,
        keep_audio: bool,
    ) -> None:
        self.wire = Wire(connection)
        self.over = asyncio.Event()
        self._connection = connection
        self._house = house
        self._clock = house.clock
        self._record = record
        self._mischief = Mischief(steps)
        self._keep_audio = keep_audio
        self._opened = self._last_message = self._clock.now()
        self._terminating = False

    async def run(self, query: str, cap: float, refusal: tuple[int, str] | None) -> None:
        """Talk. `refusal` is what the credentials earned, `cap` the longest session they allow."""
        try:
            ending = await self._open(query, cap, refusal) or await self._converse()
            self._note(ending)
            if not isinstance(ending, Gone):
                await self.wire.end(ending)
        finally:
            self._bill()

    async def _open(self, query: str, cap: float, refusal: tuple[int, str] | None) -> Ending | None:
        """Judge the request; failures go out in-band, on a connection already upgraded."""
        short = self._mischief.find(faults.ExpiresIn)
        self._expires = self._opened + (cap if short is None else short.seconds)
        for step in self._mischief.due_on("open"):
            if ending := await perform(step, self.wire, self._clock):
                return ending
        if refusal is not None:
            return _error(*refusal)
        try:
            self._parameters = parse_query(query)
        except ParameterError as bad:
            return _error(3006, str(bad))
        self._intake = Intake(self._parameters.sample_rate, BYTES_PER_SAMPLE.get(self._parameters.encoding, 2))
        self._speaker = Speaker(self.wire, self._house, self._record, self._mischief, self._parameters, self._expires)
        return None

    async def _converse(self) -> Ending | Gone:
        tasks = [asyncio.create_task(work) for work in (self._read(), self._speaker.run(), self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        # In this order: a rule broken by the client comes before what happened to be said meanwhile.
        first = next(task for task in tasks if task in done)
        try:
            return first.result()
        except ConnectionClosed:
            return Gone()
        except Exception:
            logger.exception("the sandbox's session %d failed", self._record.ordinal)
            return _error(*ERRORS["cancelled"])

    async def _read(self) -> Ending | Gone:
        with contextlib.suppress(ConnectionClosed):
            async for message in self._connection:
                if self.wire.deaf:  # a planned silence that began elsewhere
                    self.wire.stop_reading()
                    await asyncio.Event().wait()
                self._last_message = self._clock.now()
                ending = await self._audio(message) if isinstance(message, bytes) else self._control(message)
                if ending is not None:
                    return ending
        return Gone()

    async def _audio(self, message: bytes) -> Ending | None:
        self._record.audio_arrived(message, keep=self._keep_audio)
        if self._terminating:
            return None
        encoding = self._parameters.encoding
        if encoding not in BYTES_PER_SAMPLE:
            what = encoding.replace("_", " ").title()
            return _error(
                3006, f"User Input Validation Error: Failed to decode {what} packet: the sandbox reads PCM only"
            )
        if (broken := self._intake.take(len(message), self._last_message)) is not None:
            return _error(*broken)
        self._record.audio_ms = self._intake.received_ms
        self._speaker.queue.put_nowait((self._intake.processed_at, message))
        for step in self._mischief.due_at(self._intake.received_ms):
            if ending := await perform(step, self.wire, self._clock):
                return ending
        return None

    def _control(self, text: str) -> Ending | None:
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            return _error(3006, f"Invalid JSON: {error}")
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            return _error(3006, f"Invalid Message: {text[:ECHO]}")
        kind = message["type"]
        self._record.control_arrived(kind[:ECHO])
        match kind:
            case "KeepAlive":
                pass  # having arrived is all it is for
            case "ForceEndpoint":
                self._speaker.queue.put_nowait((self._intake.processed_at, Control.FORCE_ENDPOINT))
            case "Terminate":
                if not self._terminating:
                    self._terminating = True
                    self._record.terminate_at = time.monotonic()
                    self._speaker.queue.put_nowait((self._intake.processed_at, Control.TERMINATE))
            case "UpdateConfiguration":
                try:
                    self._parameters.update(message)
                except ParameterError as bad:
                    return _error(3006, str(bad))
            case _:
                return _error(3006, f"Invalid Message Type: {kind[:ECHO]}")
        return None

    async def _watch(self) -> Ending:
        timeout = self._parameters.values.get("inactivity_timeout")
        pings = self._mischief.find(faults.Pings)
        next_ping = self._opened if pings is not None else float("inf")
        next_beat, beat_at, beat_ms = self._opened + HEARTBEAT_S, self._opened, 0.0
        while True:
            now = self._clock.now()
            if now >= self._expires:
                return _error(*ERRORS["expired"])
            if timeout is not None and now >= self._last_message + timeout:
                text = f"Session terminated due to inactivity: No messages received for {timeout} seconds"
                return _error(3006, text)
            if pings is not None and now >= next_ping:
                next_ping = now + pings.every
                await self._connection.ping()
            if now >= next_beat:
                received = self._intake.received_ms
                if self._parameters.on("session_heartbeat") and self._speaker.begun is not None:
                    await self._heartbeat(now - self._speaker.begun, (received - beat_ms) / 1000 / (now - beat_at))
                next_beat, beat_at, beat_ms = now + HEARTBEAT_S, now, received
            wake = min(self._expires, next_beat, next_ping, now + LONGEST_NAP_S)
            await self._clock.sleep(max(wake - now, 0.001))

    async def _heartbeat(self, duration: float, realtime_factor: float) -> None:
        message = {
            "type": "Heartbeat",
            "total_audio_received_ms": round(self._intake.received_ms),
            "total_duration_ms": round(duration * 1000),
            "realtime_factor": round(realtime_factor, 4),
            "max_speech_probability": 0.999,
        }
        await self.wire.send(message)

    def _note(self, ending: Ending | Gone) -> None:
        record = self._record
        match ending:
            case _ if record.termination_at is not None:
                record.ended_by = "terminated"
            case Gone():
                record.ended_by = "dropped" if self._connection.protocol.close_rcvd is None else "client_close"
            case ErrorFrame():
                record.error, record.ended_by = ending.said, "server"
            case _:
                record.ended_by = "server"

    def _bill(self) -> None:
        """Billed is session time: a session dropped without Terminate runs on until something else ends it.

        https://www.assemblyai.com/docs/faq/how-does-universal-streaming-session-based-pricing-work.md
        """
        record = self._record
        record.closed_at = time.monotonic()
        record.close_code, record.close_reason = self._connection.close_code, self._connection.close_reason
        if record.begin_at is None or (begun := self._speaker.begun) is None:
            return
        end = self._clock.now()
        if record.ended_by == "dropped":
            timeout = self._parameters.values.get("inactivity_timeout")
            end = self._expires if timeout is None else min(self._expires, self._last_message + timeout)
        record.billed_seconds = end - begun


def _error(code: int, text: str) -> ErrorFrame:
    return ErrorFrame(code=code, text=text)
