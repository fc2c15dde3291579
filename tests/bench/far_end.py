"""The far end of the benchmarks (`far_end.c`), and what it says of the streams that lead to it.

Building it takes a C compiler and OpenSSL's headers (`apt-get install gcc libssl-dev`).
"""

import json
import subprocess
import time
from pathlib import Path

from tests.bench.harness import core_seconds, cores, cpu_seconds, rss_bytes, start
from tests.raw_upstream import CERTIFICATE

Figures = dict[str, float]

RATE = 0.97  # of the audio that was due must have come, or the contender is overloaded however punctual it looks
LIMITS_MS = (20, 50)


class FarEnd:
    """The far end, and its histogram."""

    def __init__(self, directory: Path, *, tls: bool, per_second: int = 5) -> None:
        """Build it, and start it on the first core; `per_second` are the turns of each session."""
        program = directory / f"far_end_{per_second}"
        if not program.exists():
            source, define = Path(__file__).with_name("far_end.c"), f"-DPER_SECOND={per_second}"
            subprocess.run(["cc", "-O2", define, "-o", program, source, "-lssl", "-lcrypto"], check=True)
        self.process = start([str(program), *([str(CERTIFICATE)] if tls else [])], cores()[0])
        assert self.process.stdout is not None
        self.url = f"{'wss' if tls else 'ws'}://127.0.0.1:{int(self.process.stdout.readline())}/"

    def ask(self, command: str) -> Figures:
        """`stats`, or `reset <chunk ms>`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        found: Figures = json.loads(self.process.stdout.readline())
        return found


def window(far: FarEnd, pid: int, streams: int, chunk_ms: int, seconds: float) -> Figures:
    """What the `streams` streams of a process cost and how late their chunks are.

    It begins when a second has been in time, `seconds` later at the latest: what connecting left behind is sent in a
    hurry, and that is not what is asked about. CPU ms a stream-second, lateness in ms, memory in KB; of a core: what the process
    took (`busy`), what anything else took of the same core (`others`), the far end, and all that runs beside it (`driver`).
    """
    give_up = time.monotonic() + seconds
    while True:
        found, took = _look(far, chunk_ms, min(seconds, 1.0))
        if holds({"rate": found["chunks"] * chunk_ms / 1000 / took / max(1, streams), **found}, LIMITS_MS[0]):
            break
        if time.monotonic() > give_up:
            break
    driving, measured = cores()
    before = [cpu_seconds(pid), cpu_seconds(far.process.pid), core_seconds(measured), core_seconds(driving)]
    found, took = _look(far, chunk_ms, seconds)
    after = [cpu_seconds(pid), cpu_seconds(far.process.pid), core_seconds(measured), core_seconds(driving)]
    used, far_used, core_used, driver_used = (now - then for now, then in zip(after, before, strict=True))
    audio = found["chunks"] * chunk_ms / 1000
    return {
        "cpu": used / audio * 1000 if audio else float("nan"), "busy": used / took, "p50": found["p50"],
        "p99": found["p99"], "max": found["max"], "rate": audio / took / max(1, streams), "far": far_used / took,
        "rss": rss_bytes(pid) / 1024, "live": found["sessions"], "others": max(0.0, core_used - used) / took,
        "driver": driver_used / took,
    }  # fmt: skip


def _look(far: FarEnd, chunk_ms: int, seconds: float) -> tuple[Figures, float]:
    far.ask(f"reset {chunk_ms}")
    began = time.monotonic()
    time.sleep(seconds)
    return far.ask("stats"), time.monotonic() - began


def holds(figures: Figures, limit_ms: float) -> bool:
    """Whether the streams of a window were held."""
    return figures["p99"] < limit_ms and figures["rate"] > RATE
