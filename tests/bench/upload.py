"""What an upload costs, and what it does to running streams: `python -m tests.bench.upload [--full] [--out DIR]`.

    a C compiler and OpenSSL's headers (apt-get install gcc libssl-dev); three times 2 GB of disk where temporary files are

`ours` is `turnwire serve`, whole: `POST /jobs` as multipart, with the WAV checked, its SHA-256 taken, stored durably and a job
made of it. Beside it the same uvicorn with FastAPI's `UploadFile`, twice: doing the same job, that is copied to where it is kept, hashed,
synced and named; and `bare`, copied only, which keeps less than was promised; what the hash alone costs is said too. The form's boundary
is as long as curl's: a short one takes longer to look for. Each is a process on the last core, the client runs on the first. CPU is of
the whole server, all its threads; written is what the kernel counts of it, growth that of its peak memory.
"""

import asyncio
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

import uvicorn
from fastapi import FastAPI, File, UploadFile

from tests.bench.delivery import jobs, lateness, p99_ms, service
from tests.bench.harness import (
    Cell,
    Report,
    arguments,
    cores,
    cpu_seconds,
    interleaved,
    python,
    rss_bytes,
    start,
    stop,
    written_bytes,
)
from tests.bench.streams import FarEnd
from tests.wavs import wav_bytes

MB = 1_000_000
SIZES = (10, 500, 2000)
RATE = 48_000
OURS, STOCK, BARE = "ours", "UploadFile", "UploadFile, bare"
BOUNDARY = "-" * 24 + "kEcO1ZbLqNt0u8RPxWg5Dy"
HEAD = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
)
TAIL = f"\r\n--{BOUNDARY}--\r\n"
Figures = dict[str, float]


def stock(directory: Path, *, bare: bool) -> None:
    """Serve `UploadFile`; prints the port."""
    app = FastAPI()

    @app.post("/jobs", status_code=202)
    async def accept(file: Annotated[UploadFile, File()]) -> dict[str, str]:
        digest = hashlib.sha256()
        with (directory / "part").open("wb") as out:
            while piece := await file.read(1 << 20):
                out.write(piece)
                if not bare:
                    digest.update(piece)
            if not bare:
                out.flush()
                await asyncio.to_thread(os.fsync, out.fileno())
        (directory / "part").rename(directory / "upload")
        return {"sha256": digest.hexdigest()}

    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning")).run([listening])


@contextmanager
def serving(name: str, far: FarEnd) -> Iterator[tuple[int, int]]:
    """A contender: process id and port."""
    if name == OURS:
        limits = {"TURNWIRE_MAX_UPLOAD_BYTES": "4GiB", "TURNWIRE_MAX_AUDIO_HOURS": "100"}
        with service(far, **limits) as (process, port):
            yield process.pid, port
        return
    with tempfile.TemporaryDirectory(prefix="turnwire-bench-") as directory:
        process = start([*python("tests.bench.upload", "--serve"), directory, *["--bare"] * (name == BARE)], cores()[1])
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline())
        finally:
            stop(process)


def wav(directory: Path, megabytes: float) -> Path:
    """A 48 kHz WAV file of that size, of bytes that nothing can compress."""
    path = directory / f"{megabytes:g}.wav"
    if not path.exists():
        size, block = int(megabytes * MB) // 2 * 2, os.urandom(1 << 20)
        head = wav_bytes(rate=RATE, frames=0)
        head = head[:4] + (36 + size).to_bytes(4, "little") + head[8:40] + size.to_bytes(4, "little")
        with path.open("wb") as file:
            file.write(head)
            for left in range(size, 0, -len(block)):
                file.write(block[:left])
    return path


def send(port: int, path: Path) -> float:
    """Upload the file as a form; the seconds until it was accepted."""
    size, began = path.stat().st_size, time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection, path.open("rb") as file:
        length = len(HEAD) + size + len(TAIL)
        connection.sendall(
            f"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n"
            f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nConnection: close\r\n\r\n{HEAD}".encode()
        )
        connection.sendfile(file)
        connection.sendall(TAIL.encode())
        answer = b""
        while data := connection.recv(65536):
            answer += data
    if b" 202 " not in answer[:20]:
        raise RuntimeError(answer.decode(errors="replace"))
    return time.monotonic() - began


