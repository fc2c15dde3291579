"""A job, its turns and its events: the values, the legal transitions, and the one public JSON form that GET, SSE and
webhooks share. FLOOR 0.

Invariants: a job's `status` moves only along `TRANSITIONS`; a durable event has the next integer `seq` of its job; an
event is encoded once, as a line of JSON and as an SSE frame, and those bytes go to every subscriber. While a claim
lives only its owner appends to the job.
"""

import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any

import msgspec

# --- status ----------------------------------------------------------------------------------------------------------


class Status(StrEnum):
    """Small and stable; see TRANSITIONS."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"


class Stage(StrEnum):
    """What a processing job is doing; clients must allow new ones."""

    VALIDATING = "validating"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    FINALIZING = "finalizing"
    RECONNECTING = "reconnecting"
    WAITING_FOR_CAPACITY = "waiting_for_capacity"


# status → {what happens: next status}; a missing key is an illegal transition.
TRANSITIONS: dict[Status, dict[str, Status]] = {
    Status.QUEUED: {"claim": Status.PROCESSING, "cancel": Status.CANCELED, "too many attempts": Status.FAILED},
    Status.PROCESSING: {
        "complete": Status.COMPLETED,
        "fail": Status.FAILED,
        "cancel": Status.CANCELED,
        "hand back": Status.QUEUED,
        "claim after a crash": Status.PROCESSING,
    },
    Status.COMPLETED: {"retry (incomplete coverage)": Status.QUEUED},
    Status.FAILED: {"retry": Status.QUEUED},
    Status.CANCELED: {"retry": Status.QUEUED},
}
TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELED})


def may_become(status: Status, target: Status) -> bool:
    """Whether some transition leads from `status` to `target`."""
    return target in TRANSITIONS[status].values()


# --- the public forms ------------------------------------------------------------------------------------------------


class Notice(msgspec.Struct, frozen=True):
    """One entry of `warnings`."""

    code: str
    message: str


class Audio(msgspec.Struct, frozen=True, kw_only=True):
    """The upload as it came."""

    bytes: int
    sha256: str
    duration_ms: int
    sample_rate: int
    channels: int
    encoding: str
    converted: bool


class Progress(msgspec.Struct):
    """Position of the stream in the file, ms."""

    sent_ms: int
    total_ms: int


class Closed(msgspec.Struct, frozen=True):
    """How an upstream session ended: its close or error code, if any, and the reason."""

    code: int | None
    reason: str


class Session(msgspec.Struct, kw_only=True):
    """One upstream session. `offset_ms` is where in the file it started, `sent_ms` how much audio it was handed."""

    id: str
    model: str | None
    channel: int | None
    offset_ms: int
    sent_ms: int = 0
    audio_duration_seconds: float | None = None
    session_duration_seconds: float | None = None
    closed: Closed | None = None


class Gap(msgspec.Struct, frozen=True):
    """File audio that no session is known to have processed, ms."""

    from_ms: int
    to_ms: int


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """What became of every millisecond of the file."""

    file_ms: int
    sent_ms: int
    upstream_ms: int | None
    gaps: list[Gap]
    last_word_ms: int | None
    complete: bool


class Failure(msgspec.Struct, frozen=True):
    """Why a job failed; `message` is a sentence a user can act on."""

    code: str
    message: str
    retryable: bool
    upstream_code: int | None = None


class Job(msgspec.Struct, kw_only=True):
    """The public job, in the order of the contract. Times are RFC 3339 UTC."""

    id: str
    status: Status
    stage: Stage | None = None
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    filename: str
    audio: Audio
    options: dict[str, Any]
    progress: Progress
    queue_position: int | None = None
    attempt: int = 0
    sessions: list[Session] = []
    turn_count: int = 0
    coverage: Coverage | None = None
    warnings: list[Notice] = []
    error: Failure | None = None
    metadata: dict[str, Any] = {}
    links: dict[str, str] = {}

    @property
    def terminal(self) -> bool:
        """True when nothing more will happen by itself."""
        return self.status in TERMINAL


class TurnWord(msgspec.Struct, gc=False, kw_only=True):
    """One word in file time."""

    text: str
    start_ms: int
    end_ms: int
    confidence: float
    speaker: str | None


class Turn(msgspec.Struct, kw_only=True):
    """One final turn in file time. `index` counts over the whole job in order of commit."""

    index: int
    start_ms: int
    end_ms: int
    transcript: str
    words: list[TurnWord]
    formatted: bool
    session_id: str
    turn_order: int
    end_of_turn_confidence: float
    language: str | None
    speaker: str | None
    channel: int | None
    latency_ms: int


class Partial(msgspec.Struct, kw_only=True):
    """An open turn so far; `index` is provisional. `stable_words`: leading words that will most likely not change."""

    index: int
    transcript: str
    stable_words: int
    start_ms: int
    session_id: str
    turn_order: int
    channel: int | None


def channels(job: Job) -> list[int | None]:
    """The upstream streams of a job: one per channel where it is split, else one that has no number."""
    return list(range(job.audio.channels)) if job.options.get("channels") == "split" else [None]


def links(job_id: str) -> dict[str, str]:
    """Where everything of a job is."""
    base = f"/jobs/{job_id}"
    return {
        "self": base,
        "events": f"{base}/events",
        "transcript": f"{base}/transcript",
        "audio": f"{base}/audio",
        "view": f"{base}/view",
    }


def rfc3339(unix_ms: int) -> str:
    """`2026-11-21T09:35:27.123Z`."""
    second, ms = divmod(unix_ms, 1000)
    return f"{_to_the_second(second)}.{ms:03}Z"


@lru_cache(2)  # of all the events of a second, and of one whose clock was read before it ended
def _to_the_second(unix_s: int) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).isoformat().removesuffix("+00:00")


to_json = msgspec.json.Encoder().encode
job_from_json = msgspec.json.Decoder(Job).decode
turn_from_json = msgspec.json.Decoder(Turn).decode


# --- events ----------------------------------------------------------------------------------------------------------


class Event(msgspec.Struct, gc=False):
    """One event of a job, encoded once.

    `seq` is the durable id, None where the event has none. `after_seq` of such an event is the newest durable event
    it must follow. `json` is the line of JSON; `sse` the frame made of it.
    """

    job_id: str
    seq: int | None
    type: str
    json: bytes
    after_seq: int = 0
    sse: bytes = b""

    def __post_init__(self) -> None:
        """Make the frame. JSON has no line breaks of its own, so one `data:` line carries it."""
        if not self.sse:
            name = self.type.encode()
            head = b"" if self.seq is None else b"id: %d\n" % self.seq
            self.sse = b"%sevent: %s\ndata: %s\n\n" % (head, name, self.json)

    @property
    def terminal(self) -> bool:
        """Whether this event ends a job (until it is retried)."""
        return self.type in TERMINAL_EVENTS


TERMINAL_EVENTS = frozenset({"job.completed", "job.failed", "job.canceled"})


def make_event(
    job_id: str, seq: int | None, kind: str, at_ms: int, payload: dict[str, Any], *, after_seq: int = 0
) -> Event:
    """Encode an event: `id`, `type`, `job_id`, `at` and the payload's members beside them."""
    body = {"id": seq, "type": kind, "job_id": job_id, "at": rfc3339(at_ms), **payload}
    return Event(job_id, seq, kind, to_json(body), after_seq)


# What is told over the bus only, never kept and never shown: the rows are gone, please stop, somebody has begun to
# listen, the log has an event that was too large for the bus.
DELETED, CANCEL, LISTENING, BEHIND = "deleted", "cancel", "listening", "behind"


def hint(job_id: str, kind: str) -> Event:
    """A bus-only event between the processes of the service."""
    return Event(job_id, None, kind, b"{}")


# --- claims ----------------------------------------------------------------------------------------------------------


class Claim(msgspec.Struct, kw_only=True):
    """The right to work on a job. `epoch` is the fencing token every write carries; a stale one is refused.

    `finalized` tells, per upstream session, the end of its last final turn (ms of the file): where a successor starts.
    """

    job: Job
    owner: str
    epoch: int
    event_seq: int
    finalized: dict[str, int]
