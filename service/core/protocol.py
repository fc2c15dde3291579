"""The wire of AssemblyAI Streaming v3: messages to and from JSON, the query string, and what every end of a session
means. FLOOR 0.

Invariants: an unknown message type is a value (`Unknown`), never an error; a known type with impossible fields is
`Malformed`; each way a session can end is decided by one table, `ENDS`, read from the top, by code *and* text,
because the codes have moved between releases. Source of the rules:
https://www.assemblyai.com/docs/streaming/common-session-errors-and-closures and
https://www.assemblyai.com/docs/streaming/api-spec/streaming-websocket (state of November 2026).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlencode

import msgspec

from service.core.errors import UpstreamError

TERMINATE = '{"type":"Terminate"}'
MIN_CHUNK_MS, MAX_CHUNK_MS = 50, 1000
MAX_MESSAGE_BYTES = 128_000  # a larger audio message is closed with 1009


# --- messages from upstream ------------------------------------------------------------------------------------------


Ms: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
Order: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class Word(msgspec.Struct, gc=False, kw_only=True):
    """One word; `start` and `end` in ms of *this session's* audio."""

    text: str
    start: Ms
    end: Ms
    confidence: float = 0.0
    word_is_final: bool = False
    speaker: str | None = None


class Configuration(msgspec.Struct, gc=False):
    """The echo of eight settings; only the model matters here."""

    model: str | None = None


class Begin(msgspec.Struct, tag_field="type", tag="Begin"):
    """First message; `expires_at` in Unix seconds."""

    id: str
    expires_at: float | None = None
    configuration: Configuration | None = None


class Turn(msgspec.Struct, tag_field="type", tag="Turn", gc=False):
    """A partial (`end_of_turn` false) or final turn; `turn_order` restarts with each session."""

    turn_order: Order
    end_of_turn: bool = False
    turn_is_formatted: bool = False
    transcript: str = ""
    end_of_turn_confidence: float = 0.0
    words: list[Word] = []
    language_code: str | None = None
    speaker_label: str | None = None


class Revision(msgspec.Struct):
    """New labels for one turn."""

    turn_order: Order
    speaker_label: str | None = None
    words: list[Word] = []


class SpeakerRevision(msgspec.Struct, tag_field="type", tag="SpeakerRevision"):
    """Labels that changed after the turn's end."""

    revisions: list[Revision] = []


class Termination(msgspec.Struct, tag_field="type", tag="Termination", gc=False):
    """Last message: seconds of audio processed and of session billed."""

    audio_duration_seconds: float | None = None
    session_duration_seconds: float | None = None


class ErrorFrame(msgspec.Struct, tag_field="type", tag="Error"):
    """Sent right before an abnormal close; the close frame's reason says less than this one."""

    error_code: int | None = None
    error: str = ""


class Unknown(msgspec.Struct):
    """A message type this client has no use for; several were added during 2026."""

    type: str


Message: TypeAlias = Begin | Turn | SpeakerRevision | Termination | ErrorFrame | Unknown


class Malformed(UpstreamError):
    """AssemblyAI sent a message that is not of its own protocol."""

    code = "upstream_protocol"


class _Head(msgspec.Struct):
    type: str | None = None
    error: Any = None
    error_code: Any = None


_KNOWN = {"Begin", "Turn", "SpeakerRevision", "Termination", "Error"}
_message = msgspec.json.Decoder(Begin | Turn | SpeakerRevision | Termination | ErrorFrame)
_head = msgspec.json.Decoder(_Head)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode(frame: str | bytes) -> Message:
    """Parse one text frame; raises `Malformed`. A frame with `error` is an Error, whatever else it has or lacks (older
    services).
    """
    try:
        message: Message = _message.decode(frame)
        return message
    except _UNREADABLE:
        pass
    try:
        head = _head.decode(frame)
    except _UNREADABLE as exc:
        raise Malformed(f"AssemblyAI sent a frame that cannot be read: {exc}") from None
    if head.error is not None and head.type in (None, "Error"):
        code = head.error_code if isinstance(head.error_code, int) else None
        return ErrorFrame(code, head.error if isinstance(head.error, str) else msgspec.json.encode(head.error).decode())
    if head.type is None or head.type in _KNOWN:
        raise Malformed(
            f"AssemblyAI sent a {head.type or 'typeless'} message with fields missing or of the wrong type."
        )
    return Unknown(head.type)


