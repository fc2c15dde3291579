"""Where the edge is measured: the two servers, started anew for each measurement, and what is sent to them."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.bench import harness
from tests.bench.edge_wire import KEY, Server, running
from tests.wavs import chunk, fmt, riff

GIB = 1 << 30
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


def wav(seconds: float) -> bytes:
    """Silence, 8 kHz."""
    return riff(fmt(rate=8000), chunk(b"data", bytes(int(8000 * seconds) * 2)))


def script(path: Path, every_ms: int, words: int) -> Path:
    """A talk with a final of so many words every so often, and partials between."""
    turns = []
    for n in range(180_000 // every_ms):
        text, start = f"turn{n} " + "word " * words, n * every_ms
        turns.append({"text": text, "start_ms": start, "end_ms": start + every_ms - 10, "double_final": False})
    path.write_text(json.dumps({"turns": turns}))
    return path


class Bench:
    """What every measurement needs."""

    def __init__(self, directory: Path, report: harness.Report, chatty: Server, calm: Server) -> None:
        """Both upstreams are running."""
        self._directory, self.report, self.chatty, self._calm = directory, report, chatty, calm
        self._core = harness.cores()[1]
        self._made = 0

    @asynccontextmanager
    async def service(self, upstream: Server | None = None, **settings: str) -> AsyncIterator[Server]:
        """The service, on an empty data directory. `settings`: TURNWIRE_ variables, small, without prefix."""
        self._made += 1
        environment = {
            "TURNWIRE_DATA_DIR": str(self._directory / f"data-{self._made}"),
            "TURNWIRE_API_KEYS": f"bench:{KEY}",
            "TURNWIRE_UPSTREAM_URL": f"ws://127.0.0.1:{(upstream or self._calm).port}/v3/ws",
            "ASSEMBLYAI_API_KEY": "sandbox",
            "TURNWIRE_PORT": "0",
            **{f"TURNWIRE_{name.upper()}": value for name, value in settings.items()},
        }
        command = harness.python("service", "serve", "--port", "PORT")
        async with running(self._directory, command, environment, self._core) as server:
            yield server

    @asynccontextmanager
    async def stock(self) -> AsyncIterator[Server]:
        """The other one."""
        command = harness.python("tests.bench.edge_stock")
        async with running(self._directory, command, {"TMPDIR": str(self._directory)}, self._core) as server:
            yield server
