"""The command line as users have it: real processes, sockets, signals and a terminal, in real time.

The upstream is a sandbox of the test that hears marked audio, word by word, so a turn that is lost or doubled shows.
"""

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import socket
import sys
import wave
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.sandbox.app import Sandbox, run_sandbox
from service.sandbox.faults import FaultPlan, Mute
from service.sandbox.recogniser import NumberedWords
from tests.marked import MarkedWords, marked_wav, words

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "tests" / "samples" / "cards_001.wav"
CONTROLS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
KEY = "a-key-of-the-tests"


def environment(**variables: str) -> dict[str, str]:
    """Nothing of the machine's own settings."""
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TMPDIR": variables.pop("TMPDIR", "/tmp"), **variables}


class Run:
    """A running command; what it says can be waited for."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.err = b""
        self._out = asyncio.create_task(self._read_out())
        self._reading = asyncio.create_task(self._read_err())
        self._more = asyncio.Condition()

    async def _read_out(self) -> bytes:
        return await self.process.stdout.read() if self.process.stdout is not None else b""

    async def _read_err(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            async with self._more:
                self.err += line
                self._more.notify_all()

    async def says(self, text: str) -> str:
        """Wait until stderr has this; all of it so far."""
        async with asyncio.timeout(60), self._more:
            await self._more.wait_for(lambda: text.encode() in self.err or self._reading.done())
        assert text in self.err.decode(), self.err.decode()
        return self.err.decode()

    async def ends(self, code: int) -> tuple[str, str]:
        """Its exit code; what was on stdout and stderr."""
        async with asyncio.timeout(60):
            found = await self.process.wait()
            await self._reading
            out = await self._out
        assert found == code, (found, self.err.decode())
        return out.decode(), self.err.decode()


@asynccontextmanager
async def turnwire(*arguments: str | Path, cwd: Path, **variables: str) -> AsyncIterator[Run]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service", *arguments, stdout=PIPE, stderr=PIPE, cwd=cwd, env=environment(**variables)
    )  # fmt: skip
    try:
        yield Run(process)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@pytest.fixture
async def upstream() -> AsyncIterator[Sandbox]:
    async with run_sandbox(recogniser=MarkedWords) as sandbox:
        yield sandbox


def marked(tmp_path: Path, seconds: float) -> Path:
    path = tmp_path / "talk.wav"
    path.write_bytes(marked_wav(int(seconds * 1000)))
    return path


def transcribing(
    file: Path, cwd: Path, upstream: Sandbox, *options: str, **variables: str
) -> AbstractAsyncContextManager[Run]:
    """Without a service."""
    variables |= {"TURNWIRE_UPSTREAM_URL": upstream.url, "ASSEMBLYAI_API_KEY": KEY}
    return turnwire("transcribe", file, *options, cwd=cwd, **variables)


def names(directory: Path) -> list[str]:
    """What is in it."""
    return sorted(path.name for path in directory.iterdir())


def said(text: str) -> list[str]:
    """The words of the finals in what was printed, in order."""
    finals = re.findall(r"^\[(?:Final|Turn #\d+)\]:? (.*)$", text, re.MULTILINE)
    return " ".join(finals).lower().replace(".", "").split()


# --- transcribe ------------------------------------------------------------------------------------------------------


async def test_without_a_service_everything_runs_in_the_process(tmp_path: Path) -> None:
    async with (
        run_sandbox(recogniser=NumberedWords) as sandbox,
        transcribing(CARDS, tmp_path, sandbox, TMPDIR=str(tmp_path)) as run,
    ):
        out, err = await run.ends(0)
    session = sandbox.sessions[0].session_id
    assert out == (
        f"AssemblyAI Session ID: {session}\nAudio file: cards_001.wav\nAudio duration: 1.09 seconds\n"
        "Model: sandbox (a local endpoint, not AssemblyAI)\n\nTranscription Output\n[Turn #1]: One two.\n"
    )
    lines = err.splitlines()
    assert lines[0] == f"Session ID: {session}"
    assert lines[-2:] == ["[Final] One two.", "Session terminated: 1 seconds of audio processed"]
    assert any(line.startswith("[Partial] ") for line in lines)
    assert not CONTROLS.search(run.err)
    assert names(tmp_path) == [], "the temporary data directory is gone"


async def test_without_a_key_the_sandbox_transcribes_and_it_is_said(tmp_path: Path) -> None:
    pytest.importorskip("moonshine_voice")
    async with turnwire("transcribe", CARDS, "--output", "cards.vtt", "--keep", "kept", cwd=tmp_path) as run:
        out, err = await run.ends(0)
    assert out == ""
    assert err.startswith("ASSEMBLYAI_API_KEY is not set: the local sandbox transcribes, not AssemblyAI\n")
    assert "Transcript saved to cards.vtt\n" in err
    assert (tmp_path / "cards.vtt").read_text().startswith("WEBVTT\n\nNOTE Model: sandbox")
    assert (tmp_path / "kept" / "turnwire.db").exists()


async def test_interrupted_it_cancels_and_hands_over_the_finals(tmp_path: Path, upstream: Sandbox) -> None:
    async with transcribing(marked(tmp_path, 60), tmp_path, upstream, "--format", "srt") as run:
        await run.says("[Final] W0 w1 w2 w3.")
        run.process.send_signal(signal.SIGINT)
        out, err = await run.ends(1)
    assert "Canceled after " in err
    heard = said(err)
    assert heard[:4] == words(4)
    assert heard == words(len(heard)), "the open turn is ended, not dropped"
    assert re.match(r"1\n00:00:00,0", out)
    assert upstream.sessions[0].ended_by == "terminated"


async def test_interrupted_twice_it_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    faults = FaultPlan({"*": [Mute(at_ms=900)]})
    async with (
        run_sandbox(recogniser=MarkedWords, faults=faults) as sandbox,
        transcribing(marked(tmp_path, 60), tmp_path, sandbox, TMPDIR=str(tmp_path)) as run,
    ):
        await run.says("[Final] ")
        run.process.send_signal(signal.SIGINT)
        await run.says("Canceling")
        run.process.send_signal(signal.SIGINT)
        out, err = await run.ends(1)
    assert out == ""
    assert "Canceled" not in err, "it did not wait for the job to end"
    assert names(tmp_path) == ["talk.wav"]


async def test_in_a_terminal_a_bar_runs_beneath_and_a_pipe_beside_it_stays_clean(
    tmp_path: Path, upstream: Sandbox
) -> None:
    """stderr is a terminal, stdout a pipe: `transcribe … > file`."""
    terminal, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service", "transcribe", marked(tmp_path, 2.4), "--format", "srt",
        stdout=PIPE, stderr=slave, cwd=tmp_path,
        env=environment(TERM="xterm", TURNWIRE_UPSTREAM_URL=upstream.url, ASSEMBLYAI_API_KEY=KEY),
    )  # fmt: skip
    os.close(slave)
    shown, out = await asyncio.gather(asyncio.to_thread(read_terminal, terminal), process.communicate())
    assert process.returncode == 0, shown
    assert out[0].startswith(b"1\n00:00:00,0")
    assert not CONTROLS.search(out[0])
    assert re.search(r"0:0\d / 0:02", shown)
    assert "streaming" in shown
    assert "[Partial]" in shown
    assert "latency" in shown
    assert "\x1b[?25l" in shown, "the cursor is hidden while lines are redrawn"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "and shown again"
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown).replace("\r", "\n")
    assert said(plain) == words(12)
    assert plain.rstrip().splitlines()[-1] == "Session terminated: 2 seconds of audio processed"


def read_terminal(descriptor: int) -> str:
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(descriptor, 65536):
            shown += piece
    os.close(descriptor)
    return shown.decode()


# --- against a service -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def serving(tmp_path: Path, upstream: Sandbox, port: int = 0, **variables: str) -> AsyncIterator[tuple[Run, str]]:
    """A running service and its URL."""
    async with turnwire("serve", "--port", str(port), cwd=tmp_path, TURNWIRE_UPSTREAM_URL=upstream.url,
                        ASSEMBLYAI_API_KEY=KEY, **variables) as run:  # fmt: skip
        found = re.search(
            r"Turnwire serves (\S+), data in (\S+), transcribed by (\S+)", await run.says("Turnwire serves")
        )
        assert found is not None
        assert (found[2], found[3]) == (str(tmp_path / "data"), f"127.0.0.1:{upstream.port}")
        yield run, found[1]


async def test_a_killed_server_costs_a_follower_neither_a_turn_nor_a_double(tmp_path: Path, upstream: Sandbox) -> None:
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        first, url = await stack.enter_async_context(serving(tmp_path, upstream, port))
        talk = marked(tmp_path, 6)
        run = await stack.enter_async_context(turnwire("transcribe", talk, "--url", url, cwd=tmp_path))
        await run.says("[Final] W4 w5 w6 w7.")
        first.process.kill()
        await first.process.wait()
        await run.says("Connection to the service lost: ")
        await stack.enter_async_context(serving(tmp_path, upstream, port))
        out, err = await run.ends(0)
    assert said(err) == said(out) == words(30)
    assert len(re.findall("^Session ID: ", err, re.MULTILINE)) == 2
    assert f"Job: {url}/jobs/" in err


async def test_serve_drains_and_exits_with_0(tmp_path: Path, upstream: Sandbox) -> None:
    """The job goes on at the next start; the follower sees nothing but a pause."""
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        first, url = await stack.enter_async_context(serving(tmp_path, upstream, port))
        run = await stack.enter_async_context(turnwire("transcribe", marked(tmp_path, 4), "--url", url, cwd=tmp_path))
        await run.says("[Final] W0 w1 w2 w3.")
        first.process.terminate()
        await first.ends(0)
        second, _ = await stack.enter_async_context(serving(tmp_path, upstream, port))
        out, err = await run.ends(0)
        assert said(err) == said(out) == words(20)
        second.process.send_signal(signal.SIGINT)
        await second.ends(0)


async def test_what_the_service_refuses_is_said_with_the_command_that_mends_it(
    tmp_path: Path, upstream: Sandbox
) -> None:
    with wave.open(str(tmp_path / "two ears.wav"), "wb") as file:
        file.setparams((2, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(64_000))
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(200_000_000)  # refused at its first bytes, not after all of it
    async with serving(tmp_path, upstream) as (_, url):
        for name, code in (("two ears.wav", "unsupported_channels"), ("big.bin", "not_wav")):
            async with turnwire("transcribe", name, "--url", url, cwd=tmp_path) as run:
                out, err = await run.ends(1)
            assert out == ""
            assert err.startswith("turnwire: ")
            assert err.endswith(f"({code})\n")
            assert f"ffmpeg -i {name!r} " in err or f"ffmpeg -i {name} " in err


async def test_jobs_of_a_service_with_keys(tmp_path: Path, upstream: Sandbox) -> None:
    (tmp_path / "key").write_text(KEY)
    async with serving(tmp_path, upstream, TURNWIRE_API_KEYS=f"me:{KEY}") as (_, url):

        async def jobs(*arguments: str, code: int = 0, key: str = f"@{tmp_path / 'key'}") -> tuple[str, str]:
            """In this process: eight interpreters would start for nothing."""
            options = ["--url", url, "--key", key]
            result = await asyncio.to_thread(CliRunner().invoke, app, ["jobs", *arguments, *options])
            assert result.exit_code == code, result.output
            return result.stdout, result.stderr

        _, err = await jobs("ls", key="another-key-of-tests", code=1)
        assert err.endswith("(unauthorized)\n")
        assert await jobs("ls") == ("", "")
        async with turnwire("transcribe", CARDS, "--url", url, "--key", "@key", cwd=tmp_path) as run:
            await run.ends(0)
        out, _ = await jobs("ls", "--status", "completed")
        job_id, status, _, length, turns, name = out.rstrip("\n").split("\t")
        assert (status, length, turns, name) == ("completed", "1095", "1", "cards_001.wav")
        out, _ = await jobs("show", job_id, "--json")
        assert json.loads(out)["coverage"]["complete"] is True
        out, _ = await jobs("show", job_id)
        assert dict(line.split("\t") for line in out.splitlines())["coverage"] == "complete"
        out, err = await jobs("cancel", job_id, "nowhere", code=1)
        assert out == ""
        assert re.findall(r"\((\w+)\)$", err, re.MULTILINE) == ["not_cancelable", "not_found"]
        assert await jobs("rm", job_id) == (f"{job_id}\n", "")
        assert (await jobs("show", job_id, code=1))[1].endswith("(not_found)\n")


async def test_what_is_taken_is_said(tmp_path: Path, upstream: Sandbox) -> None:
    async with serving(tmp_path, upstream) as (_, url):
        port = url.rpartition(":")[2]
        variables = {"TURNWIRE_UPSTREAM_URL": upstream.url, "ASSEMBLYAI_API_KEY": KEY}
        async with turnwire("serve", "--port", "0", cwd=tmp_path, **variables) as run:
            _, err = await run.ends(2)
            assert err.startswith("turnwire: TURNWIRE_DATA_DIR: another Turnwire process uses data; ")
        async with turnwire("serve", "--port", port, cwd=tmp_path, TURNWIRE_DATA_DIR="other", **variables) as run:
            _, err = await run.ends(1)
            assert f"turnwire: cannot listen on 127.0.0.1, port {port}: " in err
        async with turnwire("doctor", cwd=tmp_path, **variables) as run:
            out, _ = await run.ends(0)
            assert "✗" not in out
            assert "✓ lock           held: a service runs on this directory" in out
