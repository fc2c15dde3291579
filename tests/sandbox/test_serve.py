"""The sandbox as a process: one line that says all, SIGTERM, exit 0."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from service.sandbox.app import serve_forever
from service.sandbox.script import PlanFileError
from tests.sandbox.client import Talk, dial, listen, silence

RUN = """
import asyncio, pathlib, sys
from service.sandbox.app import serve_forever
asyncio.run(serve_forever("127.0.0.1", 0, pathlib.Path(sys.argv[1]), None, 5.0))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_says_its_url_and_drains_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.json"
    script.write_text('{"turns": [{"text": "Hello there."}]}', encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN, str(script), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    line = (await process.stderr.readline()).decode()
    assert f"hears the script {script}" in line
    url = line.split()[1]
    assert f"TURNWIRE_UPSTREAM_URL={url}" in line
    talk = Talk()
    ws = await dial(url)
    hearing = asyncio.create_task(listen(ws, talk))
    for _ in range(10):
        await ws.send(silence(100))
    await asyncio.sleep(0.3)
    process.send_signal(number)
    async with asyncio.timeout(10):
        assert await process.wait() == 0
        await hearing
    assert talk.finals[0]["transcript"] == "Hello there."
    assert talk.code == 1001
    with pytest.raises((OSError, ConnectionClosed)):
        await dial(url)


async def test_bad_files_are_told_before_it_serves(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError):
        await serve_forever("127.0.0.1", 0, tmp_path / "none.json", None, 1.0)


async def test_only_off_loopback_is_no_key_asked() -> None:
    for host, answer in (("127.0.0.1", "Error"), ("0.0.0.0", "Begin")):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "service", "sandbox", "--host", host, "--port", "0", stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            while "TURNWIRE_UPSTREAM_URL=" not in (line := (await process.stderr.readline()).decode()):
                assert line
            url = line.partition("TURNWIRE_UPSTREAM_URL=")[2].split()[0].replace("0.0.0.0", "127.0.0.1")
            async with connect(f"{url}?sample_rate=16000&speech_model=u3-rt-pro") as ws:
                assert json.loads(await ws.recv())["type"] == answer
        finally:
            process.terminate()
            assert await process.wait() == 0
