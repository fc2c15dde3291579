"""BlobStore in a directory: one file a job. FLOOR 3.

A blob is written to `<key>.part`, fsynced, renamed, and the directory fsynced: on return it survives a power cut, and
before that nobody can see it. Files are 0600, the directory 0700. All disk work happens in threads, in pieces of at
least `BATCH` bytes, so that the event loop and the streams on it never wait for a disk; only a small read of what the
kernel has in memory is done at once. Uploads have threads of their own, and their bytes are sent to the disk as they
come: what else waits for a thread or for the disk does not wait for a gigabyte.
"""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from service.core.errors import AudioMissing, StorageFull, Unavailable

T = TypeVar("T")

BATCH = 1 << 20
SYNC_BATCHES = 64
WRITERS = 4  # threads
AT_ONCE = 1 << 16  # bytes at most that are copied from the kernel's memory on the event loop
MIN_FREE_BYTES = 1 << 30
MIN_FREE_SHARE = 0.05
_MOST_BUFFERS = os.sysconf("SC_IOV_MAX")
_NO_WAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux


class LocalBlobs:
    """Audio files under one directory."""

    read_seconds = 0.5

    def __init__(self, directory: Path) -> None:
        """Make the directory if it is not there."""
        self._directory = directory
        self._writers = ThreadPoolExecutor(WRITERS, "upload")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Store all or nothing, durable on return."""
        part, path = self._directory / f"{key}.part", self._directory / key
        try:
            await self._in_thread(_create, part)
            size = await self._write(part, chunks)
            await self._in_thread(self._commit, part, path)
        except BaseException as exc:
            with suppress(OSError):
                await self._in_thread(_discard, part, path)
            if isinstance(exc, OSError):
                raise _ours(exc) from exc
            raise
        return size

    async def _write(self, part: Path, chunks: AsyncIterator[bytes]) -> int:
        size, held, batches = 0, 0, 0
        batch: list[bytes] = []
        async for chunk in chunks:
            batch.append(chunk)
            held += len(chunk)
            if held >= BATCH:
                size, batches = size + held, batches + 1
                await self._in_thread(_append, part, batch, batches % SYNC_BATCHES == 0)
                batch, held = [], 0
        await self._in_thread(_append, part, batch, False)
        return size + held

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:  # noqa: ANN401 - handed on
        """Run in a thread, to its end: a caller that is cancelled must not clean up under a thread still at work."""
        running = asyncio.get_running_loop().run_in_executor(self._writers, function, *args)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            raise

    def _commit(self, part: Path, path: Path) -> None:
        _sync(part)
        part.rename(path)
        _sync(self._directory)

    async def read(self, key: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`."""
        path = f"{self._directory}/{key}"  # twice a second for every stream: a `Path` takes longer than the read
        try:
            if length <= AT_ONCE and (data := _read_cached(path, start, length)) is not None:
                return data
            return await asyncio.to_thread(_read, path, start, length)
        except FileNotFoundError:
            raise AudioMissing from None
        except OSError as exc:
            raise _ours(exc) from exc

    async def delete(self, key: str) -> None:
        """Remove it."""
        try:
            await asyncio.to_thread(_discard, self._directory / key)
        except OSError as exc:
            raise _ours(exc) from exc

    async def keys(self) -> list[str]:
        """The names of the files."""
        try:
            return await asyncio.to_thread(os.listdir, self._directory)
        except OSError as exc:
            raise _ours(exc) from exc

    async def sweep(self) -> int:
        """Remove the parts of uploads that a crash interrupted. Only safe before uploads are taken."""
        parts = await asyncio.to_thread(lambda: list(self._directory.glob("*.part")))
        await asyncio.to_thread(_discard, *parts)
        return len(parts)

    async def check(self) -> str:
        """Raises `StorageFull` while less than 5 % or 1 GiB, whichever is smaller, is free."""
        try:
            usage = await asyncio.to_thread(shutil.disk_usage, self._directory)
        except OSError as exc:
            raise _ours(exc) from exc
        if usage.free < min(MIN_FREE_BYTES, usage.total * MIN_FREE_SHARE):
            raise StorageFull(f"Only {usage.free >> 20} MiB are free where the audio is kept.")
        return f"{usage.free >> 20} MiB free"


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _append(path: Path, chunks: list[bytes], sync: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        at = 0
        while at < len(chunks):
            written = os.writev(descriptor, chunks[at : at + _MOST_BUFFERS])
            while at < len(chunks) and written >= len(chunks[at]):
                written -= len(chunks[at])
                at += 1
            if written:
                chunks[at] = chunks[at][written:]
        if sync:
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _read(path: str, start: int, length: int) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        return os.pread(file.fileno(), length, start)


def _read_cached(path: str, start: int, length: int) -> bytes | None:
    """What the kernel holds in memory, if it holds all of it: a thread would cost several times the copy."""
    if _NO_WAIT is None:
        return None
    buffer = bytearray(length)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return bytes(buffer) if os.preadv(descriptor, [buffer], start, _NO_WAIT) == length else None
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return None
        raise
    finally:
        os.close(descriptor)


def _ours(exc: OSError) -> StorageFull | Unavailable:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull()
    return Unavailable(f"The audio store failed: {exc.strerror}.")
