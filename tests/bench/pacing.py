"""How well one stream keeps its time, as upstream sees it: `python -m tests.bench.pacing [seconds] [rate] [chunk_ms]`.

Streams silence of that length through the whole service but its HTTP edge at real speed, and prints when the first and the last chunk and Terminate
arrived at the sandbox after Begin, and how late chunks were.
"""

import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

from service.sandbox.recogniser import NumberedWords
from tests.kit import running
from tests.wavs import wav_bytes


async def measure(seconds: float, rate: int, chunk_ms: int) -> None:
    """One stream, and the table."""
    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory), speed=1, recogniser=NumberedWords) as kit:
            job, _ = await kit.run(wav_bytes(rate=rate, frames=int(seconds * rate)), chunk_ms=str(chunk_ms))
            session = kit.sandbox.sessions[0]
    assert session.begin_at is not None
    assert session.terminate_at is not None
    arrivals = [stamp - session.begin_at for stamp, _ in session.arrivals]
    sizes = [size for _, size in session.arrivals]
    due, before = [], 0
    for size in sizes:
        due.append(before / 2 / rate)
        before += size
    late = sorted((arrival - planned) * 1000 for arrival, planned in zip(arrivals, due, strict=True))
    print(
        f"{job.audio.duration_ms} ms of audio at {rate} Hz in {len(arrivals)} chunks of {sizes[0]} bytes: {job.status}"
    )
    print(f"first chunk {arrivals[0] * 1000:.1f} ms after Begin, last {arrivals[-1]:.3f} s, ", end="")
    print(f"Terminate {session.terminate_at - session.begin_at:.3f} s")
    print(
        f"lateness: median {statistics.median(late):.1f} ms, p99 {late[int(len(late) * 0.99)]:.1f}, max {late[-1]:.1f}"
    )
    print(f"earliest {late[0]:.1f} ms (never early: not below zero but for the clock's grain)")


if __name__ == "__main__":
    given = sys.argv[1:] + ["10", "16000", "100"][len(sys.argv) - 1 :]
    asyncio.run(measure(float(given[0]), int(given[1]), int(given[2])))
