"""The rules of a session, over real sockets: opening, turns of both families, controls, limits, what is recorded."""

import asyncio
import json
import time
import uuid
from urllib.parse import urlencode

import pytest

from service.sandbox.app import Sandbox, run_sandbox
from service.sandbox.recogniser import NumberedWords
from tests.sandbox.client import PRO, US, Talk, assert_ends_well, converse, dial, listen, silence

REASON = "See Error message for details"


async def test_a_pro_session_tells_rewritten_partials_and_one_formatted_final(sandbox: Sandbox) -> None:
    talk = await converse(sandbox.url, silence(4000))
    assert_ends_well(talk)
    begin = talk.messages[0]
    assert uuid.UUID(begin["id"])
    assert isinstance(begin["expires_at"], int)
    assert begin["configuration"] == {
        "model": "sandbox",
        "mode": "balanced",
        "api_version": "2025-05-12",
        "speaker_labels": False,
        "redact_pii": False,
        "filter_profanity": False,
        "domain": None,
        "voice_focus": None,
    }
    assert [turn["transcript"] for turn in talk.finals] == ["One two three four five six seven eight.", "Nine ten."]
    assert [turn["turn_order"] for turn in talk.finals] == [0, 1]
    assert talk.kinds[1:3] == ["SpeechStarted", "Turn"]
    assert talk.of("SpeechStarted")[1]["timestamp"] == 3200
    for turn in talk.partials:
        assert turn["utterance"] == ""
        assert not any(word["word_is_final"] for word in turn["words"])
    for turn in talk.finals:
        assert turn["turn_is_formatted"]
        assert turn["utterance"] == turn["transcript"] == " ".join(word["text"] for word in turn["words"]).capitalize()
        assert all(word["word_is_final"] for word in turn["words"])
    assert talk.messages[-1] == {"type": "Termination", "audio_duration_seconds": 4, "session_duration_seconds": 3}


async def test_a_us_session_tells_growing_words_a_twin_and_an_empty_last_turn(sandbox: Sandbox) -> None:
    talk = await converse(sandbox.url, silence(3200), f"{US}&format_turns=True")
    assert_ends_well(talk)
    assert talk.messages[0]["configuration"]["mode"] is None
    assert talk.of("SpeechStarted") == []
    partials = [turn["transcript"] for turn in talk.partials]
    assert partials[:3] == ["", "one", "one two"]
    assert [word["word_is_final"] for word in talk.partials[2]["words"]] == [True, True, False]
    plain, twin, empty = talk.finals
    assert (plain["transcript"], plain["turn_is_formatted"]) == ("one two three four five six seven eight", False)
    assert (twin["transcript"], twin["turn_is_formatted"]) == ("One two three four five six seven eight.", True)
    assert twin["turn_order"] == plain["turn_order"] == 0
    assert twin["utterance"] == ""
    assert (empty["transcript"], empty["words"], empty["turn_order"]) == ("", [], 1)


async def test_us_without_format_turns_or_without_the_pair_ends_each_turn_once(sandbox: Sandbox) -> None:
    talk = await converse(sandbox.url, silence(2000), US)
    assert [turn["transcript"] for turn in talk.finals] == ["one two three four five"]
    async with run_sandbox(recogniser=NumberedWords, speed=20, double_finals=False) as modern:
        talk = await converse(modern.url, silence(2000), f"{US}&format_turns=true")
    assert [(turn["transcript"], turn["turn_is_formatted"]) for turn in talk.finals] == [
        ("One two three four five.", True)
    ]


async def test_partials_can_be_switched_off_and_slowed(sandbox: Sandbox) -> None:
    assert (await converse(sandbox.url, silence(3200), f"{PRO}&include_partial_turns=false")).partials == []
    fast = await converse(sandbox.url, silence(3200))
    slow = await converse(sandbox.url, silence(3200), f"{PRO}&continuous_partials=false")
    assert len(fast.partials) == 3
    assert len(slow.partials) == 1


async def test_labels_and_language_come_when_asked_for(sandbox: Sandbox) -> None:
    talk = await converse(sandbox.url, silence(4000), f"{PRO}&speaker_labels=true&language_detection=true")
    assert [turn["speaker_label"] for turn in talk.finals] == ["PENDING", "A"]
    assert {word["speaker"] for word in talk.finals[1]["words"]} == {"A"}
    assert talk.finals[0]["language_code"] == "en"
    assert talk.kinds[-2:] == ["SpeakerRevision", "Termination"]
    (revision,) = talk.of("SpeakerRevision")[0]["revisions"]
    assert (revision["turn_order"], revision["speaker_label"]) == (0, "A")
    assert {word["speaker"] for word in revision["words"]} == {"A"}


async def test_force_endpoint_ends_the_open_turn_and_keepalive_is_silent(sandbox: Sandbox) -> None:
    talk = await converse(
        sandbox.url, silence(1200), after=('{"type":"KeepAlive"}', '{"type":"ForceEndpoint"}', '{"type":"Terminate"}')
    )
    assert_ends_well(talk)
    assert [turn["transcript"] for turn in talk.finals] == ["One two three."]
    assert [kind for _, kind in sandbox.sessions[0].controls] == ["KeepAlive", "ForceEndpoint", "Terminate"]