# --- the query string ------------------------------------------------------------------------------------------------


def query(options: Mapping[str, Any], *, sample_rate: int) -> str:
    """Encode streaming options: lists as one JSON string, booleans in lower case, `sample_rate` of the audio on the
    wire (Hz).
    """
    pairs = [("sample_rate", str(sample_rate)), ("encoding", "pcm_s16le")]
    pairs += [(name, _parameter(value)) for name, value in options.items()]
    return urlencode(pairs)


def _parameter(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        return msgspec.json.encode(value).decode()
    return str(value)


# --- how sessions end ------------------------------------------------------------------------------------------------

EndKind = Literal[
    "refused",
    "closed",
    "lost",
    "unreachable",
    "no_begin",
    "silent",
    "stalled",
    "no_termination",
    "oversized",
    "invalid",
    "malformed",
]
Action = Literal["retry", "once", "wait", "rotate", "fail"]


class SessionEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How a session ended when nobody asked it to.

    `kind` "refused": HTTP answer instead of an upgrade, `code` its status. "closed": Error frame and/or close frame,
    `code` the Error frame's before the close frame's, `reason` the Error frame's text before the close reason. Every
    other kind has no code.
    """

    kind: EndKind
    code: int | None = None
    reason: str = ""
    retry_after: float | None = None


class SessionEnded(UpstreamError):
    """The upstream session is over."""

    def __init__(self, end: SessionEnd) -> None:
        """Carry `end`; classification is the caller's."""
        super().__init__(f"{end.kind} {end.code or ''} {end.reason}".strip())
        self.end = end


class Verdict(msgspec.Struct, frozen=True):
    """What to do about an end: `retry` with backoff, `once` more only, `wait` for capacity, `rotate` at once, or
    `fail` with `error`.
    """

    action: Action
    error: str
    message: str


class _Row(msgspec.Struct, frozen=True):
    kinds: tuple[EndKind, ...]
    codes: range | tuple[int | None, ...] | None  # None: any
    text: str  # a regular expression, searched case-insensitively; "" matches all
    action: Action
    error: str
    message: str
    source: str


_DOC = "https://www.assemblyai.com/docs/streaming/common-session-errors-and-closures"
_LIMITS = "https://www.assemblyai.com/docs/streaming/rate-limits"
_RFC = "https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1"
_SEEN = "observed of the live service, June-September 2026"

ENDS: tuple[_Row, ...] = (
    _Row(("refused",), (401, 403), "", "fail", "upstream_auth",
         "AssemblyAI refused the API key (HTTP {code}). Check ASSEMBLYAI_API_KEY and the account, then retry the job.", _SEEN),
    _Row(("refused",), (429,), "", "wait", "upstream_unavailable", "AssemblyAI has no capacity for another session (HTTP 429).", _LIMITS),
    _Row(("refused",), (408, 425, *range(500, 600)), "", "retry", "upstream_unavailable",
         "AssemblyAI answered HTTP {code}. Retry the job when the service is back.", _SEEN),
    _Row(("refused",), range(400, 500), "", "fail", "upstream_rejected",
         "AssemblyAI refused the connection (HTTP {code}). Check TURNWIRE_UPSTREAM_URL.", _SEEN),
    _Row(("refused",), None, "", "fail", "upstream_protocol",
         "The upstream URL answered HTTP {code} instead of a websocket upgrade. Check TURNWIRE_UPSTREAM_URL.", _RFC),
    _Row(("closed",), None, "too many (concurrent )?sessions|concurrent session", "wait", "upstream_unavailable",
         "AssemblyAI has no capacity for another session.", _SEEN),
    _Row(("closed",), (3009,), "", "wait", "upstream_unavailable", "AssemblyAI has no capacity for another session.", _DOC),
    _Row(("closed",), None, "transmission rate exceeded|too much audio buffered", "once", "upstream_protocol",
         "AssemblyAI says that audio arrived faster than real time: {reason}", _SEEN),
    _Row(("closed",), None, "session expired|maximum session duration", "rotate", "upstream_unavailable", "The AssemblyAI session expired.", _DOC),
    _Row(("closed",), None, r"inactivity\b", "retry", "upstream_unavailable", "AssemblyAI closed the session for inactivity.", _DOC),
    _Row(("closed",), None, "unauthorized connection", "fail", "upstream_auth",
         "AssemblyAI refused the API key: {reason}. Check ASSEMBLYAI_API_KEY and the account, then retry the job.", _DOC),
    _Row(("closed",), None, "user input validation", "fail", "upstream_rejected",
         "AssemblyAI refused an option: {reason}. Upload again with it corrected.", _DOC),
    _Row(("closed",), None, "input duration violation|invalid json|invalid message", "fail", "upstream_protocol",
         "AssemblyAI refused a message: {reason}. This is a fault of this service; please report it.", _DOC),
    _Row(("closed",), (1008,), "", "fail", "upstream_auth",
         "AssemblyAI refused the API key (1008 {reason}). Check ASSEMBLYAI_API_KEY and the account, then retry the job.", _DOC),
    _Row(("closed",), (3006,), "", "fail", "upstream_rejected",
         "AssemblyAI refused an option or message (3006 {reason}). Check the options and upload again.", _DOC),
    _Row(("closed",), (3007, 1009), "", "fail", "upstream_protocol",
         "AssemblyAI refused an audio message ({code} {reason}). This is a fault of this service; please report it.", _DOC),
    _Row(("closed",), (3008,), "", "rotate", "upstream_unavailable", "The AssemblyAI session expired.", _DOC),
    _Row(("closed",), (1000, 1001, 1002, 1005, 1006, 1007, 1011, 1012, 1013, 1014, 3005, None), "", "retry", "upstream_unavailable",
         "AssemblyAI closed the session ({code} {reason}) and could not be reached again in time. Retry the job when the service is back.", _RFC),
    _Row(("closed",), None, "", "once", "upstream_protocol", "AssemblyAI closed the session with an unknown code ({code} {reason}).", _SEEN),
    _Row(("lost", "silent", "stalled", "oversized"), None, "", "retry", "upstream_unavailable",
         "The connection to AssemblyAI broke ({reason}) and could not be restored in time. Retry the job when the service is back.", _RFC),
    _Row(("unreachable",), None, "", "retry", "upstream_unavailable",
         "AssemblyAI could not be reached ({reason}). Check the network and TURNWIRE_UPSTREAM_URL, then retry the job.", _SEEN),
    _Row(("no_begin",), None, "", "retry", "upstream_unavailable", "AssemblyAI accepted connections but began no session.", _SEEN),
    _Row(("no_termination",), None, "", "retry", "upstream_unavailable", "AssemblyAI did not end the session when asked to.", _SEEN),
    _Row(("invalid", "malformed"), None, "", "fail", "upstream_protocol",
         "The upstream endpoint does not speak the streaming protocol: {reason}. Check TURNWIRE_UPSTREAM_URL.", _RFC),
)  # fmt: skip


def classify(end: SessionEnd) -> Verdict:
    """The first row of `ENDS` that fits `end`; every end fits one."""
    for row in ENDS:
        if (
            end.kind in row.kinds
            and (row.codes is None or end.code in row.codes)
            and re.search(row.text, end.reason, re.IGNORECASE)
        ):
            message = row.message.format(
                code=end.code or "no code", reason=end.reason.rstrip(". ") or "no reason given"
            )
            return Verdict(row.action, row.error, message)
    raise AssertionError(f"no row of ENDS fits {end}")  # unreachable: a test walks all kinds and codes
