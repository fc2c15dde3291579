"""A service that is told to stop, that has no room, or whose log nobody reads: real processes, signals and disks.

Clients that read get everything and a clean end; clients that never read hold up nobody. Whatever was interrupted goes
on at the next start, every word once.
"""

import array
import asyncio
import contextlib
import fcntl
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from service.core.job import Status, make_event
from service.sandbox.faults import FaultPlan, NoTermination
from tests.e2e.process import Follower, Service, check_ended, check_promises, check_silence, kept, serving, upload
from tests.e2e.test_crash import word_count
from tests.kit import spoken
from tests.marked import BLOCKS_PER_WORD, blocks, marked_wav

STOP_SECONDS = 10.0
JOBS, DEAF = 20, 6
MEGABYTE = 1 << 20


def deaf(service: Service, path: str) -> socket.socket:
    """A client that asks and never reads, with room for next to nothing."""
    where = urlsplit(service.url)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.connect((where.hostname, where.port))
    raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {where.netloc}\r\nAccept: text/event-stream\r\n\r\n".encode())
    return raw


async def a_job_with_a_long_log(service: Service) -> str:
    """A finished job whose log has grown by 8 MB since: what nobody reads fills every buffer there is."""
    await service.start()
    job = await upload(service, marked_wav(400))
    await Follower(service, job["id"]).begin().done()
    service.signal(signal.SIGTERM)
    assert await service.ended(STOP_SECONDS) == 0
    with contextlib.closing(sqlite3.connect(service.data / "turnwire.db")) as connection, connection:
        (newest,) = connection.execute("SELECT event_seq FROM jobs").fetchone()
        made = [make_event(job["id"], newest + n, "job.warning", 0, {"code": "x" * 4000}) for n in range(1, 2001)]
        rows = [(event.job_id, event.seq, event.type, event.json) for event in made]
        connection.executemany("INSERT INTO events (job_id, seq, type, doc) VALUES (?, ?, ?, ?)", rows)
        connection.execute("UPDATE jobs SET event_seq = ?", (newest + len(made),))
    return str(job["id"])


async def test_a_process_may_open_as_many_files_as_the_system_lets_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(tmp_path) as (service, _):
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            service.spawn()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert service.process is not None
        async with asyncio.timeout(20):
            while resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE) != (hard, hard):
                await asyncio.sleep(0.05)


