"""The peaks of a job's audio, computed when somebody first asks and kept as long as the audio. FLOOR 3.

One computation at a time per job, which all who ask meanwhile wait for and which goes on if they leave; at most
`AT_ONCE` in a process, so that streams and uploads keep their threads and disk. The audio is read in blocks, twice (its
extent is known only at its end), and looked at in threads.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from service.core.errors import AudioCorrupt, InvalidAudio, OurError
from service.core.job import to_json
from service.core.peaks import PeakFinder
from service.core.wav import WavInfo, WavParser
from service.ports import BlobStore
from service.store import Store

AT_ONCE = 2
BLOCK = 1 << 20


class Waveforms:
    """Peaks by job."""

    def __init__(self, store: Store, blobs: BlobStore) -> None:
        """`close` it before them."""
        self._store = store
        self._blobs = blobs
        self._running: dict[str, asyncio.Task[bytes]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def peaks(self, job_id: str) -> bytes:
        """The peaks as JSON. Raises `AudioMissing`, `AudioCorrupt`, `Unavailable`."""
        await self._blobs.read(job_id, 0, 1)  # says so when the audio is gone
        task = self._running.get(job_id)
        if task is None:
            task = self._running[job_id] = asyncio.create_task(self._make(job_id), name=f"peaks {job_id}")
            task.add_done_callback(lambda done: self._ended(job_id, done))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Give up what is being computed."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, job_id: str, task: asyncio.Task[bytes]) -> None:
        del self._running[job_id]
        if not task.cancelled():
            task.exception()  # those who asked were told; if they have left, nobody needs to be

    async def _make(self, job_id: str) -> bytes:
        kept = await self._store.peaks(job_id)
        if kept is not None:
            return kept
        async with self._slots:
            info = await self._parse(job_id)
            finder = PeakFinder(info.format, info.frames)
            async for block in self._blocks(job_id, info.data_start, info.data_start + info.data_bytes):
                await asyncio.to_thread(finder.feed, block)
            doc = to_json(await asyncio.to_thread(finder.finish))
            with suppress(OurError):  # found is found; the next to ask has them made again
                await self._store.keep_peaks(job_id, doc)
            return doc

    async def _parse(self, job_id: str) -> WavInfo:
        parser = WavParser(max_duration_s=float("inf"))
        try:
            async for block in self._blocks(job_id, 0, None):
                parser.feed(block)
            return parser.finish()
        except InvalidAudio as exc:
            raise AudioCorrupt from exc

    async def _blocks(self, job_id: str, at: int, end: int | None) -> AsyncIterator[bytes]:
        while (wanted := BLOCK if end is None else min(BLOCK, end - at)) and (
            block := await self._blobs.read(job_id, at, wanted)
        ):
            yield block
            at += len(block)
