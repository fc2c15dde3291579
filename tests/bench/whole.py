"""The whole service as a contender: `turnwire serve`, TLS or plain upstream, stored jobs and one subscriber for each stream.

Its streams are added while the others run, as in life. Where its load guard leaves jobs in the queue, fewer are live than were
asked for, and what is live is what it holds.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from tests.bench.far_end import FarEnd, Figures
from tests.bench.harness import cores, python, start, stop
from tests.raw_upstream import CERTIFICATE
from tests.wavs import wav_bytes

# The service takes more; but what uploads and beginnings cost must not look like lasting load to its guard.
SUBMITS_PER_SECOND, BYTES_PER_SECOND = 12, 30e6
BACKLOG = 20
STANDSTILL = 20.0  # without another stream: once closed, the guard looks at five calm seconds before it opens
SETTINGS = {"TURNWIRE_MAX_STREAMS": "4000", "TURNWIRE_MAX_QUEUE": "4000", "ASSEMBLYAI_API_KEY": "k" * 32}


class Whole:
    """A running service."""

    def __init__(
        self, far: FarEnd, process: subprocess.Popen[str], port: int, listening: subprocess.Popen[str]
    ) -> None:
        """`listening` is a process of `tests.bench.subscribers`."""
        self.pid = process.pid
        self.port = port
        self._far = far
        self._listening = listening
        self._streams = 0

    def grow(self, streams: int, chunk_ms: int, seconds: float) -> int:
        """Submit jobs of so many seconds until there are `streams`; how many of them are live when no more come."""
        wav, due = wav_bytes(frames=int(16_000 * seconds)), time.monotonic()
        while self._streams < streams:
            self.follow(self._submit(wav, chunk_ms))
            self._streams += 1
            behind = self._streams - self._far.ask("stats")["sessions"]
            if behind > BACKLOG:
                wanted = self._streams - BACKLOG // 2
                if (found := self.live(wanted)) < wanted:
                    return found  # what waits shows that it takes no more; more of it would only keep it busy
            due = max(time.monotonic(), due + max(1 / SUBMITS_PER_SECOND, len(wav) / BYTES_PER_SECOND))
            time.sleep(max(0.0, due - time.monotonic()))
        return self.live(streams)

    def live(self, wanted: int, patience: float = STANDSTILL) -> int:
        """Wait for so many streams, or until none has come for so long; how many there are."""
        found, moved = 0, time.monotonic()
        while found < wanted and time.monotonic() < moved + patience:
            time.sleep(0.2)
            before, found = found, int(self._far.ask("stats")["sessions"])
            if found > before:
                moved = time.monotonic()
        return found

    def _submit(self, wav: bytes, chunk_ms: int) -> str:
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", f"/jobs?chunk_ms={chunk_ms}", wav, {"Content-Type": "audio/wav"})
        answer = connection.getresponse()
        job = json.loads(answer.read())
        connection.close()
        assert answer.status == 202, job
        return str(job["id"])

    def follow(self, job_id: str) -> None:
        """Have a subscriber follow that job."""
        assert self._listening.stdin is not None
        self._listening.stdin.write(job_id + "\n")
        self._listening.stdin.flush()

    def heard(self) -> Figures:
        """What the subscribers heard since they were asked last."""
        assert self._listening.stdout is not None
        self.follow("stats")
        found: Figures = json.loads(self._listening.stdout.readline())
        return found


@contextmanager
def whole(far: FarEnd, data: Path | None = None) -> Iterator[Whole]:
    """Serve on the last core, from a data directory that may be there already."""
    with tempfile.TemporaryDirectory(prefix="turnwire-bench-") as temporary:
        settings = SETTINGS | {
            "TURNWIRE_UPSTREAM_URL": far.url, "SSL_CERT_FILE": str(CERTIFICATE),
            "TURNWIRE_DATA_DIR": str(data or Path(temporary) / "data"),
        }  # fmt: skip
        command = ["env", *(f"{name}={value}" for name, value in settings.items()), *python("service", "serve")]
        log = Path(temporary) / "log"  # a pipe that nobody reads would fill, and the service wait for it
        with log.open("w") as writing:
            serving = start([*command, "--port", "0"], cores()[1], stderr=writing)
        listening = None
        try:
            port = _port(serving, log)
            listening = start(python("tests.bench.subscribers", str(port)), cores()[0])
            yield Whole(far, serving, port, listening)
        finally:
            stop(serving)
            if listening is not None:
                stop(listening)


def _port(serving: subprocess.Popen[str], log: Path) -> int:
    while serving.poll() is None:
        for line in log.read_text().splitlines():
            if "serves http://127.0.0.1:" in line:
                return int(line.split("127.0.0.1:")[1].split(",")[0])
        time.sleep(0.05)
    raise RuntimeError(log.read_text())
