"""The contract of a BlobStore: all or nothing, durable on return, whatever happens on the way.

Runs on every kind of `STORES`; another is added by naming it there and building it in the fixture `blobs`. What only
files can do wrong follows below; what only object stores can, in `test_objects`.
"""

import asyncio
import errno
import os
import random
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from service.backends.local import BATCH, LocalBlobs
from service.backends.objects import PART_BYTES
from service.core.errors import AudioMissing, InvalidAudio, StorageFull, Unavailable
from service.ports import BlobStore
from tests.doubles import until
from tests.engines.s3 import S3

STORES = ["local", "s3"]
DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture(params=STORES)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """An empty store of each kind."""
    if request.param == "local":
        return LocalBlobs(tmp_path / "audio")
    server: S3 = request.getfixturevalue("s3_server")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    return server.store(monkeypatch)


async def pieces(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


async def broken(chunks: Iterable[bytes], exc: BaseException) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    raise exc


async def missing(blobs: BlobStore, key: str) -> bool:
    try:
        await blobs.read(key, 0, 1)
    except AudioMissing:
        return True
    return False


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [1, 0, 2], [65_536] * 40, [BATCH], [BATCH - 1, 1, 1], [3 * BATCH + 7], [PART_BYTES], [BATCH] * 8],
    ids=str,
)
async def test_what_was_put_is_read_back(blobs: BlobStore, sizes: list[int]) -> None:
    chunks = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]
    whole = b"".join(chunks)
    assert await blobs.put("k", pieces(chunks)) == len(whole)
    assert await blobs.read("k", 0, len(whole) + 1) == whole
    assert await blobs.read("k", len(whole), 10) == b""
    assert await blobs.read("k", len(whole) + 10, 10) == b""
    assert await blobs.read("k", 5, 100) == whole[5:105]
    assert await blobs.read("k", 0, 0) == b""


async def test_blobs_do_not_touch_each_other(blobs: BlobStore) -> None:
    await asyncio.gather(*[blobs.put(f"k{n}", pieces([bytes([n]) * 1000] * 3)) for n in range(20)])
    await blobs.delete("k3")
    for n in range(20):
        assert await missing(blobs, f"k{n}") if n == 3 else await blobs.read(f"k{n}", 0, 5000) == bytes([n]) * 3000


async def test_a_missing_blob_says_so_and_deletes_well(blobs: BlobStore) -> None:
    with pytest.raises(AudioMissing):
        await blobs.read("nothing", 0, 1)
    await blobs.delete("nothing")


@pytest.mark.parametrize("before", [[], [b"abc"], [b"x" * (2 * BATCH)] * 5], ids=["at once", "soon", "late"])
@pytest.mark.parametrize(
    "exc", [InvalidAudio("not_wav", "no"), RuntimeError("bug"), asyncio.CancelledError()], ids=repr
)
async def test_an_upload_that_fails_passes_its_error_and_leaves_nothing(
    blobs: BlobStore, before: list[bytes], exc: BaseException
) -> None:
    with pytest.raises(type(exc)) as caught:
        await blobs.put("k", broken(before, exc))
    assert caught.value is exc
    assert await missing(blobs, "k")
    assert await blobs.sweep() == 0
    assert await blobs.put("k", pieces([b"again"])) == 5


async def test_nobody_sees_a_blob_before_it_is_whole(blobs: BlobStore) -> None:
    more = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"x" * (7 * BATCH)
        await more.wait()

    putting = asyncio.create_task(blobs.put("k", slow()))
    for _ in range(20):
        assert await missing(blobs, "k")
    more.set()
    await putting
    assert not await missing(blobs, "k")


async def test_a_healthy_store_says_something_about_itself(blobs: BlobStore) -> None:
    assert await blobs.check()


async def test_the_keys_are_those_of_whole_blobs(blobs: BlobStore) -> None:
    assert await blobs.keys() == []
    for n in range(3):
        await blobs.put(f"k{n}", pieces([b"x"]))
    await blobs.delete("k1")
    assert sorted(await blobs.keys()) == ["k0", "k2"]
    with pytest.raises(RuntimeError):
        await blobs.put("k3", broken([b"x" * 2 * BATCH], RuntimeError()))
    assert sorted(await blobs.keys()) == ["k0", "k2"]


# --- files -----------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """As `shutil.disk_usage` tells it."""

    total: int
    used: int
    free: int


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data" / "audio"


@pytest.fixture
def files(directory: Path) -> LocalBlobs:
    return LocalBlobs(directory)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def swap(directory: Path, *, there: bool) -> None:
    """Take the store's directory away, or put it back with a directory where a blob should be."""
    if there:
        (directory / "k").mkdir(parents=True)
    else:
        directory.rmdir()


async def test_only_the_owner_may_read(files: LocalBlobs, directory: Path) -> None:
    more = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"secret" * BATCH
        await more.wait()

    putting = asyncio.create_task(files.put("k", slow()))
    await until(lambda: names(directory) == ["k.part"])
    assert mode(directory / "k.part") == 0o600, "while it is written, too"
    more.set()
    await putting
    assert mode(directory / "k") == 0o600
    assert mode(directory) == 0o700


async def test_more_pieces_than_the_kernel_takes_at_once(files: LocalBlobs, directory: Path) -> None:
    chunks = [os.urandom(n % 7) for n in range(5000)]
    assert await files.put("k", pieces(chunks)) == len(b"".join(chunks))
    assert (directory / "k").read_bytes() == b"".join(chunks)