async def test_a_stop_with_twenty_jobs_and_clients_that_never_read(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, sandbox), contextlib.AsyncExitStack() as stack:
        long_log = await a_job_with_a_long_log(service)
        await service.start()
        jobs = await asyncio.gather(*(upload(service, marked_wav(8_000)) for _ in range(JOBS)))
        followers = [Follower(service, job["id"]).begin() for job in jobs]
        paths = [f"/jobs/{long_log}/events"] * DEAF + [f"/jobs/{job['id']}/events" for job in jobs[:DEAF]]
        for path in paths:
            stack.callback(deaf(service, path).close)
        for follower in followers:
            await follower.sees("turn.final")
        async with service.client() as client:
            assert (await client.get("/readyz")).status_code == 200
            service.signal(signal.SIGTERM)
            told = time.monotonic()
            while (ready := await client.get("/readyz")).status_code == 200:
                assert time.monotonic() - told < 1
            assert ready.json()["checks"]["draining"]["ok"] is False
        assert await service.ended(STOP_SECONDS) == 0
        print(f"\nstopped after {time.monotonic() - told:.2f} s with {JOBS} jobs and {len(paths)} deaf clients")
        await asyncio.sleep(0.2)
        for follower in followers:
            assert follower.ends == ["clean"], "the end of a chunked body, not of a connection"
            assert follower.retries == [2], "at the start, and when to come back"
        now = kept(service.data)
        check_promises(now, jobs, followers)
        assert [session.ended_by for session in sandbox.sessions] == ["terminated"] * (JOBS + 1)
        whole = [len(blocks(bytes(session.audio))) // BLOCKS_PER_WORD for session in sandbox.sessions[1:]]
        said = [len(spoken(follower.events)) for follower in followers]
        assert sorted(said) == sorted(whole), "what upstream had heard it has said, and that is kept and shown"
        for job in jobs:
            assert now.jobs[job["id"]].status == Status.QUEUED
            assert [session.closed is not None for session in now.jobs[job["id"]].sessions] == [True]
        _forget(service, long_log)
        await service.start()
        for follower in followers:
            await follower.done()
        now = kept(service.data)
        check_promises(now, jobs, followers)
        check_ended(now, followers, word_count)
        assert {job.attempt for job in now.jobs.values()} == {2}
        assert not any(event.type == "session.lost" for log in now.logs.values() for event in log)
        check_silence(service, but="uvicorn.error")  # uvicorn on who never reads


def _forget(service: Service, job_id: str) -> None:
    """Take the stuffed job away."""
    with contextlib.closing(sqlite3.connect(service.data / "turnwire.db")) as connection, connection:
        for table, column in (("jobs", "id"), ("events", "job_id"), ("turns", "job_id")):
            connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (job_id,))
    (service.data / "audio" / job_id).unlink()


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """Upstream says nothing more, so that the first signal has to wait."""
    hang = FaultPlan({"1-3": [NoTermination(then="hang")]})
    async with serving(tmp_path, faults=hang) as (service, _):
        await service.start()
        jobs = [await upload(service, marked_wav(5000)) for _ in range(3)]
        followers = [Follower(service, job["id"]).begin() for job in jobs]
        for follower in followers:
            await follower.sees("turn.final")
        service.signal(signal.SIGTERM)
        await asyncio.sleep(1)
        assert service.running(), "it waits for last words"
        again = time.monotonic()
        service.signal(signal.SIGINT)
        assert await service.ended(5) == -signal.SIGINT
        assert time.monotonic() - again < 2
        check_promises(kept(service.data), jobs, followers)
        await service.start()
        for follower in followers:
            await follower.done()
        now = kept(service.data)
        check_promises(now, jobs, followers)
        check_ended(now, followers, word_count)


async def test_a_stop_that_upstream_does_not_answer_is_in_time_all_the_same(tmp_path: Path) -> None:
    hang = FaultPlan({"1-3": [NoTermination(then="hang")]})
    async with serving(tmp_path, faults=hang) as (service, _):
        await service.start()
        jobs = [await upload(service, marked_wav(5000)) for _ in range(3)]
        followers = [Follower(service, job["id"]).begin() for job in jobs]
        for follower in followers:
            await follower.sees("turn.final")
        service.signal(signal.SIGTERM)
        assert await service.ended(STOP_SECONDS) == 0
        assert {job.status for job in kept(service.data).jobs.values()} == {Status.QUEUED}
        await service.start()
        for follower in followers:
            await follower.done()
        now = kept(service.data)
        check_promises(now, jobs, followers)
        check_ended(now, followers, word_count)


async def test_a_stop_while_the_database_is_away_is_in_time(tmp_path: Path) -> None:
    """What cannot be written down is heard again after the next start."""
    async with serving(tmp_path) as (service, _):
        await service.start()
        jobs = [await upload(service, marked_wav(4000)) for _ in range(3)]
        followers = [Follower(service, job["id"]).begin() for job in jobs]
        for follower in followers:
            await follower.sees("turn.final")
        lock = sqlite3.connect(service.data / "turnwire.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        service.signal(signal.SIGTERM)
        began = time.monotonic()
        assert await service.ended(STOP_SECONDS + 5) == 0
        print(f"\nstopped after {time.monotonic() - began:.2f} s without a database")
        lock.execute("ROLLBACK")
        lock.close()
        check_promises(kept(service.data), jobs, followers)
        await service.start()
        for follower in followers:
            await follower.done()
        now = kept(service.data)
        check_promises(now, jobs, followers)
        check_ended(now, followers, word_count)


# --- no room ---------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A disk of 24 MiB that can be filled to the last byte, and emptied."""

    def __init__(self, at: Path) -> None:
        self.data = at / "data"
        self._ballast = at / "ballast"

    def fill(self, _: Service) -> None:
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self, _: Service) -> None:
        self._ballast.unlink()


