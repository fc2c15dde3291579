"""The command line without a service: help, wrong use, files that cannot be, what is shown of events."""

import io
import json
import os
import re
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from service.cli import app
from service.cli.client import RefusedError, Service, backoff, key_of, service_url
from service.cli.terminal import CommandError, clock, printable, size
from service.cli.transcribe import _format
from service.cli.view import LiveView, Narrator, View, _tail
from tests.engines.nats import Nats
from tests.engines.postgres import Postgres
from tests.engines.s3 import S3

COMMANDS = [
    ["transcribe"],
    ["serve"],
    ["worker"],
    ["sandbox"],
    ["migrate"],
    ["doctor"],
    ["jobs", "ls"],
    ["jobs", "show"],
    ["jobs", "cancel"],
    ["jobs", "retry"],
    ["jobs", "rm"],
    ["keys", "create"],
    ["keys", "ls"],
    ["keys", "revoke"],
]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no `.env` of the machine reaches a test."""
    from service.settings import Settings, _variable

    for field in Settings.model_fields:
        monkeypatch.delenv(_variable(field), raising=False)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def problem(*arguments: str, code: int = 2) -> str:
    """What is said of a command that cannot be: on stderr, nothing on stdout, no traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    return result.stderr


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["jobs"], ["keys"], *COMMANDS], ids=" ".join)
def test_help_has_examples(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"turnwire {' '.join(command)}".rstrip() in result.stdout.partition("Example")[2]
    assert "..." not in result.stdout.partition("Commands:")[2].partition("Example")[0], "a summary is cut short"


def test_a_worker_needs_a_broker() -> None:
    assert "need a nats:// broker" in problem("worker")


def test_the_help_of_the_sandbox_has_both_formats() -> None:
    text = run("sandbox", "--help").stdout
    assert "Script file (--script): JSON" in text
    assert "Fault file (--faults): JSON" in text
    assert '{"text": "Harbor Point Claims, good morning."}' in text


def test_version_and_wrong_use() -> None:
    assert run("--version").stdout.startswith("turnwire ")
    assert run().exit_code == 2
    assert "No such command" in problem("transcripe")


# --- wrong use -------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be(tmp_path: Path) -> None:
    assert "does not exist" in problem("transcribe", "nowhere.wav")
    assert "is a directory" in problem("transcribe", str(tmp_path))
    assert "does not exist" in problem("sandbox", "--script", "nowhere.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "doc"], "should be one of txt, json, srt, vtt"),
        (["--output", "nowhere/x.txt"], "cannot be written"),
        (["--output", "."], "cannot be written"),
        (["--url", "localhost:8000"], "--url: 'localhost:8000' should be an address such as http://127.0.0.1:8000"),
        (["--url", "http://h", "--keep", "kept"], "goes without --url"),
        (["--key", "k"], "goes with --url"),
        (["--url", "http://127.0.0.1:9", "--key", "@nowhere"], "--key: cannot read nowhere"),
        (["--url", "http://127.0.0.1:9", "--key", "schlüssel"], "--key: should be ASCII"),
        (["--option", "mix"], "should be NAME=VALUE"),
    ],
)
def test_wrong_options_are_said_before_anything_is_done(tmp_path: Path, options: list[str], said: str) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    assert said in problem("transcribe", "a.wav", *options)


def test_settings_stop_the_start_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem("serve") == (
        "turnwire: ASSEMBLYAI_API_KEY is not set: set it to stream to AssemblyAI, or work offline with --sandbox\n"
    )
    assert problem("serve", "--sandbox", "--host", "0.0.0.0").splitlines()[-1].startswith("turnwire: TURNWIRE_HOST: ")
    monkeypatch.setenv("TURNWIRE_DATADIR", "x")
    for command in (["serve"], ["migrate"], ["transcribe", __file__]):
        assert problem(*command) == (
            "turnwire: TURNWIRE_DATADIR is no setting of Turnwire: did you mean TURNWIRE_DATA_DIR?\n"
        )


