"""Every knob of a fault plan, seen by a plain client."""

import asyncio
import time

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from service.sandbox import faults as f
from service.sandbox.app import Sandbox, run_sandbox
from service.sandbox.faults import ERRORS, FaultPlan, Step
from service.sandbox.recogniser import NumberedWords
from tests.sandbox.client import KEY, PRO, US, Talk, assert_ends_well, converse, dial, listen, silence


def plan(sandbox: Sandbox, *steps: Step) -> None:
    sandbox.faults = FaultPlan({"*": list(steps)})


@pytest.mark.parametrize("status", [200, 302, 401, 403, 410, 429, 500, 503])
async def test_refusals_over_http(sandbox: Sandbox, status: int) -> None:
    plan(sandbox, f.Refuse(status=status, retry_after=7, location="http://127.0.0.1:9/", body="no"))
    # Seen with an HTTP client: a websocket client would follow the redirect.
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    async with httpx.AsyncClient(trust_env=False) as http:
        url = sandbox.url.replace("ws://", "http://")
        answer = await http.get(url, headers=KEY | upgrade | {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="})
    assert (answer.status_code, answer.headers["Retry-After"], answer.text) == (status, "7", "no")
    assert (sandbox.sessions[0].refused_status, sandbox.sessions[0].ended_by) == (status, "refused")


async def test_sessions_are_told_apart_by_their_ordinal(sandbox: Sandbox) -> None:
    sandbox.faults = FaultPlan({"1": [f.Refuse(status=503)], "2-3": [f.ErrorFrame(name="too_many")], "*": []})
    with pytest.raises(InvalidStatus):
        await converse(sandbox.url)
    for _ in range(2):
        assert (await converse(sandbox.url)).error[1] == "Unauthorized Connection: Too many concurrent sessions"
    assert_ends_well(await converse(sandbox.url))
    assert [record.ordinal for record in sandbox.sessions] == [1, 2, 3, 4]


async def test_a_late_and_a_false_handshake(sandbox: Sandbox) -> None:
    plan(sandbox, f.HangUpgrade(seconds=6))
    started = time.monotonic()
    assert_ends_well(await converse(sandbox.url))
    assert time.monotonic() - started > 0.28
    plan(sandbox, f.WrongAccept())
    with pytest.raises(InvalidHandshake):
        await converse(sandbox.url)


@pytest.mark.parametrize("name", ERRORS)
async def test_every_named_error_before_begin(sandbox: Sandbox, name: str) -> None:
    plan(sandbox, f.ErrorFrame(name=name))
    talk = await converse(sandbox.url, silence(1000))
    assert talk.kinds == ["Error"]
    assert talk.error == ERRORS[name]
    assert (talk.code, talk.reason) == (ERRORS[name][0], "See Error message for details")
    await sandbox.settled()
    assert sandbox.sessions[0].error == ERRORS[name]
    assert sandbox.sessions[0].billed_seconds == 0


async def test_an_error_in_mid_turn_and_one_for_an_answer_to_terminate(sandbox: Sandbox) -> None:
    plan(sandbox, f.ErrorFrame(name="cancelled", at_ms=2000))
    talk = await converse(sandbox.url, silence(4000), pace=0.01)
    assert talk.code == 3005
    assert talk.kinds[0] == "Begin"
    assert talk.partials
    assert talk.finals == []
    plan(sandbox, f.ErrorFrame(name="cancelled", on="terminate"))
    talk = await converse(sandbox.url, silence(4000))
    assert talk.code == 3005
    assert len(talk.finals) == 1


async def test_frames_of_old_and_frames_at_odds_with_their_close(sandbox: Sandbox) -> None:
    plan(sandbox, f.ErrorFrame(name="cancelled", with_type=False, with_code=False))
    talk = await converse(sandbox.url)
    assert talk.messages == [{"error": "Session Cancelled: An error occurred"}]
    plan(sandbox, f.ErrorFrame(code=3008, text="own words", close_code=1011, reason="other"))
    talk = await converse(sandbox.url)
    assert (talk.error, talk.code, talk.reason) == ((3008, "own words"), 1011, "other")


async def test_an_error_without_a_close(sandbox: Sandbox) -> None:
    plan(sandbox, f.ErrorFrame(name="cancelled", close=False))
    async with dial(sandbox.url) as ws:
        assert "Session Cancelled" in str(await ws.recv())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ws.recv(), 0.1)


async def test_begin_late_never_or_bare(sandbox: Sandbox) -> None:
    plan(sandbox, f.DelayBegin(seconds=6))
    started = time.monotonic()
    assert_ends_well(await converse(sandbox.url, silence(500)))
    assert time.monotonic() - started > 0.28
    plan(sandbox, f.NoBegin())
    async with dial(sandbox.url) as ws:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ws.recv(), 0.1)
    plan(sandbox, f.NoConfiguration())
    assert "configuration" not in (await converse(sandbox.url)).messages[0]


