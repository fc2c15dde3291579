"""The peaks of a job: made once, for all who ask, and gone with the audio."""

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
from sqlalchemy import select

from service import waveform
from service.core.errors import Unavailable
from service.core.peaks import PeakFinder
from service.store import Store
from service.store.schema import peaks
from tests.kit import eventually
from tests.wavs import UNTOLD, chunk, fmt, riff
from tests.web.served import Served, refused, serving, wav

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def idle(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("peaks")) as served:
        yield served


async def kept(store: Store, job_id: str) -> bool:
    return bool(await store._rows(select(peaks.c.job_id).where(peaks.c.job_id == job_id)))


async def test_peaks(idle: Served) -> None:
    half = np.full(80_000, 16_384, "<i2")
    data = riff(chunk(b"LIST", b"odd"), fmt(), chunk(b"data", np.concatenate((half, -half)).tobytes(), UNTOLD))
    job = await idle.upload(data + bytes(1))
    path = f"/jobs/{job['id']}/peaks"
    answer = await idle.http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    found = answer.json()
    assert found == {"ms_per_peak": 5, "peaks": [[0.5, 0.5]] * 1000 + [[-0.5, -0.5]] * 1000}
    head = await idle.http.head(path)
    assert (head.status_code, head.content) == (200, b"")


async def test_one_computation_for_all_who_ask_and_for_ever(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(PeakFinder):
        def __init__(self, *args: object) -> None:
            made.append(args)
            super().__init__(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(waveform, "PeakFinder", Counted)
    job = await idle.upload(wav(30))
    path = f"/jobs/{job['id']}/peaks"
    answers = await asyncio.gather(*(idle.http.get(path) for _ in range(20)))
    assert len({answer.content for answer in answers}) == 1
    assert (await idle.http.get(path)).content == answers[0].content
    assert len(made) == 1
    assert not idle.runtime.waveforms._running


async def test_those_who_leave_take_nothing_from_the_others(idle: Served) -> None:
    job = await idle.upload(wav(1))
    waveforms, slots = idle.runtime.waveforms, idle.runtime.waveforms._slots
    for _ in range(waveform.AT_ONCE):
        await slots.acquire()
    first, second = (asyncio.create_task(waveforms.peaks(job["id"])) for _ in range(2))
    await eventually(lambda: waveforms._running)
    await asyncio.sleep(0.05)
    first.cancel()
    for _ in range(waveform.AT_ONCE):
        slots.release()
    assert (await second).startswith(b'{"ms_per_peak":1,')
    assert await kept(idle.runtime.store, job["id"])


async def test_without_audio(idle: Served) -> None:
    job = await idle.upload()
    path = f"/jobs/{job['id']}/peaks"
    assert (await idle.http.get(path)).status_code == 200
    await idle.runtime.blobs.delete(job["id"])
    refused(await idle.http.get(path), "audio_gone")


async def test_peaks_go_with_the_audio_and_with_the_job(idle: Served) -> None:
    store = idle.runtime.store
    jobs = [await idle.upload() for _ in range(3)]
    ids = [job["id"] for job in jobs]
    for job_id in ids:
        await idle.http.get(f"/jobs/{job_id}/peaks")
    await idle.http.post(f"/jobs/{ids[0]}/cancel")
    assert await store.outbox.drop_audio(ids[0], ended_by_ms=2**53)
    await idle.http.delete(f"/jobs/{ids[1]}")
    assert [await kept(store, job_id) for job_id in ids] == [False, False, True]
    for job_id in ids[:2]:  # as who was computing them meanwhile
        await store.keep_peaks(job_id, b"{}")
    assert [await kept(store, job_id) for job_id in ids] == [False, False, True]


async def test_what_cannot_be_kept_is_told_all_the_same(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(job_id: str, doc: bytes) -> None:
        raise Unavailable

    monkeypatch.setattr(idle.runtime.store, "keep_peaks", away)
    job = await idle.upload()
    assert (await idle.http.get(f"/jobs/{job['id']}/peaks")).status_code == 200
    assert not await kept(idle.runtime.store, job["id"])


async def test_the_event_loop_never_looks_at_samples(idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes: looked at in threads, and never more than a block of them at a time."""
    fed = []

    class Watched(PeakFinder):
        def feed(self, block: bytes) -> None:
            fed.append((threading.current_thread() is threading.main_thread(), len(block)))
            super().feed(block)

    monkeypatch.setattr(waveform, "PeakFinder", Watched)
    size = 16_000 * 2 * 2 * 600
    job = await idle.upload(riff(fmt(channels=2), chunk(b"data", bytes(size))), channels="mix")
    found = (await idle.http.get(f"/jobs/{job['id']}/peaks")).json()
    assert (found["ms_per_peak"], len(found["peaks"])) == (300, 2000)
    assert sum(length for _, length in fed) == size
    assert max(length for _, length in fed) <= waveform.BLOCK
    assert not any(on_the_loop for on_the_loop, _ in fed)