async def test_a_large_file_goes_to_the_disk_as_it_comes(files: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    fdatasync = os.fdatasync

    def seen(descriptor: int) -> None:
        forced.append(os.fstat(descriptor).st_size)
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", seen)
    monkeypatch.setattr("service.backends.local.SYNC_BATCHES", 2)
    await files.put("k", pieces([bytes(BATCH)] * 5))
    assert forced == [2 * BATCH, 4 * BATCH]


async def test_bytes_then_name_are_forced_to_the_disk(
    files: LocalBlobs, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, str, int]] = []
    fsync, rename = os.fsync, Path.rename

    def seen_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        happened.append(("fsync", path.name, path.stat().st_size if path.is_file() else 0))
        fsync(descriptor)

    def seen_rename(path: Path, target: Path) -> Path:
        happened.append(("rename", target.name, 0))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "rename", seen_rename)
    await files.put("k", pieces([b"abc"] * 5))
    assert happened == [("fsync", "k.part", 15), ("rename", "k", 0), ("fsync", "audio", 0)]


async def test_the_sweep_takes_what_a_crash_left_and_nothing_else(files: LocalBlobs, directory: Path) -> None:
    await files.put("kept", pieces([b"x"]))
    for n in range(3):
        (directory / f"dead{n}.part").write_bytes(b"half")
    assert await files.sweep() == 3
    assert await files.sweep() == 0
    assert names(directory) == ["kept"]


async def test_a_put_that_is_cancelled_waits_for_its_thread_and_then_leaves_nothing(
    files: LocalBlobs, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor closed under a thread that still writes would let it write into whatever file has its number next."""
    at_work, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        at_work.set()
        assert go_on.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    putting = asyncio.create_task(files.put("k", pieces([b"x" * 100])))
    await until(at_work.is_set)
    for _ in range(3):
        putting.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not putting.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert names(directory) == []


async def test_a_put_cancelled_at_any_moment_leaves_nothing(files: LocalBlobs, directory: Path) -> None:
    open_before = len(names(DESCRIPTORS))
    ended = set()
    for n in range(120):
        putting = asyncio.create_task(files.put(f"k{n}", pieces([b"x" * (BATCH // 2)] * 5)))
        for _ in range(n * 4):
            await asyncio.sleep(0)
        putting.cancel()
        await asyncio.wait([putting])
        ended.add(putting.cancelled())
        assert names(directory) == ([] if putting.cancelled() else [f"k{n}"])
        await files.delete(f"k{n}")
    assert True in ended
    assert len(names(DESCRIPTORS)) == open_before


async def test_errors_of_the_disk_are_ours(files: LocalBlobs, directory: Path) -> None:
    swap(directory, there=False)
    with pytest.raises(Unavailable):
        await files.put("k", pieces([b"x"]))
    with pytest.raises(Unavailable):
        await files.check()
    with pytest.raises(AudioMissing):
        await files.read("k", 0, 1)
    swap(directory, there=True)
    for act in (files.read("k", 0, 1), files.delete("k"), files.put("k", pieces([b"x"]))):
        with pytest.raises(Unavailable, match="audio store failed"):
            await act
    assert names(directory) == ["k"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["open", "fsync"])
async def test_a_full_disk_is_told_wherever_it_shows(
    files: LocalBlobs, directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def full(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageFull):
        await files.put("k", pieces([b"x"]))
    monkeypatch.undo()
    assert names(directory) == []


@pytest.mark.parametrize(
    ("free", "total", "fine"),
    [(1 << 30, 1 << 40, True), ((1 << 30) - 1, 1 << 40, False), (6, 100, True), (4, 100, False)],
)
async def test_a_nearly_full_disk_fails_the_check(
    files: LocalBlobs, monkeypatch: pytest.MonkeyPatch, free: int, total: int, fine: bool
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(total, total - free, free))
    if fine:
        await files.check()
    else:
        with pytest.raises(StorageFull, match="free"):
            await files.check()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", mountpoint], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no right to mount a file system")
    yield mountpoint
    subprocess.run(["umount", mountpoint], check=True)


async def test_a_disk_that_fills_up_refuses_what_does_not_fit_and_recovers(small_disk: Path) -> None:
    files = LocalBlobs(small_disk / "audio")
    await files.put("fits", pieces([b"x" * BATCH]))
    with pytest.raises(StorageFull):
        await files.put("big", pieces([b"x" * (BATCH // 2)] * 10))
    assert names(small_disk / "audio") == ["fits"]
    await files.put("fits too", pieces([b"x" * BATCH]))
    assert len(await files.read("fits", 0, 2 * BATCH)) == BATCH


def test_a_limit_on_file_sizes_is_a_full_disk(directory: Path) -> None:
    """Where nobody may mount a file system, the kernel's other way to refuse a write."""
    script = f"""
        import asyncio, resource
        from pathlib import Path
        from service.backends.local import LocalBlobs
        from service.core.errors import StorageFull

        async def chunks():
            for _ in range(20):
                yield b"x" * 100_000

        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
        try:
            asyncio.run(LocalBlobs(Path({str(directory)!r})).put("k", chunks()))
        except StorageFull:
            print("full")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "full\n"
    assert names(directory) == []