async def test_update_configuration_takes_effect_or_is_fatal(sandbox: Sandbox) -> None:
    update = json.dumps(
        {"continuous_partials": False, "unknown": 1, "keyterms_prompt": ["a"], "type": "UpdateConfiguration"}
    )
    talk = await converse(sandbox.url, silence(3200), before=(update,))
    assert_ends_well(talk)
    assert len(talk.partials) == 1
    talk = await converse(sandbox.url, before=(json.dumps({"type": "UpdateConfiguration", "prompt": "x" * 1751}),))
    assert talk.error[0] == talk.code == 3006
    assert "prompt exceeds maximum length of 1750 characters (got 1751)" in talk.error[1]
    assert "Termination" not in talk.kinds


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{x", "Invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"type":"Bogus"}', "Invalid Message Type: Bogus"),
        ("[]", "Invalid Message: []"),
        ("[" * 30000, "Invalid JSON: "),
    ],
)
async def test_a_bad_text_frame_is_fatal(sandbox: Sandbox, text: str, error: str) -> None:
    talk = await converse(sandbox.url, before=(text,), after=())
    assert talk.error[0] == talk.code == 3006
    assert talk.error[1].startswith(error)
    assert talk.reason == REASON
    assert talk.messages[-1]["type"] == "Error"


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([100, 49], None),
        ([100, 49, 100, 20, 100], None),
        ([50, 1000], None),
        ([100, 20, 20], "Input Duration Error: Input Duration Violation: 20.0 ms. Expected between 50 and 1000 ms"),
        ([1001], "Input Duration Error: Input Duration Violation: 1001.0 ms. Expected between 50 and 1000 ms"),
    ],
)
async def test_chunks_are_50_to_1000_ms_but_for_one_short_one(
    sandbox: Sandbox, chunks: list[int], error: str | None
) -> None:
    talk = Talk()
    async with dial(sandbox.url) as ws:
        for ms in chunks:
            await ws.send(silence(ms))
        await ws.send('{"type":"Terminate"}')
        await listen(ws, talk)
    if error is None:
        assert_ends_well(talk)
    else:
        assert (talk.code, talk.error) == (3007, (3007, error))


async def test_durations_follow_the_declared_rate_and_encoding(sandbox: Sandbox) -> None:
    assert_ends_well(await converse(sandbox.url, silence(1000, 8000), f"{PRO}&sample_rate=8000", chunk=800))
    talk = await converse(sandbox.url, silence(1000, 8000), f"{PRO}&sample_rate=16000", chunk=800)
    assert "25.0 ms" in talk.error[1]
    mulaw = await converse(sandbox.url, b"\xff" * 8000, f"{PRO}&sample_rate=8000&encoding=pcm_mulaw", chunk=800)
    assert_ends_well(mulaw)
    assert mulaw.finals[0]["transcript"] == "One two."
    assert (await converse(sandbox.url, silence(100), f"{PRO}&encoding=opus")).error[0] == 3006


async def test_a_message_above_128_kb_is_closed_with_1009(sandbox: Sandbox) -> None:
    talk = await converse(sandbox.url, b"\0" * 128_002, f"{PRO}&sample_rate=96000", chunk=128_002)
    assert talk.code == 1009


async def test_a_hasty_client_is_throttled_and_a_reckless_one_is_cut() -> None:
    async with run_sandbox(recogniser=NumberedWords, speed=50) as sandbox:
        started = time.monotonic()
        talk = await converse(sandbox.url, silence(25_000), chunk=32_000)
        assert_ends_well(talk)
        # 25 s of audio at 1.25 times real time, fifty times as fast: 0.4 s, though all was sent at once.
        assert time.monotonic() - started > 0.38
        talk = await converse(sandbox.url, silence(400_000, 8000), f"{PRO}&sample_rate=8000", chunk=16_000)
        assert talk.code == 3007
        assert talk.error[1].startswith("Input Duration Error: Audio Transmission Rate Exceeded: Received 3")


async def test_audio_before_begin_is_heard(sandbox: Sandbox) -> None:
    async with dial(sandbox.url) as ws:
        for _ in range(4):
            await ws.send(silence(100))  # sent before anything is read
        talk = Talk()
        await ws.send('{"type":"Terminate"}')
        await listen(ws, talk)
    assert talk.finals[0]["transcript"] == "One."


async def test_inactivity_ends_a_session_and_keepalive_prevents_it() -> None:
    async with run_sandbox(recogniser=NumberedWords, speed=20) as sandbox:
        talk = await converse(sandbox.url, query=f"{PRO}&inactivity_timeout=5", after=())
        assert talk.error == (3006, "Session terminated due to inactivity: No messages received for 5 seconds")
        talk = Talk()
        async with dial(sandbox.url, f"{PRO}&inactivity_timeout=10") as ws:
            for _ in range(5):
                await ws.send('{"type":"KeepAlive"}')
                await asyncio.sleep(0.2)
            await ws.send('{"type":"Terminate"}')
            await listen(ws, talk)
        assert_ends_well(talk)


async def test_heartbeats_come_every_five_seconds_when_asked_for(sandbox: Sandbox) -> None:
    talk = await converse(sandbox.url, silence(12_000), f"{PRO}&session_heartbeat=true", pace=0.005)
    beats = talk.of("Heartbeat")
    assert len(beats) >= 2
    assert beats[0]["total_audio_received_ms"] > 0
    assert set(beats[0]) == {
        *("type", "total_audio_received_ms", "total_duration_ms", "realtime_factor", "max_speech_probability"),
    }


async def test_long_queries_pass(sandbox: Sandbox) -> None:
    query = urlencode({"prompt": "я" * 1750, "token": "t" * 2500, "keyterms_prompt": json.dumps(["ключ" * 10] * 100)})
    talk = await converse(sandbox.url, query=f"{PRO}&{query}")
    assert_ends_well(talk)
