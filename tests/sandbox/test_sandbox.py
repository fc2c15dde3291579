"""The sandbox around its sessions: who may come in, what is recorded and billed, how it ends, how much it bears."""

import asyncio
import time

import httpx
import pytest
from websockets.exceptions import InvalidMessage

from service.sandbox import faults
from service.sandbox.app import Sandbox, run_sandbox
from service.sandbox.recogniser import NumberedWords
from tests.sandbox.client import KEY, PRO, Talk, assert_ends_well, converse, dial, listen, silence

REASON = "See Error message for details"


@pytest.mark.parametrize(
    ("headers", "query", "error"),
    [
        ({}, PRO, "Missing Authorization header"),
        ({"Authorization": ""}, PRO, "Missing Authorization header"),
        ({"Authorization": "Bearer any-key"}, PRO, "Invalid API key"),
        ({}, f"{PRO}&token=sandbox.1.2.forged.x", "Invalid API key"),
        ({}, f"{PRO}&token=anything", None),
        (KEY, PRO, None),
    ],
)
async def test_credentials(sandbox: Sandbox, headers: dict[str, str], query: str, error: str | None) -> None:
    talk = await converse(sandbox.url, silence(300), query, headers=headers)
    if error is None:
        assert_ends_well(talk)
    else:
        assert (talk.code, talk.reason) == (1008, REASON)
        assert talk.error == (1008, f"Unauthorized Connection: {error}")
        assert talk.kinds == ["Error"]


async def test_keys_can_be_restricted() -> None:
    async with run_sandbox(recogniser=NumberedWords, keys={"good"}) as sandbox:
        assert_ends_well(await converse(sandbox.url, headers={"Authorization": "good"}))
        assert (await converse(sandbox.url)).error[1] == "Unauthorized Connection: Invalid API key"


async def test_tokens_are_issued_checked_capped_and_expire() -> None:
    async with run_sandbox(recogniser=NumberedWords, speed=10) as sandbox:
        base = f"http://127.0.0.1:{sandbox.port}"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            granted = await http.get("/v3/token?expires_in_seconds=5&max_session_duration_seconds=60", headers=KEY)
            assert granted.status_code == 200
            token = granted.json()["token"]
            assert len(token) > 2000
            missing = await http.get("/v3/token")
            assert missing.status_code == 422
            assert [problem["loc"] for problem in missing.json()["detail"]] == [
                ["header", "authorization"],
                ["query", "expires_in_seconds"],
            ]
            high = await http.get("/v3/token?expires_in_seconds=601", headers=KEY)
            assert high.json()["detail"][0]["ctx"] == {"le": 600}
            assert (await http.get("/v3/token?expires_in_seconds=x", headers=KEY)).status_code == 422
            assert (await http.get("/v2/realtime/ws")).status_code == 410
            assert (await http.get("/elsewhere")).status_code == 404
            assert (await http.get("/v3/ws/health")).status_code == 200
        by_query = await converse(sandbox.url, query=f"{PRO}&token={token}", headers={})
        by_header = await converse(sandbox.url, headers={"Authorization": token})
        assert_ends_well(by_query)
        assert_ends_well(by_header)
        # The cap is 60 s of a clock ten times as fast.
        assert by_query.messages[0]["expires_at"] - time.time() < 10
        await asyncio.sleep(0.7)
        assert (
            (await converse(sandbox.url, headers={"Authorization": token})).error[1].endswith("Signature has expired")
        )


async def test_records_let_a_test_judge_pace_coverage_and_bill(sandbox: Sandbox) -> None:
    audio = bytes(range(250)) * 128
    await converse(sandbox.url, audio, f"{PRO}&token=secret&nonsense=1")
    await sandbox.settled()
    (record,) = sandbox.sessions
    assert bytes(record.audio) == audio
    assert (record.audio_bytes, record.audio_ms, record.messages) == (32_000, 1000.0, 10)
    assert [size for _, size in record.arrivals] == [3200] * 10
    assert record.query == {"sample_rate": "16000", "speech_model": "u3-rt-pro", "nonsense": "1"}
    assert "Authorization" not in record.headers
    assert record.credential == "header"
    assert record.ended_by == "terminated"
    assert record.begin_at is not None
    assert record.terminate_at is not None
    assert record.termination_at is not None
    assert record.begin_at < record.terminate_at < record.termination_at
    assert (record.close_code, record.turns) == (1000, 1)
    assert 0 < record.billed_seconds < 60


async def test_a_session_that_is_dropped_is_billed_to_its_end(sandbox: Sandbox) -> None:
    for query in (PRO, f"{PRO}&inactivity_timeout=30"):
        async with dial(sandbox.url, query) as ws:
            await ws.recv()
            ws.transport.abort()
    async with dial(sandbox.url) as ws:
        await ws.recv()
    await sandbox.settled()
    whole, until_idle, closed = sandbox.sessions
    assert [record.ended_by for record in sandbox.sessions] == ["dropped", "dropped", "client_close"]
    assert 10_700 < whole.billed_seconds <= 10_800
    assert 29 < until_idle.billed_seconds < 60
    assert closed.billed_seconds < 60


async def test_records_do_not_grow_beyond_their_cap() -> None:
    async with run_sandbox(recogniser=NumberedWords, max_records=2) as sandbox:
        for _ in range(4):
            await converse(sandbox.url)
        assert [record.ordinal for record in sandbox.sessions] == [3, 4]


async def test_the_end_of_the_sandbox_closes_its_sessions() -> None:
    talk = Talk()
    async with run_sandbox(recogniser=NumberedWords) as sandbox:
        ws = await dial(sandbox.url)
        hearing = asyncio.create_task(listen(ws, talk))
        await asyncio.sleep(0.1)
    await hearing
    assert talk.code == 1001


@pytest.mark.parametrize("step", [faults.Silent(), faults.StopReading(), faults.HangUpgrade(), faults.NoBegin()])
async def test_planned_silences_do_not_outlast_the_sandbox(step: faults.Step) -> None:
    async with run_sandbox(recogniser=NumberedWords, faults=faults.FaultPlan({"*": [step]})) as sandbox:
        dialing = asyncio.create_task(converse(sandbox.url, silence(200), after=()))
        await asyncio.sleep(0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 4
    await asyncio.wait([dialing])
    assert isinstance(dialing.exception(), InvalidMessage | None)


async def test_two_hundred_sessions_fit() -> None:
    async with run_sandbox(recogniser=NumberedWords, speed=4) as sandbox:

        async def one() -> Talk:
            return await converse(sandbox.url, silence(4000), chunk=6400, pace=0.05)

        talks = await asyncio.gather(*(one() for _ in range(200)))
    for talk in talks:
        assert_ends_well(talk)
        assert [turn["transcript"] for turn in talk.finals] == ["One two three four five six seven eight.", "Nine ten."]
