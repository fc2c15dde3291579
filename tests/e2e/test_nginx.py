"""The delivered nginx site before a real service: uploads, events as they are spoken, a node that is dead."""

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.e2e.process import serving
from tests.e2e.proxy import nginx
from tests.engines import free_ports
from tests.kit import spoken
from tests.marked import marked_wav, words


async def curl(*arguments: object) -> asyncio.subprocess.Process:
    """As a user calls it."""
    command = ["curl", "-sS", "--noproxy", "*", "--max-time", "60", *map(str, arguments)]
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)


async def test_events_pass_as_they_are_spoken_and_uploads_as_they_come(tmp_path: Path) -> None:
    audio = tmp_path / "audio.wav"
    audio.write_bytes(marked_wav(6000))
    port, dead = free_ports(2)
    async with serving(tmp_path) as (service, _):
        await service.start()
        live = urlsplit(service.url).port
        servers = f"server 127.0.0.1:{dead} max_fails=1 fail_timeout=60s;\nserver 127.0.0.1:{live};\n"
        with nginx(tmp_path / "nginx", port, servers) as url:
            upload = await curl("-F", f"file=@{audio}", f"{url}/jobs")
            job = json.loads((await upload.communicate())[0])
            # So little that any buffer would keep it to the end, and everything.
            terse, whole = [
                await curl("-N", "-H", "Accept: application/x-ndjson", f"{url}/jobs/{job['id']}/events{query}")
                for query in ("?types=job.status", "")
            ]
            while (await _event(terse))["stage"] != "streaming":
                pass
            async with service.client() as direct:
                now = (await direct.get(f"/jobs/{job['id']}")).json()
            assert now["status"] == "processing", "events were kept until the job was over"
            assert now["progress"]["sent_ms"] < 6000
            events = [await _event(whole)]
            while events[-1]["type"] != "job.completed":
                events.append(await _event(whole))
            assert [await process.wait() for process in (terse, whole)] == [0, 0]
            assert [event["id"] for event in events if event["id"]] == list(range(1, events[-1]["id"] + 1))
            assert spoken(events) == words(30)
            async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
                assert (await client.get("/metrics")).status_code == 404
                page = await client.get("/", headers={"Origin": url})
                assert page.status_code == 200, "the host keeps its port, so a page of ours is ours"
            await _refused_at_its_first_bytes(port)


async def _event(follower: asyncio.subprocess.Process) -> dict[str, Any]:
    assert follower.stdout is not None
    while not (line := await follower.stdout.readline()).strip():
        assert line, "the stream ended early"
    event: dict[str, Any] = json.loads(line)
    return event


async def _refused_at_its_first_bytes(port: int) -> None:
    """A gigabyte is announced, a few bytes are sent, and the answer is there: nothing waits for the whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: audio/wav\r\nContent-Length: 1000000000\r\n\r\n"
    writer.write(head.encode() + b"no wave file at all, by no means" * 100)
    async with asyncio.timeout(30):
        assert b" 415 " in await reader.readline()
    writer.close()
