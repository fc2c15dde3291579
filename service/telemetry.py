"""What the service tells its operator: all metrics in one list, and logs. FLOOR 1.

Invariants: a log line never waits for whoever reads it (a bounded queue and a thread stand between, what does not fit
is dropped and counted); no transcript, key, token, query string or byte of audio is logged at any level. The second is
kept by construction: other libraries speak from WARNING on only, exceptions are told by type and place, with their
text only where it is ours, and a net over every value takes out bytes, query strings and bearer tokens.
"""

import contextlib
import logging
import os
import queue
import re
import sys
import threading
import traceback
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Literal

import msgspec
import structlog
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor

from service.core.errors import TurnwireError
from service.core.job import Status

# --- metrics ---------------------------------------------------------------------------------------------------------

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATENESS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations


class Durations(Collector):
    """A histogram of seconds, observed by one thread at a time.

    prometheus_client's own takes two locks and walks its buckets, which for every chunk costs as much as framing it.
    """

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        """Of `_LATENESS` buckets."""
        self._name, self._text = name, text
        self._counts = [0] * (len(_LATENESS) + 1)  # of each bucket alone, and of what is beyond
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(_LATENESS, seconds)] += 1
        self._sum += seconds

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self._counts)

    def over(self, seconds: float) -> int:
        """How many of them were longer than the bucket that ends at `seconds` or next below."""
        return sum(self._counts[bisect_right(_LATENESS, seconds) :])

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See prometheus_client."""
        limits = [*(str(float(limit)) for limit in _LATENESS), "+Inf"]
        counts = [float(count) for count in accumulate(self._counts)]
        yield HistogramMetricFamily(self._name, self._text, list(zip(limits, counts, strict=True)), self._sum)


class Tally(Collector):
    """A counter by one label, counted by one thread at a time; prometheus_client's own takes a lock each time."""

    def __init__(self, name: str, text: str, label: str, registry: CollectorRegistry) -> None:
        """Nothing counted."""
        self._name, self._text, self._labelnames = name, text, [label]
        self.counts: defaultdict[str, int] = defaultdict(int)
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """See prometheus_client."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labelnames)
        for value, count in self.counts.items():
            family.add_metric([value], count)
        yield family


class Metrics:
    """Every metric of the process."""

    def __init__(self) -> None:
        """A registry of its own, so that a library's metrics stay out unless they are wanted."""
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"turnwire_{name}", text, labels, registry=r)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"turnwire_{name}", text, registry=r)

        def seconds(name: str, text: str) -> Durations:
            return Durations(f"turnwire_{name}_seconds", text, r)

        self.chunk_lateness = seconds("chunk_lateness", "How long after their turn on the wheel audio chunks were sent")
        self.loop_lag = seconds("event_loop_lag", "How late timers of the event loop fired")
        self.commit_seconds = seconds("commit", "Time to commit a group of writes")
        self.streams = gauge("streams", "Upstream streams running")
        self.admission_open = gauge("admission_open", "1 while new streams are taken, 0 while the load forbids it")
        self.followers = gauge("followers", "Event streams open to clients")
        self.queue_depth = gauge("queue_depth", "Jobs waiting")
        self.queue_oldest_seconds = gauge("queue_oldest_seconds", "Age of the job that waits longest")
        self.jobs = counter("job_transitions", "Changes of a job's status, by the new one", "status")
        self.events = Tally("turnwire_events", "Events published, by type", "type", r)
        self.upstream_sessions = counter("upstream_sessions", "Upstream sessions begun")
        self.upstream_reconnects = counter("upstream_reconnects", "Upstream sessions opened again, by code", "code")
        self.upstream_ends = counter("upstream_ends", "Upstream sessions that ended unasked, by code", "code")
        self.upstream_oddities = counter("upstream_oddities", "Messages malformed or of unknown type", "kind")
        self.uploads = counter("uploads", "Uploads, by `accepted` or the code of their refusal", "result")
        self.upload_bytes = counter("upload_bytes", "Bytes of uploads received")
        self.retention_removals = counter("retention_removals", "What the sweeper removed", "kind")
        self.webhook_deliveries = counter("webhook_deliveries", "Attempts to deliver a webhook", "result")
        self.log_lines_dropped = counter("log_lines_dropped", "Log lines that nobody read in time")
        for status in Status:  # an alert on a rate needs the series before its first event
            self.jobs.labels(status=status.value)


metrics = Metrics()


def render() -> bytes:
    """The Prometheus text of all metrics; serve it as `METRICS_CONTENT_TYPE`."""
    return generate_latest(metrics.registry)


# --- logs: from a call to a line -------------------------------------------------------------------------------------

MAX_VALUE = 2000  # characters of one value of a line
_OURS = "service"
# Below WARNING other libraries tell headers, URLs, frames and SQL parameters. What differs from that rule:
_FLOORS = {
    "uvicorn.error": logging.INFO,  # start and stop; its DEBUG has websocket frames
    "uvicorn.access": logging.CRITICAL + 1,  # paths with their query
    "python_multipart": logging.CRITICAL + 1,  # bytes of the body
}
_QUERY = re.compile(r"\?[^\s\"'<>?]*=[^\s\"'<>]*")
_SECRET = re.compile(
    r"(?i)\b(bearer\s+|(?:token|api_key|apikey|key|secret|authorization)[=:]\s*(?:bearer\s+)?)[^\s\"',;]+"
)
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