class Peak:
    """The highest resident memory of a process while this is entered."""

    def __init__(self, pid: int) -> None:
        """Looks every 20 ms."""
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.bytes = 0

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, rss_bytes(self._pid))

    def __exit__(self, *exc: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()


def measure(name: str, far: FarEnd, path: Path) -> Figures:
    """One upload, after a small one that has loaded what is loaded late."""
    size = path.stat().st_size
    with serving(name, far) as (pid, port):
        send(port, wav(path.parent, 0.1))
        time.sleep(0.5)
        quiet, used, written = rss_bytes(pid), cpu_seconds(pid), written_bytes(pid)
        with Peak(pid) as peak:
            took = send(port, path)
        return {
            "cpu": (cpu_seconds(pid) - used) / size * MB * 1000, "rate": size / took / MB,
            "written": (written_bytes(pid) - written) / size, "growth": max(0, peak.bytes - quiet) / MB,
        }  # fmt: skip


def hashing() -> float:
    """CPU milliseconds that SHA-256 of a megabyte takes, in pieces as they are received."""
    piece, began = os.urandom(65_536), time.process_time()
    digest = hashlib.sha256()
    for _ in range(400):
        digest.update(piece)
    return (time.process_time() - began) / (400 * len(piece)) * MB * 1000


def compare(report: Report, far: FarEnd, directory: Path, sizes: tuple[float, ...], rounds: int) -> None:
    """Table and goals."""
    rows: list[list[Cell]] = []
    cpu: dict[str, float] = {}
    hashed = hashing()
    for size in sizes:
        path = wav(directory, size)
        found = interleaved((OURS, STOCK, BARE), rounds, lambda name, path=path: measure(name, far, path))  # type: ignore[misc]
        ours, theirs = found[OURS], found[STOCK]
        rows += [
            [f"{size:g} MB", name, f["cpu"], f["cpu"] / theirs["cpu"], f["rate"], f["written"], f["growth"]]
            for name, f in found.items()
        ]
        rows.append([f"{size:g} MB", "ours without SHA-256", ours["cpu"] - hashed, (ours["cpu"] - hashed) / theirs["cpu"],
                     None, None, None])  # fmt: skip
        cpu |= {f"{name}, {size:g} MB": f["cpu"] for name, f in found.items()}
    columns = ["file", "server", "CPU ms/MB", "x UploadFile", "MB/s", "written x", "memory + MB"]
    report.table(f"uploads (SHA-256 alone: {hashed:.2f} ms/MB)", columns, rows)
    report.goal(f"CPU of UploadFile's for the same job, {sizes[-1]:g} MB", ours["cpu"] / theirs["cpu"], at_most=0.5)
    report.goal(f"CPU of a bare UploadFile's, {sizes[-1]:g} MB", ours["cpu"] / found[BARE]["cpu"], at_most=0.5)
    report.goal(f"bytes written per byte, {sizes[-1]:g} MB", ours["written"], at_most=1.01)
    report.goal(f"memory in MB, {sizes[-1]:g} MB", ours["growth"], at_most=10)
    report.bars("cpu", "CPU of an upload", "ms/MB", cpu)


def pace(report: Report, far: FarEnd, path: Path, streams: int, seconds: float) -> None:
    """What an upload does to running streams."""
    rows: list[list[Cell]] = []
    lates = []
    with serving(OURS, far) as (pid, port):
        jobs(port, far, streams, 40 + 2 * seconds)
        time.sleep(seconds)
        for what in ("nothing", f"{path.stat().st_size // MB} MB"):
            far.ask("reset 100")
            before, began, used = lateness(port), time.monotonic(), cpu_seconds(pid)
            if what == "nothing":
                time.sleep(seconds)
            else:
                send(port, path)
            took = time.monotonic() - began
            told, busy = far.ask("stats"), (cpu_seconds(pid) - used) / took
            lates.append(p99_ms(before, lateness(port)))
            rows.append([what, took, f"{busy:.0%}", lates[-1], told["p99"], told["max"]])
    columns = ["upload", "seconds", "core", "late p99 ms, sent", "arrived", "arrived, worst"]
    report.table(f"pace of {streams} running streams", columns, rows)
    report.goal("p99 lateness ms that the upload adds", lates[1] - lates[0], at_most=10)


def run(
    out: Path, *, sizes: tuple[float, ...] = SIZES, rounds: int = 1, streams: int = 200, seconds: float = 6
) -> Report:
    """The whole comparison; smaller figures try whether it runs."""
    report = Report("upload", ("fastapi", "starlette", "uvicorn", "python-multipart"))
    with tempfile.TemporaryDirectory(prefix="turnwire-bench-") as given:
        directory = Path(given)
        free = shutil.disk_usage(directory).free
        if free < 4 * sizes[-1] * MB:
            raise SystemExit(f"{directory} has only {free // MB} MB free")
        far = FarEnd(directory, tls=False)
        try:
            compare(report, far, directory, sizes, rounds)
            pace(report, far, wav(directory, sizes[-1]), streams, seconds)
        finally:
            stop(far.process)
    report.write(out)
    return report


def main() -> None:
    """Compare, or be the contender."""
    parser = arguments(__doc__, "upload")
    parser.add_argument("--serve", type=Path, help="be `UploadFile`, storing there")
    parser.add_argument("--bare", action="store_true", help="only copy what was uploaded")
    options = parser.parse_args()
    if options.serve:
        stock(options.serve, bare=options.bare)
        return
    os.sched_setaffinity(0, {cores()[0]})
    run(options.out, rounds=3 if options.full else 1)


if __name__ == "__main__":
    main()