async def test_a_short_life_is_announced_and_kept(sandbox: Sandbox) -> None:
    plan(sandbox, f.ExpiresIn(seconds=10))
    started = time.time()
    talk = await converse(sandbox.url, silence(500), after=())
    assert talk.messages[0]["expires_at"] - started <= 1
    assert 0.4 < time.time() - started < 3
    assert talk.error == ERRORS["expired"]
    assert talk.code == 3008


async def test_a_bare_close(sandbox: Sandbox) -> None:
    plan(sandbox, f.Close(code=1011, reason="bye", at_ms=500))
    talk = await converse(sandbox.url, silence(1000))
    assert (talk.code, talk.reason) == (1011, "bye")
    assert talk.of("Error") == []


async def test_the_code_of_a_close_survives_a_client_in_full_flood(sandbox: Sandbox) -> None:
    plan(sandbox, f.Close(code=3005, reason="", at_ms=2000))
    for _ in range(20):
        assert (await converse(sandbox.url, silence(20_000))).code == 3005


@pytest.mark.parametrize("step", [f.Eof(at_ms=500), f.Eof(on="begin"), f.Drop(at_ms=500), f.Drop()])
async def test_ends_without_a_close_frame(sandbox: Sandbox, step: f.Eof | f.Drop) -> None:
    plan(sandbox, step)
    talk = await converse(sandbox.url, silence(1000))
    assert talk.code == 1006
    async with asyncio.timeout(2):
        await sandbox.settled()


async def test_drop_is_a_reset_and_eof_is_not(sandbox: Sandbox) -> None:
    async def cause(step: Step) -> BaseException | None:
        plan(sandbox, step)
        async with dial(sandbox.url) as ws:
            assert "Begin" in str(await ws.recv())
            with pytest.raises(ConnectionClosed) as closed:
                await ws.recv()
        return closed.value.__cause__

    assert isinstance(await cause(f.Drop(on="begin")), ConnectionResetError)
    assert not isinstance(await cause(f.Eof(on="begin")), ConnectionResetError)


@pytest.mark.parametrize("on", ["begin", "at_ms"])
async def test_half_open_is_silent_down_to_the_pongs(sandbox: Sandbox, on: str) -> None:
    plan(sandbox, f.Silent(seconds=60) if on == "begin" else f.Silent(at_ms=400, seconds=60))
    talk = Talk()
    async with dial(sandbox.url) as ws:
        assert "Begin" in str(await ws.recv())
        hearing = asyncio.create_task(listen(ws, talk))
        for _ in range(10):
            await ws.send(silence(100))
        await asyncio.sleep(0.05)  # what came in one piece with the fourth chunk has been read
        pong = await ws.ping()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(pong), 0.3)
        assert talk.messages == []
        async with asyncio.timeout(6):
            await hearing  # after 60 s, here 3 s, it is dropped
    assert talk.code == 1006


async def test_one_who_stops_reading_makes_the_writer_wait(sandbox: Sandbox) -> None:
    plan(sandbox, f.StopReading(on="begin", seconds=40))
    async with dial(sandbox.url) as ws:
        await ws.recv()

        async def flood() -> None:
            while True:
                await ws.send(silence(1000))

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flood(), 1)
        ws.transport.abort()


async def test_mute_answers_pings_and_says_nothing(sandbox: Sandbox) -> None:
    plan(sandbox, f.Mute())
    async with dial(sandbox.url) as ws:
        assert "Begin" in str(await ws.recv())
        for _ in range(20):
            await ws.send(silence(100))
        await asyncio.wait_for(await ws.ping(), 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ws.recv(), 0.2)