def test_a_bad_script_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text("{")
    assert "script.json" in problem("sandbox", "--script", "script.json", "--port", "0")


def test_a_service_that_is_not_there() -> None:
    for command in (["jobs", "ls"], ["jobs", "show", "x"], ["transcribe", __file__]):
        said = problem(*command, "--url", "http://127.0.0.1:9", code=1)
        assert re.fullmatch(
            "turnwire: http://127.0.0.1:9 does not answer: (no connection|Connection refused); "
            "is it running\\? `turnwire serve` starts it\n",
            said,
        )


# --- doctor and migrate ----------------------------------------------------------------------------------------------


def marks(result: Result) -> dict[str, str]:
    """What the doctor says: part → mark."""
    return {line[2:16].strip(): line[0] for line in result.stdout.splitlines()}


def test_the_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWIRE_UPSTREAM_URL", "ws://127.0.0.1:9/")
    monkeypatch.setenv("TURNWIRE_PORT", "0")
    result = run("doctor")
    assert result.exit_code == 1
    assert {part for part, mark in marks(result).items() if mark == "✗"} == {"upstream"}
    assert "127.0.0.1:9 cannot be reached" in result.stdout
    monkeypatch.setenv("TURNWIRE_DATA_DIR", "/dev/null/data")
    assert marks(run("doctor"))["data directory"] == "✗"
    monkeypatch.setenv("TURNWIRE_PORT", "none")
    assert run("doctor").stdout.startswith("✗ settings       TURNWIRE_PORT: ")


def ill(part: str, words: str) -> None:
    """The doctor finds this fault and says so with a mark and an exit code."""
    result = run("doctor")
    assert result.exit_code == 1, result.output
    [line] = [line for line in result.stdout.splitlines() if line.startswith(f"✗ {part:<14} ")]
    assert words in line


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TURNWIRE_UPSTREAM_URL": "wss://streaming.assemblyai.com/v3/ws"}, "ASSEMBLYAI_API_KEY"),
        ({"TURNWIRE_UPSTREAM_URL": "ws://192.0.2.1/", "ASSEMBLYAI_API_KEY": "secret"}, "wss://"),
        ({"TURNWIRE_WEBHOOK_SECRET": "whsec_?"}, "TURNWIRE_WEBHOOK_SECRET"),
        ({"TURNWIRE_HOST": "0.0.0.0"}, "loopback"),
    ],
)
def test_the_doctor_finds_wrong_settings(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    from service.cli import doctor

    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.1)
    monkeypatch.setenv("TURNWIRE_UPSTREAM_URL", "ws://127.0.0.1:9/")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ill("settings", words)


def test_the_doctor_finds_a_full_disk_a_taken_port_and_a_clock_gone_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TURNWIRE_UPSTREAM_URL", "ws://127.0.0.1:9/")
    monkeypatch.setenv("TURNWIRE_MAX_UPLOAD_BYTES", str(1 << 60))
    ill("free space", "lower TURNWIRE_MAX_UPLOAD_BYTES")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("TURNWIRE_PORT", str(taken.getsockname()[1]))
        ill("port", "in use")
    assert run("migrate").exit_code == 0
    later = time.time() + 3600
    os.utime(tmp_path / "data" / "turnwire.db", (later, later))
    ill("clock", "behind")


def test_migrate_makes_the_database_the_doctor_looks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run("migrate").exit_code == 0
    assert (tmp_path / "data" / "turnwire.db").exists()
    monkeypatch.setenv("TURNWIRE_UPSTREAM_URL", "ws://127.0.0.1:9/")
    assert "✓ database       schema " in run("doctor").stdout
    (tmp_path / "data" / "turnwire.db").write_bytes(b"no database" * 100)
    assert marks(run("doctor"))["database"] == "✗"