class SmallFiles:
    """Where no disk may be mounted: no file of the process may grow beyond 2 MiB (`prlimit`)."""

    def __init__(self, at: Path) -> None:
        self.data = at / "data"

    def fill(self, service: Service) -> None:
        self._limit(service, 2 * MEGABYTE)

    def free(self, service: Service) -> None:
        self._limit(service, resource.RLIM_INFINITY)

    def _limit(self, service: Service, size: int) -> None:
        assert service.process is not None
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture(params=["disk", "file"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk | SmallFiles]:
    mounted = False
    if request.param == "disk":
        command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path)]
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield SmallDisk(tmp_path) if mounted else SmallFiles(tmp_path)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def test_without_room_uploads_are_refused_and_jobs_go_on(
    small: SmallDisk | SmallFiles, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("stderr")
    async with serving(elsewhere, data=small.data) as (service, sandbox):
        service.errors, service.arm = elsewhere / "stderr", elsewhere / "arm"
        await service.start()
        job = await upload(service, marked_wav(6000))
        follower = Follower(service, job["id"]).begin()
        await follower.sees("turn.final")
        small.fill(service)
        async with service.client() as client:
            for wav in (marked_wav(120_000), marked_wav(90_000)):  # 3.8 and 2.9 MB
                refused = await client.post("/jobs", content=wav, headers={"Content-Type": "audio/wav"})
                assert refused.status_code == 507, refused.text
                assert refused.headers["content-type"] == "application/problem+json"
                assert refused.json()["code"] == "storage_full"
            assert [path.name for path in (service.data / "audio").iterdir()] == [job["id"]], "nothing is left behind"
            assert (await client.get("/healthz")).status_code == 200
            assert len((await client.get("/jobs")).json()["data"]) == 1
            if isinstance(small, SmallDisk):
                ready = await client.get("/readyz")
                assert ready.status_code == 503
                assert ready.json()["checks"]["audio"]["ok"] is False
            await asyncio.sleep(1.5)
            small.free(service)
            assert (await client.get("/readyz")).status_code == 200
        second = await upload(service, marked_wav(1600))
        followers = [follower, Follower(service, second["id"]).begin()]
        for waiting in followers:
            await waiting.done()
        now = kept(service.data)
        check_promises(now, [job, second], followers)
        check_ended(now, followers, word_count)
        assert len(sandbox.sessions) == 2, "no session was lost for it"
        check_silence(service)


# --- a log nobody reads ----------------------------------------------------------------------------------------------


def unread(service: Service) -> int:
    """Bytes in the pipe."""
    found = array.array("i", [0])
    fcntl.ioctl(service.stderr, termios.FIONREAD, found)
    return found[0]


async def test_a_log_that_nobody_reads_blocks_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _):
        await service.start(pipe=True)
        async with service.client() as client:
            for _ in range(60):
                assert (await client.get(f"/jobs/{'x' * 200}")).status_code == 404
            before = unread(service)
            assert before > 3000, "the pipe is full"
            jobs = [await upload(service, marked_wav(2400)) for _ in range(4)]
            followers = [Follower(service, job["id"]).begin() for job in jobs]
            for _ in range(5200):
                assert (await client.get("/healthz")).status_code == 200
            for follower in followers:
                await follower.done()
            assert unread(service) == before
            dropped = re.search(
                r"^turnwire_log_lines_dropped_total (\S+)", (await client.get("/metrics")).text, re.MULTILINE
            )
            assert dropped is not None
            assert float(dropped[1]) > 0, "what nobody reads is counted"
        service.signal(signal.SIGTERM)
        assert await service.ended(STOP_SECONDS) == 0
        now = kept(service.data)
        check_promises(now, jobs, followers)
        check_ended(now, followers, word_count)
