"""The server is killed and started again while somebody reads: the page goes on without a lost or doubled turn."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.async_api import Browser

from service.sandbox.app import run_sandbox
from tests.e2e.page.stand import Screen, screen
from tests.kit import KEY
from tests.marked import MarkedWords, marked_wav, words

pytestmark = pytest.mark.asyncio(loop_scope="package")


@dataclass
class Server:
    """`turnwire serve` in a process of its own, always on the same port and data."""

    port: int
    environment: dict[str, str]
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "service", "serve", "--port", str(self.port)]
        self.process = await asyncio.create_subprocess_exec(*command, env=self.environment)
        async with asyncio.timeout(20), httpx.AsyncClient() as client:
            while True:
                try:
                    await client.get(f"{self.url}/healthz")
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server whose upstream is a sandbox in this process, which survives it."""
    async with run_sandbox(recogniser=MarkedWords) as sandbox:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TURNWIRE_")},  # noqa: TID251 - for a child
            "TURNWIRE_DATA_DIR": str(tmp_path / "data"),
            "TURNWIRE_UPSTREAM_URL": sandbox.url,
            "TURNWIRE_LOG_LEVEL": "error",
            "ASSEMBLYAI_API_KEY": KEY,
        }
        running = Server(port, environment)
        await running.start()
        try:
            yield running
        finally:
            await running.kill()


async def _killed_once(tab: Screen, running: Server, seen: int) -> None:
    """Let some turns come, kill, look, start again."""
    await tab.until(f"document.querySelectorAll('#log .turn').length > {seen + 2}")
    await running.kill()
    await tab.sees("#sentence", "Server unreachable. The text is safe.")
    await tab.sees("#aside", "Trying again in")
    kept = await tab.turns()
    assert len(kept) > seen, "nothing is cleared"
    await running.start()
    await tab.sees("#sentence", "Live")
    assert (await tab.turns())[: len(kept)] == kept


async def _whole(tab: Screen, running: Server, job_id: str, count: int) -> None:
    """What is shown is what is kept, every word of the file once."""
    await tab.done(60)
    async with httpx.AsyncClient(base_url=running.url) as client:
        kept = (await client.get(f"/jobs/{job_id}/turns?limit=1000")).json()["data"]
    assert await tab.turns() == [turn["transcript"] for turn in kept]
    assert await tab.words() == words(count)


async def test_a_killed_server_costs_the_reader_nothing(browser: Browser, tmp_path: Path) -> None:
    async with server(tmp_path) as running, screen(browser, running.url) as tab:
        job_id = await tab.send(marked_wav(8_000))
        await _killed_once(tab, running, 0)
        await _whole(tab, running, job_id, 40)


@pytest.mark.soak
async def test_six_kills_cost_the_reader_nothing(browser: Browser, tmp_path: Path) -> None:
    async with server(tmp_path) as running, screen(browser, running.url) as tab:
        job_id = await tab.send(marked_wav(40_000))
        for _ in range(6):
            await _killed_once(tab, running, len(await tab.turns()))
        await _whole(tab, running, job_id, 200)
