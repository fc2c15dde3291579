"""Telemetry: logging never blocks and never tells what it must not; every metric is one of ours."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from service.core.errors import StorageFull
from service.telemetry import MAX_VALUE, bind, configure_logging, metrics, render

CANARY = "canary-4711-the-quick-brown-fox"
log = structlog.get_logger("service.test")


class Lines:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []

    def __call__(self, line: bytes) -> None:
        self.raw.append(line)

    def read(self) -> list[dict[str, Any]]:
        """All lines so far; closing the handler is what waits for its thread."""
        flush()
        return [json.loads(line) for line in self.raw]

    def text(self) -> str:
        flush()
        return b"".join(self.raw).decode()


def flush() -> None:
    for handler in logging.getLogger().handlers:
        if type(handler).__name__ == "_QueueHandler":
            handler.close()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is global; each test leaves it as it was."""
    names = [
        None,
        "service",
        "uvicorn.error",
        "uvicorn.access",
        "python_multipart",
        "httpx",
        "httpcore",
        "sse_starlette",
        "httpx_ws",
    ]
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    yield
    flush()
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture
def lines() -> Lines:
    sink = Lines()
    configure_logging("json", "debug", sink=sink)
    return sink


def test_a_line_is_json_with_its_ids(lines: Lines) -> None:
    with bind(job_id="j1"), bind(request_id="r1"):
        log.info("job accepted", bytes=3, filename="a\nb.wav")
        logging.getLogger("sqlalchemy.pool").warning("slow %s", "pool")
    log.warning("later %s", "on")
    first, second, third = lines.read()
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "event": "job accepted", "level": "info", "logger": "service.test", "job_id": "j1", "request_id": "r1",
        "bytes": 3, "filename": "a\nb.wav",
    }  # fmt: skip
    assert (second["event"], second["job_id"], second["logger"]) == ("slow pool", "j1", "sqlalchemy.pool")
    assert (third["event"], "job_id" in third) == ("later on", False)
    assert all(raw.count(b"\n") == 1 for raw in lines.raw)


def test_levels() -> None:
    sink = Lines()
    configure_logging("json", "warning", sink=sink)
    log.info("no")
    log.warning("yes")
    logging.getLogger("uvicorn.error").info("no")
    assert [line["event"] for line in sink.read()] == ["yes"]


def test_the_console_keeps_an_event_on_one_line() -> None:
    sink = Lines()
    configure_logging("console", "info", sink=sink)
    log.info("job accepted", filename="a\r\n\x1b[31mb\u2028c.wav")
    text = sink.text()
    assert text.count("\n") == 1
    assert "\x1b[31mb" not in text
    assert "\\x1b[31mb" in text


def test_a_sink_that_blocks_blocks_nobody() -> None:
    stuck = threading.Event()
    dropped = metrics.log_lines_dropped._value.get()

    def block(_line: bytes) -> None:
        stuck.wait(10)

    configure_logging("json", "info", sink=block, size=100)
    started = time.perf_counter()
    for number in range(1000):
        log.info("line", number=number)
    assert time.perf_counter() - started < 2
    assert 895 <= metrics.log_lines_dropped._value.get() - dropped <= 900
    stuck.set()


def test_a_sink_that_fails_is_counted() -> None:
    def fail(_line: bytes) -> None:
        raise BrokenPipeError

    dropped = metrics.log_lines_dropped._value.get()
    configure_logging("json", "info", sink=fail)
    log.info("line")
    flush()
    assert metrics.log_lines_dropped._value.get() == dropped + 1


def test_a_process_with_an_unread_stderr_goes_on_and_exits() -> None:
    program = (
        "import structlog; from service.telemetry import configure_logging; configure_logging(None, 'info')\n"
        "log = structlog.get_logger('service')\n"
        "for n in range(6000): log.info('line', text='x' * 100)\n"
        "print('done', flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b"done\n"
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["event"] == "line"


# --- what must not be told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["sse_starlette.sse", "httpx", "httpcore.http11", "httpx_ws", "uvicorn.access", "python_multipart.multipart"],
)
def test_talkative_libraries_are_silenced_at_any_level(lines: Lines, name: str) -> None:
    library = logging.getLogger(name)
    before, library.level = library.level, logging.DEBUG
    library.debug("chunk: %s", CANARY)
    library.info("GET /jobs/x?token=%s", CANARY)
    if name.startswith(("uvicorn", "python_multipart")):
        library.critical(CANARY)
    library.level = before
    assert lines.read() == []


def test_uvicorn_may_say_that_it_started(lines: Lines) -> None:
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").info('"WebSocket /v3/ws?prompt=%s" [accepted]', CANARY)
    started, accepted = lines.read()
    assert started["event"] == "started"
    assert accepted["event"] == '"WebSocket /v3/ws?…" [accepted]'


@pytest.mark.parametrize(
    "value",
    [
        f"wss://example.com/v3/ws?sample_rate=16000&token={CANARY}",
        f"Authorization: Bearer {CANARY}",
        f"api_key={CANARY}",
        CANARY.encode(),
        bytearray(CANARY.encode()),
        {"frame": [CANARY.encode()]},
        SecretStr(CANARY),
        ValueError(CANARY),
    ],
)
def test_values_go_through_a_net(lines: Lines, value: object) -> None:
    log.warning("value", value=value)
    assert lines.read()
    assert CANARY not in lines.text()


def test_long_values_are_cut(lines: Lines) -> None:
    log.info("long", value="x" * 10_000)
    assert len(lines.read()[0]["value"]) == MAX_VALUE


def test_exceptions_are_told_by_type_and_place(lines: Lines) -> None:
    try:
        try:
            raise ValueError(CANARY)
        except ValueError as exc:
            raise StorageFull from exc
    except StorageFull:
        log.exception("upload failed")
    try:
        raise ExceptionGroup("group", [RuntimeError(CANARY), FileNotFoundError(2, "missing", "/x")])
    except ExceptionGroup:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    first, second = lines.read()
    assert CANARY not in lines.text()
    story = first["exception"].splitlines()
    assert (story[1], story[2]) == ("ValueError", "then")
    assert story[-1].startswith("StorageFull: The disk is full.")
    assert "test_telemetry.py" in story[0]
    assert "ExceptionGroup" in second["exception"]
    assert "  | RuntimeError" in second["exception"].splitlines()
    assert "FileNotFoundError: [Errno 2] missing: '/x'" in second["exception"]


async def test_a_lost_task_does_not_tell_its_audio(lines: Lines) -> None:
    async def fail() -> None:
        raise ValueError(CANARY)

    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    asyncio.get_running_loop().call_exception_handler(
        {"message": "Task failed", "task": task, "exception": task.exception()}
    )
    (line,) = lines.read()
    assert line["event"] == "Task failed"
    assert line["exception"].endswith("ValueError")
    assert CANARY not in lines.text()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_rendered_under_our_name() -> None:
    metrics.chunk_lateness.observe(0.003)
    metrics.uploads.labels(result="accepted").inc()
    metrics.queue_depth.set(7)
    text = render().decode()
    metrics.queue_depth.set(0)
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(name.startswith(("turnwire_", "process_")) for name in names)
    assert "turnwire_queue_depth 7.0" in text
    assert 'turnwire_chunk_lateness_seconds_bucket{le="0.005"}' in text
    assert 'turnwire_job_transitions_total{status="failed"}' in text
    assert "_created" not in text
