"""Two thousand short jobs in one process on a clock that runs faster: nothing grows."""

import asyncio
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit import Kit, running, spoken
from tests.marked import marked_wav, words

JOBS, WARM_UP, AT_ONCE = 2000, 300, 40
DURATION_MS = 800


@dataclass(frozen=True)
class Sample:
    """What the process holds."""

    rss_mb: float
    descriptors: int
    tasks: int


def sample() -> Sample:
    """As it is now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    rss_mb = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return Sample(rss_mb, sum(1 for _ in Path("/proc/self/fd").iterdir()), len(asyncio.all_tasks()))


async def idle(kit: Kit) -> Sample:
    """Once all is over; the sandbox's records hold the audio."""
    await kit.sandbox.settled()
    kit.sandbox.sessions.clear()
    await asyncio.sleep(1)
    return sample()


async def run(kit: Kit, count: int) -> None:
    """So many jobs, some at once."""
    wav, left = marked_wav(DURATION_MS), iter(range(count))

    async def one_after_the_other() -> None:
        for _ in left:
            job, events = await kit.run(wav)
            assert job.status == "completed"
            assert spoken(events) == words(DURATION_MS // 200)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(one_after_the_other())


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_two_thousand_jobs_leave_nothing_behind(tmp_path: Path) -> None:
    async with running(tmp_path, speed=5) as kit:
        await run(kit, WARM_UP)
        before, began = await idle(kit), time.monotonic()
        samples = [before]
        for _ in range(4):
            await run(kit, JOBS // 4)
            samples.append(await idle(kit))
        print(f"\n{JOBS} jobs in {time.monotonic() - began:.0f} s")
        for each in samples:
            print(each)
        after = samples[-1]
        assert after.descriptors <= before.descriptors + 5
        assert after.tasks <= before.tasks + 5
        assert after.rss_mb <= before.rss_mb + 10