def test_the_doctor_looks_at_the_broker_and_the_audio_store(monkeypatch: pytest.MonkeyPatch, s3_server: S3) -> None:
    from service.backends.nats import connection, queue

    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(queue, "ASK_SECONDS", 0.5)

    def doctor(broker: str, audio: str, **variables: str) -> str:
        variables |= {"TURNWIRE_BROKER_URL": broker, "TURNWIRE_AUDIO_URL": audio}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        output = run("doctor").output
        assert not re.search("s3cret|wr0ng", output)
        return output

    monkeypatch.setenv("TURNWIRE_UPSTREAM_URL", "ws://127.0.0.1:9/")
    monkeypatch.setenv("TURNWIRE_DATABASE_URL", "postgresql+asyncpg://127.0.0.1:9/none")
    with Nats(authorization={"token": "s3cret"}) as server, Nats(jetstream=False) as without_jobs:
        right, wrong = (server.url.replace("//", f"//{token}@") for token in ("s3cret", "wr0ng"))
        said = doctor(right, f"{s3_server.url}/doctor", **s3_server.environment)
        assert f"✓ broker         127.0.0.1:{server.port} answers; jobs: 0 waiting, 0 taken" in said
        assert "✓ audio store    s3://turnwire/doctor can be written" in said
        said = doctor(wrong, "s3://nobody-made-it")
        assert re.search("✗ broker .* refuses the user, password or token", said)
        assert re.search("✗ audio store .* no such bucket", said)
        said = doctor(without_jobs.url, s3_server.url, AWS_SECRET_ACCESS_KEY="wr0ng")
        assert re.search("✗ broker .* JetStream is not enabled", said)
        assert re.search("✗ audio store .* refuses the credentials", said)
        server.kill()
        said = doctor(server.url, s3_server.url, AWS_ENDPOINT_URL="http://127.0.0.1:9")
        assert re.search("✗ broker .* nobody listens there", said)
        assert re.search("✗ audio store .* does not answer", said)


