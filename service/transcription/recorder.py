"""Keeping what a job becomes: one ordered line of changes to the store, and from there to the bus. Part of FLOOR 3.

The recorder owns the job while a claim lives. Each change is applied to the job in memory and encoded as an event at
once; a single task commits what has gathered and only then publishes it, so nothing is ever shown that could still be
lost. Partials and progress follow the durable events they came after: a partial is told at once where nothing waits to
be committed, else once that is, and of several of a session only the newest. While the database is away changes gather
up to a bound; then `congested` asks the senders to pause.
"""

from typing import Any

from service.core.errors import Fenced
from service.core.job import (
    Claim,
    Closed,
    Coverage,
    Event,
    Failure,
    Notice,
    Partial,
    Session,
    Stage,
    Status,
    Turn,
    channels,
    make_event,
    may_become,
    rfc3339,
)
from service.core.transcript import Folded
from service.flag import Flag
from service.ports import Bus, Clock
from service.store import Renewal, Store, Write
from service.telemetry import metrics

MAX_PENDING_EVENTS = 1000
MAX_PENDING_BYTES = 1 << 20


class Recorder:
    """The pen of one claim."""

    def __init__(self, claim: Claim, store: Store, bus: Bus, clock: Clock) -> None:
        """Takes over the job of `claim`."""
        self.job = claim.job
        self.finalized = claim.finalized
        self._claim = claim
        self._store = store
        self._bus = bus
        self._clock = clock
        self._positions: dict[int | None, int] = dict.fromkeys(channels(claim.job), 0)
        self._topic = f"events.{claim.job.id}"
        self._seq = claim.event_seq  # of the newest event made
        self._committed = claim.event_seq
        self._write = Write(claim.job)
        self._pending_bytes = 0
        self._partials: dict[str, Partial] = {}  # newest per session, not yet told
        self._current: dict[str, Partial] = {}  # newest per session, of open turns
        self._wake = Flag()
        self._settled = True  # nothing made is waiting to be committed
        self._closing = False
        self._fenced = False

    # --- changes ------------------------------------------------------------------------------------------------------

    def stage(self, stage: Stage) -> None:
        """Note what the job is doing."""
        if self.job.stage != stage:
            self.job.stage = stage
            self._event("job.status", {"status": self.job.status, "stage": stage})

    def warn(self, code: str, message: str) -> None:
        """Warn once per code."""
        if all(notice.code != code for notice in self.job.warnings):
            self.job.warnings.append(Notice(code, message))
            self._event("job.warning", {"code": code, "message": message})

    def sent(self, channel: int | None, position_ms: int) -> None:
        """A channel's stream has reached `position_ms`; the job is as far as its slowest channel."""
        self._positions[channel] = position_ms
        progress = self.job.progress
        progress.sent_ms = max(progress.sent_ms, min(self._positions.values()))

    def session_begin(self, session: Session) -> None:
        """An upstream session has begun."""
        self.job.sessions.append(session)
        body = {
            "session_id": session.id,
            "model": session.model,
            "offset_ms": session.offset_ms,
            "channel": session.channel,
        }
        self._event("session.begin", body)

    def session_lost(self, session: Session | None, closed: Closed, *, retry_in_s: float | None) -> None:
        """A session ended that was not asked to, or could not be opened (None)."""
        if session is not None:
            session.closed = closed
            self._discard(session.id)
        body = {"session_id": session.id if session else None, "code": closed.code, "reason": closed.reason,
                "retry_in_ms": None if retry_in_s is None else round(retry_in_s * 1000)}  # fmt: skip
        self._event("session.lost", body)

    def folded(self, folded: Folded) -> None:
        """A partial, a final or a revision."""
        turn = folded.turn
        if isinstance(turn, Partial):
            self._partials[turn.session_id] = self._current[turn.session_id] = turn
            self._tell_partials()
            return
        if folded.kind == "turn.final":
            current = self._current.get(turn.session_id)
            if current is not None and current.turn_order <= turn.turn_order:
                self._discard(turn.session_id)
            self.job.turn_count = turn.index + 1
            self.finalized[turn.session_id] = max(turn.end_ms, self.finalized.get(turn.session_id, 0))
            self._write.turns.append(turn)
        else:
            self._revise(turn)
        self._event(folded.kind, {"turn": turn})

    def _revise(self, turn: Turn) -> None:
        """A turn not yet committed is replaced where it waits; one committed is updated."""
        waiting = self._write.turns
        for i, earlier in enumerate(waiting):
            if earlier.index == turn.index:
                waiting[i] = turn
                return
        self._write.revised.append(turn)

    def _discard(self, session_id: str) -> None:
        self._partials.pop(session_id, None)
        self._current.pop(session_id, None)

    def release(self, *, not_before_s: float) -> None:
        """Hand the job back to the queue."""
        self._become(Status.QUEUED)
        self._write.not_before_s = not_before_s
        self._event("job.status", {"status": Status.QUEUED, "stage": None})

    def finish(self, status: Status, *, coverage: Coverage, error: Failure | None = None) -> None:
        """End the job."""
        if not coverage.complete and status == Status.COMPLETED:
            self.warn(
                "incomplete_coverage",
                "Some of the audio is not known to have been processed upstream; see coverage.gaps.",
            )
        self._become(status)
        self.job.coverage = coverage
        self.job.error = error
        self.job.finished_at = rfc3339(self._clock.utc_ms())
        self._event(f"job.{status}", {"job": self.job})

    def _become(self, status: Status) -> None:
        assert may_become(self.job.status, status), f"{self.job.status} -> {status}"
        self.job.status = status
        self.job.stage = None
        self._partials.clear()
        self._current.clear()

    def _event(self, kind: str, payload: dict[str, Any]) -> None:
        self._seq += 1
        event = make_event(self.job.id, self._seq, kind, self._clock.utc_ms(), payload)
        self._write.events.append(event)
        self._pending_bytes += len(event.json)
        self._wake.set()
        self._settled = False

    # --- the line -----------------------------------------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        """True while so much waits for the database that no more audio should be sent."""
        return len(self._write.events) >= MAX_PENDING_EVENTS or self._pending_bytes >= MAX_PENDING_BYTES

    async def run(self) -> None:
        """Commit and publish until `close`. Raises `Fenced` when the job is somebody else's."""
        while not self._fenced:
            if self._write.events:
                await self._commit()
                continue
            self._settled = True
            self._tell_partials()
            if self._closing:
                return
            self._wake.clear()
            await self._wake.wait()
        raise Fenced

    async def _commit(self) -> None:
        write, self._write = self._write, Write(self.job)
        self._pending_bytes = 0
        await self._store.write(self._claim, write, after_seq=self._committed)
        self._committed += len(write.events)
        for event in write.events:
            self._publish(event)

    def _tell_partials(self) -> None:
        """At once, or when what they follow has been committed."""
        if not self._settled:
            return
        for partial in self._partials.values():
            partial.index = self.job.turn_count
            self._tell("turn.partial", {"turn": partial})
        self._partials.clear()

    def _tell(self, kind: str, payload: dict[str, Any]) -> None:
        at_ms = self._clock.utc_ms()
        self._publish(make_event(self.job.id, None, kind, at_ms, payload, after_seq=self._committed))

    def _publish(self, event: Event) -> None:
        self._bus.publish(self._topic, event)
        metrics.events.counts[event.type] += 1

    def renewal(self, lease_s: float) -> Renewal:
        """What extends the claim. It keeps the progress, unless the job holds what is not yet committed."""
        return Renewal(self._claim, lease_s, self.job if self._settled else None)

    def tell_progress(self, sent_ms: int) -> None:
        """Tell the progress that a renewal has kept."""
        if self.job.stage == Stage.STREAMING:
            self._tell("job.progress", {"sent_ms": sent_ms, "total_ms": self.job.progress.total_ms})

    def fence(self) -> None:
        """A renewal was refused: the job is somebody else's, unless we have just ended it."""
        if self.job.status == Status.PROCESSING:
            self._fenced = True
            self._wake.set()

    def tell_again(self) -> None:
        """Somebody has begun to listen: tell the open partials once more."""
        self._partials |= self._current
        self._tell_partials()

    def close(self) -> None:
        """Let `run` return when all is written."""
        self._closing = True
        self._wake.set()
