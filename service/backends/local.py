"""BlobStore in a directory: one file a job. FLOOR 3.

A blob is written to `<key>.part`, fsynced, renamed, and the directory fsynced: on return it survives a power cut, and
before that nobody can see it. Files are 0600, the directory 0700. All disk work happens in threads, in pieces of at
least `BATCH` bytes, so that the event loop and the streams on it never wait for a disk.
"""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from service.core.errors import AudioMissing, StorageFull, Unavailable

BATCH = 1 << 20
MIN_FREE_BYTES = 1 << 30
MIN_FREE_SHARE = 0.05


class LocalBlobs:
    """Audio files under one directory."""

    def __init__(self, directory: Path) -> None:
        """Make the directory if it is not there."""
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Store all or nothing, durable on return."""
        part, path = self._directory / f"{key}.part", self._directory / key
        descriptor = await asyncio.to_thread(os.open, part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                size = await self._write(descriptor, chunks)
                await asyncio.to_thread(os.fsync, descriptor)
            finally:
                os.close(descriptor)
            await asyncio.to_thread(self._commit, part, path)
        except BaseException as exc:
            part.unlink(missing_ok=True)
            if isinstance(exc, OSError):
                raise _ours(exc) from exc
            raise
        return size

    async def _write(self, descriptor: int, chunks: AsyncIterator[bytes]) -> int:
        size, batch, held = 0, [], 0
        async for chunk in chunks:
            batch.append(chunk)
            held += len(chunk)
            if held >= BATCH:
                size += await asyncio.to_thread(_write_all, descriptor, b"".join(batch))
                batch, held = [], 0
        return size + await asyncio.to_thread(_write_all, descriptor, b"".join(batch))

    def _commit(self, part: Path, path: Path) -> None:
        part.rename(path)
        self._sync_directory()

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    async def read(self, key: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`."""
        try:
            return await asyncio.to_thread(_read, self._directory / key, start, length)
        except FileNotFoundError:
            raise AudioMissing from None
        except OSError as exc:
            raise _ours(exc) from exc

    async def delete(self, key: str) -> None:
        """Remove it."""
        await asyncio.to_thread((self._directory / key).unlink, missing_ok=True)

    async def sweep(self) -> int:
        """Remove the parts of uploads that a crash interrupted. Only safe before uploads are taken."""
        parts = list(self._directory.glob("*.part"))
        for part in parts:
            part.unlink(missing_ok=True)
        return len(parts)

    async def check(self) -> str:
        """Raises `StorageFull` while less than 5 % or 1 GiB, whichever is smaller, is free."""
        usage = await asyncio.to_thread(shutil.disk_usage, self._directory)
        if usage.free < min(MIN_FREE_BYTES, usage.total * MIN_FREE_SHARE):
            raise StorageFull(f"Only {usage.free >> 20} MiB are free where the audio is kept.")
        return f"{usage.free >> 20} MiB free"


def _write_all(descriptor: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    return len(data)


def _read(path: Path, start: int, length: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), length, start)


def _ours(exc: OSError) -> StorageFull | Unavailable:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull()
    return Unavailable(f"The audio store failed: {exc.strerror}.")
