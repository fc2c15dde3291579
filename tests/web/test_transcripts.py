"""Transcripts in four formats and the audio, over HTTP."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from service.core.job import Turn
from service.web.transcripts import PAGE
from tests.web.served import Json, Served, refused, serving, wav

pytestmark = pytest.mark.asyncio(loop_scope="module")

TYPES = {
    "txt": "text/plain; charset=utf-8",
    "json": "application/json",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def idle(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("idle")) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def ended(tmp_path: Path) -> AsyncIterator[tuple[Served, Json]]:
    async with serving(tmp_path, work=True) as served:
        yield served, await served.ended((await served.upload(wav(4)))["id"])


async def test_formats(ended: tuple[Served, Json]) -> None:
    served, job = ended
    path = f"/jobs/{job['id']}/transcript"
    for form, media_type in TYPES.items():
        answer = await served.http.get(f"{path}.{form}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
        assert answer.headers["x-transcript-complete"] == "true"
        assert answer.content == (await served.http.get(path, params={"format": form})).content
        assert answer.content == (await served.http.get(f"{path}.{form}", headers={"Accept": "image/png"})).content
    assert (await served.http.get(f"{path}.json")).json()["turns"]
    assert (await served.http.get(path)).text.startswith("AssemblyAI Session ID: ")


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("*/*", "txt"),
        ("", "txt"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "txt"),
        ("application/json", "json"),
        ("application/json;q=0.5, text/vtt", "vtt"),
        ("text/*;q=0.1, application/x-subrip;q=0.2", "srt"),
        ("text/plain;q=0, text/*", "vtt"),
        ("TEXT/VTT", "vtt"),
        ("image/png", None),
        ("*/*;q=0", None),
        ("text/vtt;q=x", None),
    ],
)
async def test_accept(idle: Served, accept: str, form: str | None) -> None:
    path = f"/jobs/{(await idle.upload())['id']}/transcript"
    answer = await idle.http.get(path, headers={"Accept": accept})
    if form is None:
        refused(answer, "not_acceptable")
    else:
        assert answer.headers["content-type"] == TYPES[form]
        assert answer.headers["vary"] == "Accept"
        assert answer.headers["x-transcript-complete"] == "false"


async def test_formats_that_are_none(idle: Served) -> None:
    path = f"/jobs/{(await idle.upload())['id']}/transcript"
    refused(await idle.http.get(f"{path}.doc"), "not_found")
    refused(await idle.http.get(f"{path}?format=doc"), "not_acceptable")
    refused(await idle.http.get(f"{path}?format="), "not_acceptable")


async def test_a_long_transcript_is_whole(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        job = await served.upload()
        count = PAGE * 2
        turns = [
            Turn(
                index=i, start_ms=i, end_ms=i, transcript=f"t{i}", words=[], formatted=True, session_id="s", turn_order=i,
                end_of_turn_confidence=1, language=None, speaker=None, channel=None, latency_ms=0,
            )
            for i in range(count)
        ]  # fmt: skip

        async def kept(job_id: str, *, after: int = -1, limit: int | None = None) -> list[Turn]:
            return turns[after + 1 : after + 1 + (limit or count)]

        served.runtime.store.turns = kept  # type: ignore[method-assign]
        whole = (await served.http.get(f"/jobs/{job['id']}/transcript.json")).json()
        assert [turn["index"] for turn in whole["turns"]] == list(range(count))


# --- audio -----------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def audio(idle: Served) -> tuple[Served, str, bytes]:
    data = wav(20)  # more than one piece
    job = await idle.upload(data, filename='Tür "auf"; 100%.wav')
    return idle, f"/jobs/{job['id']}/audio", data


async def test_audio(audio: tuple[Served, str, bytes]) -> None:
    served, path, data = audio
    answer = await served.http.get(path)
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''T%C3%BCr%20%22auf%22%3B%20100%25.wav"
    head = await served.http.head(path)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(data)))
    same = await served.http.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=44-", 44, None),
        ("bytes=100-299999", 100, 300_000),
        ("bytes=-10", -10, None),
        ("bytes=-99999999", 0, None),
        ("bytes=600000-99999999", 600_000, None),
        ("Bytes = 1 - 2", 1, 3),
    ],
)
async def test_a_range(audio: tuple[Served, str, bytes], header: str, start: int, stop: int | None) -> None:
    served, path, data = audio
    first, last, _ = slice(start, stop).indices(len(data))
    answer = await served.http.get(path, headers={"Range": header})
    assert (answer.status_code, answer.content) == (206, data[start:stop])
    assert answer.headers["content-range"] == f"bytes {first}-{last - 1}/{len(data)}"
    head = await served.http.head(path, headers={"Range": header})
    assert (head.status_code, head.headers["content-length"]) == (206, str(last - first))


@pytest.mark.parametrize(
    "header", ["bytes=0-1,5-6", "bytes=", "bytes=-", "bytes=5-2", "bytes=a-b", "lines=1-2", "bytes=0x1-2", ""]
)
async def test_a_range_that_is_ignored(audio: tuple[Served, str, bytes], header: str) -> None:
    served, path, data = audio
    answer = await served.http.get(path, headers={"Range": header})
    assert (answer.status_code, len(answer.content)) == (200, len(data))


async def test_ranges_that_are_not_there(audio: tuple[Served, str, bytes]) -> None:
    served, path, data = audio
    for header in (f"bytes={len(data)}-", "bytes=-0", "bytes=99999999-99999999"):
        answer = await served.http.get(path, headers={"Range": header})
        refused(answer, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{len(data)}"
    etag = (await served.http.head(path)).headers["etag"]
    for value, status in ((etag, 206), ('"other"', 200), ("Sat, 21 Nov 2026 10:48:07 GMT", 200)):
        assert (await served.http.get(path, headers={"Range": "bytes=0-1", "If-Range": value})).status_code == status


async def test_audio_that_is_gone(audio: tuple[Served, str, bytes]) -> None:
    served, path, _ = audio
    await served.runtime.blobs.delete(path.split("/")[2])
    refused(await served.http.get(path), "audio_gone")
    assert (await served.http.head(path)).status_code == 410
    assert (await served.http.get(path.replace("audio", "transcript"))).status_code == 200
