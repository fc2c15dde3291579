"""One channel of a job, streamed through as many upstream sessions as it takes. Part of FLOOR 3.

A session that is lost is followed by another that starts at the end of the last final turn, a rotated one by another
that starts where it ended: no audio is skipped and no final said twice. One deadline (an `asyncio.timeout` that is
rescheduled as the conversation moves on) bounds every wait, so that nothing a peer does can hold a job, and a stop
takes effect in any state. Each session is entered and left in this one task.
"""

import asyncio
from contextlib import AsyncExitStack, suppress
from math import isinf
from typing import Literal

import structlog

from service.core import protocol
from service.core.coverage import confirmed, resume_from
from service.core.job import Closed, Failure, Session, Stage
from service.core.options import upstream_options
from service.core.pacing import Schedule, backoff
from service.core.protocol import Begin, SessionEnd, SessionEnded, SpeakerRevision, Termination, Turn, Verdict, classify
from service.core.session import Conversation, Reason, State
from service.core.transcript import Folder
from service.ports import UpstreamSession
from service.telemetry import metrics
from service.transcription.control import Outcome, Work
from service.transcription.sender import Sender, Source, read

CLOSE_SECONDS = 2.0

log = structlog.get_logger(__name__)


class ChannelStream:
    """Streams one channel to its end."""

    def __init__(self, work: Work, channel: int | None, pick: int | Literal["mix"]) -> None:
        """`channel` marks turns (None where the job is not split); `pick` is what of the file is sent."""
        self._work = work
        self._channel = channel
        self._pick = pick
        self._total_ms = work.info.duration_ms
        self._furthest_ms = -1
        self._progress_at = work.clock.now()
        self._losses = 0  # since the last progress
        self._once: set[int | None] = set()
        self._unterminated = 0
        self._last_told: Closed | None = None
        # The session now running:
        self._limit: asyncio.Timeout | None = None
        self._conversation = Conversation(0)
        self._session: Session | None = None
        self._sender: Sender | None = None
        self._ws: UpstreamSession | None = None
        self._broken: Exception | None = None

    async def run(self) -> Outcome:
        """Session after session until the channel is done, stopped or failed."""
        work = self._work
        work.control.listeners.add(self._on_stop)
        try:
            while not work.control.stop:
                if self._all_terminated():
                    return Outcome("done")
                position = resume_from(self._sessions(), work.recorder.finalized)
                end = await self._run_session(min(position, self._total_ms))
                if end is not None and (outcome := await self._lost(end)):
                    return outcome
            return Outcome("stopped")
        finally:
            work.control.listeners.discard(self._on_stop)
            if self._furthest_ms < 0:
                work.start_line.leave(work.clock.now())

    # --- between sessions ---------------------------------------------------------------------------------------------

    def _sessions(self) -> list[Session]:
        return [session for session in self._work.recorder.job.sessions if session.channel == self._channel]

    def _all_terminated(self) -> bool:
        """Whether the newest session of the channel took it to its end and ended properly.

        One of an earlier claim must be confirmed by upstream's own count: a retry is there to send the rest again.
        """
        newest = self._sessions()[-1:]
        return any(
            (confirmed(s) or (s is self._session and s.audio_duration_seconds is not None))
            and s.offset_ms + s.sent_ms >= self._total_ms
            for s in newest
        )

    async def _pause(self, seconds: float, stage: Stage) -> None:
        """Wait, unless stopped."""
        if seconds > 0:
            self._work.recorder.stage(stage)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._work.clock.real(seconds)):
                    await self._work.control.stopped.wait()

    async def _lost(self, end: SessionEnd) -> Outcome | None:
        """Decide what follows an end nobody asked for. None: another session."""
        verdict = classify(end)
        metrics.upstream_ends.labels(code=str(end.code or end.kind)).inc()
        work, now = self._work, self._work.clock.now()
        all_sent = self._conversation.reason == "end"
        self._unterminated += all_sent
        if self._unterminated >= 2:
            self._tell_lost(end, None)
            work.recorder.warn(
                "no_termination",
                "All audio was sent twice, but AssemblyAI never confirmed the end; the tail may be incomplete.",
            )
            return Outcome("done")
        if (
            verdict.action == "fail"
            or (verdict.action == "once" and end.code in self._once)
            or now - self._progress_at > work.patience_s
        ):
            self._tell_lost(end, None)
            return Outcome("failed", self._failure(verdict, end))
        if verdict.action == "wait":
            delay = end.retry_after if end.retry_after is not None else 10 + 50 * work.jitter()
            self._tell_lost(end, delay)
            work.recorder.stage(Stage.WAITING_FOR_CAPACITY)
            return Outcome("no_capacity", delay_s=delay)
        if verdict.action == "once":
            self._once.add(end.code)
        at_once = verdict.action == "rotate" and self._losses == 0
        delay = 0.0 if at_once else max(end.retry_after or 0.0, backoff(self._losses, work.jitter()))
        self._losses += 1
        self._tell_lost(end, delay)
        if self._session is not None:
            metrics.upstream_reconnects.labels(code=str(end.code or end.kind)).inc()
        await self._pause(delay, Stage.RECONNECTING)
        return None

    def _tell_lost(self, end: SessionEnd, retry_in_s: float | None) -> None:
        session_id = None if self._session is None else self._session.id
        log.warning("session lost", session_id=session_id, end=end.kind, code=end.code, retry_in_s=retry_in_s)
        closed = Closed(end.code, end.reason or end.kind.replace("_", " "))
        # A peer that refuses every minute for a quarter of an hour is told of once.
        if self._session is not None or closed != self._last_told or retry_in_s is None:
            self._work.recorder.session_lost(self._session, closed, retry_in_s=retry_in_s)
        self._last_told = closed

    def _failure(self, verdict: Verdict, end: SessionEnd) -> Failure:
        retryable = verdict.action in ("retry", "rotate", "once", "wait")
        return Failure(
            verdict.error, verdict.message, retryable, end.code if end.kind in ("refused", "closed") else None
        )

    # --- one session --------------------------------------------------------------------------------------------------

    async def _run_session(self, position_ms: int) -> SessionEnd | None:
        """Stream from `position_ms` until the session ends. None: it ended as asked (at the end, for rotation, by a
        stop).
        """
        work = self._work
        self._session = self._sender = self._ws = None
        options, rate = work.recorder.job.options, work.info.format.upstream_rate
        query = protocol.query(upstream_options(options), sample_rate=rate)
        self._conversation = Conversation(work.clock.now())
        self._conversation.deadline = float("inf")  # the backend bounds connecting itself
        source = Source(self._read, work.info, self._pick, position_ms, work.blobs.read_seconds)
        reading: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(None) as self._limit, AsyncExitStack() as stack:
                async with work.gate.enter(self._tell_place) as waited:
                    self._progress_at += waited  # by our own will: it does not use up the patience
                    reading = asyncio.create_task(source.run(), name="read-ahead")
                    reading.add_done_callback(self._on_read)
                    self._ws = await stack.enter_async_context(work.upstream.connect(query))
                self._conversation = Conversation(work.clock.now())
                self._reschedule()
                await self._converse(self._ws, source, position_ms)
        except TimeoutError:
            if self._broken is not None:
                raise self._broken from None
            if reading is not None and reading.done():
                reading.result()  # the audio is gone or unreadable: that is what ended the session
            return None if work.control.stop else self._conversation.overdue()
        except SessionEnded as exc:
            asked = self._conversation.state == State.DONE or (
                work.control.stop and self._conversation.state == State.OPENING
            )
            return None if asked or self._conversation.reason in ("cancel", "drain", "failed") else exc.end
        finally:
            self._limit = None
            if reading is not None:
                reading.cancel()
            self._leave()
        return None

    def _tell_place(self, waiting: bool) -> None:
        connecting = Stage.RECONNECTING if self._losses else Stage.CONNECTING
        self._work.recorder.stage(Stage.WAITING_FOR_CAPACITY if waiting else connecting)

    async def _read(self, start: int, length: int) -> bytes:
        work = self._work
        return await read(work.blobs, work.recorder.job.id, start, length, work.clock, lambda: work.patience_s)

    async def _converse(self, ws: UpstreamSession, source: Source, position_ms: int) -> None:
        work, clock = self._work, self._work.clock
        schedule = Schedule(work.info.format.upstream_rate, work.recorder.job.options.get("chunk_ms", 100))
        folder: Folder | None = None
        session: Session | None = None
        while True:
            message = await ws.receive()
            if isinstance(message, Begin) and folder is None:
                session = self._begin(message, position_ms)
                folder = Folder(
                    session_id=session.id,
                    channel=self._channel,
                    offset_ms=position_ms,
                    chunk_ms=schedule.chunk_seconds * 1000,
                    labelled=bool(work.recorder.job.options.get("speaker_labels")),
                )
                self._start_sender(ws, source, schedule, session, folder)
            elif folder is None or session is None or self._sender is None:
                continue
            elif isinstance(message, Turn):
                now = clock.now()
                if message.end_of_turn:  # kept with how far the session was handed the audio
                    self._note_position(now)
                folded = folder.turn(
                    message,
                    next_index=work.recorder.job.turn_count,
                    elapsed_ms=self._sender.elapsed_ms(now),
                    position_ms=position_ms + session.sent_ms,
                )
                if folded is not None:
                    work.recorder.folded(folded)
                    if folded.kind == "turn.final":
                        self._progressed(now)
            elif isinstance(message, SpeakerRevision):
                for folded in folder.revision(message):
                    work.recorder.folded(folded)
            elif isinstance(message, Termination):
                await self._terminated(ws, message)
                return

    def _begin(self, message: Begin, position_ms: int) -> Session:
        work = self._work
        lifetime = None
        if message.expires_at is not None:  # by the wall; the deadline is kept on our own clock, which no one sets
            lifetime = (message.expires_at - work.clock.utc_ms() / 1000) / work.clock.real(1)
        self._conversation.begin(now=work.clock.now(), lifetime=lifetime)
        self._reschedule()
        model = message.configuration.model if message.configuration else None
        session = self._session = Session(
            id=message.id,
            model=model or work.recorder.job.options.get("speech_model"),
            channel=self._channel,
            offset_ms=position_ms,
        )
        metrics.upstream_sessions.inc()
        log.info("session began", session_id=session.id, offset_ms=position_ms)
        work.recorder.session_begin(session)
        work.recorder.stage(Stage.STREAMING)
        return session

    def _start_sender(
        self, ws: UpstreamSession, source: Source, schedule: Schedule, session: Session, folder: Folder
    ) -> None:
        work = self._work
        recorder, lease = work.recorder, work.lease

        def paused(now: float) -> bool:
            return recorder.congested or not lease.held(now)

        def sent(now: float) -> None:
            self._note_position(now)
            if self._conversation.should_rotate(now, speaking=folder.speaking):
                self._finish("rotate")

        sender = self._sender = Sender(
            ws, source, schedule, work.clock, offset_ms=session.offset_ms, total_ms=self._total_ms,
            paused=paused, sent=sent, ended=lambda: self._finish("end"), broke=self._on_break,
        )  # fmt: skip
        work.start_line.arrive(session.offset_ms, lambda start: sender.begin(work.pacer, start), work.clock.now())

    def _note_position(self, now: float) -> None:
        position_ms = None if self._sender is None else self._sender.position_ms
        if position_ms is None or self._session is None:
            return
        self._session.sent_ms = position_ms - self._session.offset_ms
        if position_ms > self._furthest_ms:
            self._furthest_ms = position_ms
            self._progressed(now)
            self._work.recorder.sent(self._channel, position_ms)

    def _progressed(self, now: float) -> None:
        self._progress_at = now
        self._losses = 0

    def _finish(self, reason: Reason) -> None:
        """Send Terminate; what is still said is waited for until a deadline."""
        if (
            self._ws is None
            or self._sender is None
            or self._conversation.state not in (State.STREAMING, State.DRAINING)
        ):
            return
        self._sender.stop()
        self._note_position(self._work.clock.now())
        if self._conversation.state == State.STREAMING:
            self._ws.finish()
            if reason == "end":
                self._work.recorder.stage(Stage.FINALIZING)
        if reason in ("end", "rotate"):
            self._conversation.finish(reason, now=self._work.clock.now())
        else:
            self._conversation.finish(reason, now=self._work.clock.now(), within=self._work.control.grace_s)
        self._reschedule()

    def _on_stop(self) -> None:
        if self._conversation.state in (State.STREAMING, State.DRAINING) and self._sender is not None:
            self._finish(self._work.control.stop or "drain")
        elif self._limit is not None and self._conversation.state == State.OPENING:
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _on_break(self, exc: Exception) -> None:
        self._broken = exc
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _on_read(self, reading: asyncio.Task[None]) -> None:
        if not reading.cancelled() and reading.exception() is not None and self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _reschedule(self) -> None:
        if self._limit is None or self._limit.expired():
            return
        left = self._conversation.deadline - self._work.clock.now()
        when = None if isinf(left) else asyncio.get_running_loop().time() + self._work.clock.real(left)
        self._limit.reschedule(when)

    async def _terminated(self, ws: UpstreamSession, message: Termination) -> None:
        self._conversation.terminated()
        assert self._session is not None
        self._session.audio_duration_seconds = message.audio_duration_seconds or 0.0
        self._session.session_duration_seconds = message.session_duration_seconds
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(None)
        try:
            async with asyncio.timeout(self._work.clock.real(CLOSE_SECONDS)):
                while True:
                    await ws.receive()
        except SessionEnded as exc:
            self._session.closed = Closed(exc.end.code, exc.end.reason)
        except TimeoutError:
            self._session.closed = Closed(None, "no close frame after Termination")

    def _leave(self) -> None:
        if self._sender is not None:
            self._sender.stop()
            self._note_position(self._work.clock.now())
        session, stopped = self._session, self._conversation.reason in ("cancel", "drain", "failed")
        if session is not None:
            log.info("session left", session_id=session.id, sent_ms=session.sent_ms)
        if session is not None and session.closed is None and stopped:
            session.closed = Closed(None, "left before Termination came")