def bind(**ids: str) -> contextlib.AbstractContextManager[None]:
    """Put `request_id`, `job_id` or `session_id` on every line logged inside, in tasks started inside too."""
    return bound_contextvars(**ids)


def _may_speak(record: logging.LogRecord) -> bool:
    """Whatever level somebody gave a library's logger."""
    top = record.name.partition(".")[0]
    floor = 0 if top == _OURS else _FLOORS.get(record.name, _FLOORS.get(top, logging.WARNING))
    return record.levelno >= floor


def _tell_exception(_logger: object, _method: str, event: EventDict) -> EventDict:
    """`exc_info` becomes types and places: a library's text may hold a frame, a URL or SQL parameters."""
    info = event.pop("exc_info", None)
    exc = sys.exc_info()[1] if info is True else info[1] if isinstance(info, tuple) else info
    if isinstance(exc, BaseException):
        event["exception"] = "\n".join(_story(exc))
    return event


def _story(exc: BaseException, indent: str = "") -> Iterator[str]:
    before = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    if before is not None:
        yield from _story(before, indent)
        yield f"{indent}then"
    for frame in traceback.extract_tb(exc.__traceback__):
        yield f"{indent}  {frame.filename}:{frame.lineno} in {frame.name}"
    yield indent + _named(exc)
    for inner in exc.exceptions if isinstance(exc, BaseExceptionGroup) else ():
        yield from _story(inner, indent + "  | ")


def _named(exc: BaseException) -> str:
    return _scrub(f"{type(exc).__name__}: {exc}") if isinstance(exc, TurnwireError | OSError) else type(exc).__name__


def _net(_logger: object, _method: str, event: EventDict) -> EventDict:
    if event.get("logger") == "asyncio":  # its further lines are reprs of tasks and of their exceptions
        event["event"] = str(event["event"]).partition("\n")[0]
    return {name: value if name == "exception" else _safe(value) for name, value in event.items()}


def _safe(value: object) -> object:
    match value:
        case None | bool() | int() | float():
            return value
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case BaseException():
            return _named(value)
        case dict():
            return {str(name): _safe(member) for name, member in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_safe(member) for member in value]
        case _:
            return _scrub(str(value))


def _scrub(text: str) -> str:
    return _SECRET.sub(r"\1…", _QUERY.sub("?…", text[:MAX_VALUE]))


def _one_line(_logger: object, _method: str, event: EventDict) -> EventDict:
    """For the console, where nothing else escapes what a file name or a close reason may carry."""
    return {n: v.translate(_CONTROLS) if isinstance(v, str) and n != "exception" else v for n, v in event.items()}


# --- logs: from a line to stderr -------------------------------------------------------------------------------------


def _to_stderr(line: bytes) -> None:
    """Past `sys.stderr`: the interpreter would wait for its lock at exit, for ever if nobody reads."""
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(2, rest) :]


class _QueueHandler(logging.Handler):
    """Renders in the caller's context, writes in a thread, waits for nobody."""

    def __init__(self, sink: Callable[[bytes], None], size: int) -> None:
        super().__init__()
        self._sink = sink
        self._lines: queue.Queue[bytes | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._write, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record).encode(errors="backslashreplace") + b"\n")
        except Exception:  # noqa: BLE001 - a line that cannot be made or kept must not break who logged it
            metrics.log_lines_dropped.inc()

    def close(self) -> None:
        """Write what is queued, for a second at most. Called by `logging` at exit."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=1)
            self._thread.join(1)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._sink(line)
            except Exception:  # noqa: BLE001 - the reader is gone; another may come
                metrics.log_lines_dropped.inc()


def configure_logging(
    log_format: Literal["json", "console"] | None,
    level: Literal["debug", "info", "warning", "error"],
    *,
    sink: Callable[[bytes], None] = _to_stderr,
    size: int = 5000,
) -> None:
    """Send everything logged in this process to `sink`; again to change it. Without a format a terminal gets text.

    uvicorn must be run with `log_config=None`, or it installs handlers of its own.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    terminal = sys.stderr.isatty()
    renderer: list[Processor] = [structlog.processors.JSONRenderer(_to_json)]
    if log_format == "console" or (log_format is None and terminal):
        plain = structlog.dev.plain_traceback  # ours is one already; without this structlog would warn about it
        renderer = [_one_line, structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=plain)]
    shared: list[Processor] = [
        merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
    ]
    positional = structlog.stdlib.PositionalArgumentsFormatter()
    to_formatter = structlog.stdlib.ProcessorFormatter.wrap_for_formatter
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, positional, to_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = _QueueHandler(sink, size)
    handler.addFilter(_may_speak)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _tell_exception, _net, *renderer],
        )
    )
    _install(handler, threshold)


def _install(handler: _QueueHandler, threshold: int) -> None:
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _QueueHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(max(threshold, logging.WARNING))
    logging.getLogger(_OURS).setLevel(threshold)
    for name, floor in _FLOORS.items():
        logging.getLogger(name).setLevel(max(threshold, floor))
    logging.captureWarnings(capture=True)


def _to_json(event: EventDict, **_: object) -> str:
    return msgspec.json.encode(event).decode()