def test_a_shared_database_is_migrated_by_command_and_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, postgres: Postgres
) -> None:
    monkeypatch.setenv("TURNWIRE_UPSTREAM_URL", "ws://127.0.0.1:9/")
    name = postgres.create()
    url = postgres.url(name)
    said = []

    def doctor(url: str) -> str:
        monkeypatch.setenv("TURNWIRE_DATABASE_URL", url)
        said.append(run("doctor").stdout)
        return next(line for line in said[-1].splitlines() if " database " in line)

    assert "! database" in doctor(url)
    assert "turnwire migrate" in doctor(url)
    assert "run `turnwire migrate`" in problem("keys", "ls", code=1)
    assert run("migrate").exit_code == 0
    assert f"✓ database       {name} on 127.0.0.1:{postgres.port}, schema " in doctor(url)
    key = run("keys", "create", "ci").stdout
    assert key.startswith("tw_")
    assert "\tci\t" in run("keys", "ls").stdout
    assert "does not exist; create it" in doctor(postgres.url("nowhere"))
    postgres.execute("CREATE ROLE late LOGIN VALID UNTIL '2001-01-01'", f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    assert "too many connections" in doctor(url.replace("postgres:canary", "late:canary"))
    assert "is it running" in doctor(url.replace(str(postgres.port), "9"))
    postgres.execute("UPDATE alembic_version SET version_num = '9999'", database=name)
    monkeypatch.setenv("TURNWIRE_DATABASE_URL", url)
    said.append(problem("migrate", code=1))
    assert "9999 was made by a newer Turnwire" in said[-1]
    assert "migrate with that one" in said[-1]
    monkeypatch.setenv("TURNWIRE_DATABASE_URL", url.replace(str(postgres.port), "9"))
    said += [problem("migrate", code=1), problem("keys", "ls", code=1)]
    assert "canary-password" not in "".join(said)
    postgres.drop(name)


@pytest.fixture
def _cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of one that is not there."""
    for name, value in {
        "UPSTREAM_URL": "ws://127.0.0.1:9/", "DATABASE_URL": "postgresql+asyncpg://me:canary@127.0.0.1:9/none",
        "BROKER_URL": "nats://127.0.0.1:9", "AUDIO_URL": "s3://nobody-made-it",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"TURNWIRE_{name}", value)


@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_node_gives_up_a_database_that_does_not_come(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.DATABASE_PATIENCE_SECONDS", 0)
    said = problem(command, code=1)
    assert said.startswith("turnwire: TURNWIRE_DATABASE_URL: the database does not answer")
    assert "canary" not in said


@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize("command", [["worker"], ["migrate"], ["keys", "ls"]], ids=" ".join)
def test_a_package_that_only_a_cluster_needs_is_named(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    assert "asyncpg is not installed" in problem(*command, code=1)


def test_a_start_on_a_database_of_a_newer_release_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run("migrate").exit_code == 0
    with closing(sqlite3.connect(tmp_path / "data" / "turnwire.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    monkeypatch.setenv("TURNWIRE_UPSTREAM_URL", "ws://127.0.0.1:9/")
    for command in ("serve", "migrate"):
        assert "9999 was made by a newer Turnwire" in problem(command, code=1)


# --- small things ----------------------------------------------------------------------------------------------------


def test_what_is_printed_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Jb\r\x07\x9bc\td\n") == "a[2Jbc\td\n"


def test_figures() -> None:
    assert [clock(ms) for ms in (0, 7_400, 61_000, 3_723_000)] == ["0:00", "0:07", "1:01", "1:02:03"]
    assert [size(n) for n in (999, 35_096, 345_200_000, 2_000_000_000)] == ["999 B", "35.1 kB", "345.2 MB", "2.0 GB"]


def test_the_format_is_what_is_asked_for_else_the_suffix() -> None:
    assert _format(None, None) == _format(None, Path("talk.md")) == _format("TXT", Path("talk.srt")) == "txt"
    assert _format(None, Path("talk.SRT")) == "srt"


def test_addresses_and_keys(tmp_path: Path) -> None:
    assert service_url("https://example.com/turnwire/") == "https://example.com/turnwire"
    for wrong in ("ftp://h", "http://", "http://h?x=1", "http://u@h", "http://h:0", "http://[::1"):
        with pytest.raises(CommandError) as caught:
            service_url(wrong)
        assert caught.value.code == 2
    (tmp_path / "key").write_text("secret-key\n")
    assert key_of(f"@{tmp_path / 'key'}") == "secret-key"
    assert (key_of("plain"), key_of(None)) == ("plain", None)


def test_waiting_grows_to_a_bound_and_is_spread() -> None:
    waits = list(islice(backoff(), 200))
    assert all(0.1 <= wait <= 10.1 for wait in waits)
    assert waits[0] <= 0.6
    assert max(waits) > 8
    assert len(set(waits)) == len(waits)


def test_an_answer_of_something_else_is_said_to_be_one() -> None:
    assert "is this the address of a Turnwire service?" in str(RefusedError(404, {}, 0))


class Turnwire(httpx.AsyncBaseTransport):
    """A service of three events that breaks its stream, is away for a moment, and has U+2028 in a transcript."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: list[httpx.Response | Exception] = [
            httpx.Response(200, content=Broken(line(1, "job.status"), line(None, "turn.partial"), b'{"id": 2, "ty')),
            httpx.ConnectError("All connection attempts failed"),
            httpx.Response(503, json={"detail": "Being stopped.", "code": "unavailable"}),
            httpx.Response(200, content=b"\n" + line(2, "turn.final") + line(3, "job.completed")),
        ]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.headers["Last-Event-ID"])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Broken(httpx.AsyncByteStream):
    """A body that is cut."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        raise httpx.ReadError("reset")


def line(number: int | None, kind: str) -> bytes:
    return json.dumps({"id": number, "type": kind, "text": "a\u2028b"}, ensure_ascii=False).encode() + b"\n"


async def test_a_stream_is_resumed_after_its_last_durable_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.client.backoff", lambda: repeat(0.001))
    turnwire, losses = Turnwire(), []
    async with Service("http://127.0.0.1:9") as service:
        service._http = httpx.AsyncClient(base_url="http://test", transport=turnwire)
        events = [event async for event in service.follow("j", lambda reason, wait: losses.append(reason))]
    assert [event["id"] for event in events] == [1, None, 2, 3]
    assert turnwire.asked == ["0", "1", "1", "1"]
    assert losses == ["the connection broke", "no connection", "Being stopped. (unavailable)"]


# --- what is shown of events -----------------------------------------------------------------------------------------

TURN = {"index": 0, "transcript": "One two.", "speaker": None, "channel": None, "session_id": "s1", "latency_ms": 640}
STORY: list[dict[str, Any]] = [
    {"type": "job.status", "status": "queued", "stage": None},
    {"type": "job.status", "status": "processing", "stage": "streaming"},
    {"type": "session.begin", "session_id": "s1", "model": "m", "offset_ms": 0, "channel": None},
    {"type": "job.progress", "sent_ms": 400, "total_ms": 3000},
    {"type": "turn.partial", "turn": {**TURN, "transcript": "one\x1b[2J"}},
    {"type": "turn.final", "turn": TURN},
    {"type": "turn.revised", "turn": TURN},
    {"type": "turn.revised", "turn": {**TURN, "speaker": "B"}},
    {"type": "of.tomorrow"},
    {"type": "session.lost", "session_id": "s1", "code": 3005, "reason": "Session Cancelled", "retry_in_ms": 1500},
    {"type": "session.begin", "session_id": "s2", "model": "m", "offset_ms": 1000, "channel": 1},
    {"type": "job.warning", "code": "converted", "message": "Not sent as it is."},
    {"type": "job.restarted", "from_turn": 0},
    {"type": "stream.reset"},
    {"type": "job.completed", "job": {"id": "j"}},
]


def test_a_pipe_is_told_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    narrator = Narrator(View())
    for event in STORY:
        narrator.tell(event)
    assert capsys.readouterr().err.splitlines() == [
        "Session ID: s1",
        "[Partial] one[2J",
        "[Final] One two.",
        "[Revised] Speaker B: One two.",
        "Upstream session lost (3005 Session Cancelled); trying again in 1.5 s",
        "Session ID: s2 (channel 1) (from 0:01)",
        "Warning: Not sent as it is. (converted)",
        "Restarted; 1 turn withdrawn",
        "The service has lost its place; everything follows from the start",
    ]
    assert narrator.job == {"id": "j"}


def test_a_terminal_shows_what_is_alive_beneath_what_lasts() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=70, markup=False, highlight=False)
    now = 100.0
    view = LiveView(screen, now=lambda: now)
    try:
        narrator = Narrator(view)
        for event in STORY[:5]:
            narrator.tell(event)
        now += 1.0  # the bar runs on between two reports, within bounds
        assert drawn(view) == ["[Partial] one[2J", "streaming 0:01 / 0:03"]
        now += 60.0
        assert drawn(view)[-1] == "streaming 0:01 / 0:03"
        narrator.tell(STORY[5])
        assert drawn(view) == ["streaming 0:01 / 0:03 latency 640 ms"]
        view.lost("no connection", 2.2)
        assert drawn(view)[0] == "Connection to the service lost: no connection; trying again in 3 s"
        narrator.tell(STORY[3])
        view.uploaded(345_000_000, 690_000_000)
        assert drawn(view)[0].startswith("streaming 345.0 MB / 690.0 MB")
    finally:
        view.close()
    assert "[Final]" in screen.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above


def drawn(view: LiveView) -> list[str]:
    """What is alive on the screen, without the bar itself."""
    plain = Console(file=io.StringIO(), width=70, markup=False, highlight=False)
    plain.print(view._draw())
    lines = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [" ".join(line.replace("━", "").replace("╸", "").replace("╺", "").split()) for line in lines]


def test_of_a_long_partial_the_end_is_shown() -> None:
    assert _tail("one two three", 20) == "one two three"
    assert _tail("one two three four", 10) == "…hree four"
    assert _tail("あいうえお", 5) == "…えお"