async def test_what_it_says_besides(sandbox: Sandbox) -> None:
    plan(
        sandbox,
        f.Send(text='{"type":"Warning","warning_code":1,"warning":"w"}', times=2),
        f.UnknownType(at_ms=200),
        f.Malformed(times=3),
        f.Binary(times=2),
        f.Huge(megabytes=2),
        f.Pong(times=5),
        f.Pings(every=1),
    )
    talk = await converse(sandbox.url, silence(2000), pace=0.005)
    assert len(talk.of("Warning")) == 3
    assert len(talk.of("FromTheFuture")) == 1
    assert [type(frame) for frame in talk.odd] == [str, str, str, bytes, bytes]
    assert max(len(message.get("warning", "")) for message in talk.messages) == 2_000_000
    assert talk.kinds[-1] == "Termination"


async def test_a_storm_of_pings_reaches_the_client() -> None:
    async with run_sandbox(recogniser=NumberedWords, faults=FaultPlan({"*": [f.Ping(times=20_000)]})) as sandbox:
        talk = await converse(sandbox.url, silence(300))
    assert_ends_well(talk)


async def test_what_happens_to_its_turns(sandbox: Sandbox) -> None:
    audio = silence(3 * 3200)

    async def finals(*steps: Step, query: str = PRO) -> list[tuple[int, str]]:
        plan(sandbox, *steps)
        talk = await converse(sandbox.url, audio, query)
        assert talk.kinds[-1] == "Termination"
        return [(turn["turn_order"], turn["transcript"].split()[0]) for turn in talk.finals if turn["words"]]

    zero, one, two = (0, "One"), (1, "Nine"), (2, "Seventeen")
    assert await finals() == [zero, one, two]
    assert await finals(f.DuplicateFinal(turn=1)) == [zero, one, one, two]
    assert await finals(f.DuplicateFinal()) == [zero, zero, one, one, two, two]
    assert await finals(f.LateTwin(turn=0)) == [zero, one, zero, two]
    assert await finals(f.SwapFinals(turn=0)) == [one, zero, two]
    assert await finals(f.SwapFinals(turn=2)) == [zero, one, two]
    assert await finals(f.ReviseTurn(turn=0, text="Other words.")) == [zero, (0, "Other"), one, two]
    late = await finals(f.SwapFinals(turn=0), query=f"{US}&format_turns=true")
    assert late[:4] == [(1, "nine"), (0, "one"), (0, "One"), (1, "Nine")]


async def test_a_partial_after_its_final_and_a_revision_of_speakers(sandbox: Sandbox) -> None:
    plan(sandbox, f.LatePartial(turn=0), f.ReviseSpeaker(turn=0, label="C"))
    talk = await converse(sandbox.url, silence(3200))
    final, late, revision = talk.messages[-4:-1]
    assert (final["end_of_turn"], late["end_of_turn"]) == (True, False)
    assert (late["turn_order"], late["transcript"]) == (0, final["transcript"])
    assert revision["revisions"][0]["speaker_label"] == "C"


async def test_termination_late_never_or_otherwise(sandbox: Sandbox) -> None:
    plan(sandbox, f.LateTermination(seconds=10))
    started = time.monotonic()
    assert_ends_well(await converse(sandbox.url, silence(500)))
    assert time.monotonic() - started > 0.48
    plan(sandbox, f.NoTermination(then="close"))
    talk = await converse(sandbox.url, silence(500))
    assert (talk.code, talk.reason, talk.kinds[-1]) == (1000, "", "Turn")
    for then in ("eof", "drop"):
        plan(sandbox, f.NoTermination(then=then))
        talk = await converse(sandbox.url, silence(500))
        assert (talk.code, talk.of("Termination")) == (1006, [])
    for step, last in ((f.NoTermination(), "Turn"), (f.NoClose(), "Termination")):
        plan(sandbox, step)
        talk = Talk()
        async with dial(sandbox.url) as ws:
            hearing = asyncio.create_task(listen(ws, talk))
            for _ in range(5):
                await ws.send(silence(100))
            await ws.send('{"type":"Terminate"}')
            await asyncio.sleep(0.3)
            assert not hearing.done()
            assert talk.kinds[-1] == last
        await hearing
