"""AssemblyAI's own SDK, unchanged, against the sandbox."""

import asyncio
import time
import wave
from pathlib import Path
from typing import Any

import pytest
from assemblyai.streaming.v3 import (
    BeginEvent,
    SpeechModel,
    StreamingClient,
    StreamingClientOptions,
    StreamingError,
    StreamingEvents,
    StreamingParameters,
    TerminationEvent,
    TurnEvent,
)

from service.sandbox import faults as f
from service.sandbox.app import run_sandbox
from service.sandbox.faults import FaultPlan
from service.sandbox.recogniser import NumberedWords

SAMPLE = Path(__file__).parent.parent / "samples" / "librivox_0890.wav"
SPEED = 5

# The SDK uses what websockets 17 deprecates: its business, not ours.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:ConnectionClosed\.(code|reason) is deprecated:DeprecationWarning"),
]


def stream(port: int, parameters: StreamingParameters) -> dict[str, list[Any]]:
    """Stream the sample as the vendor's example does; runs in a thread."""
    heard: dict[str, list[Any]] = {event.name: [] for event in StreamingEvents}
    client = StreamingClient(StreamingClientOptions(api_key="k", api_host=f"ws://127.0.0.1:{port}"))
    for event in StreamingEvents:
        client.on(event, lambda _, said, name=event.name: heard[name].append(said))
    client.connect(parameters)
    with wave.open(str(SAMPLE)) as audio:
        while chunk := audio.readframes(1600):
            client.stream(chunk)  # the tail is short and goes unpadded, as in the vendor's example
            time.sleep(0.1 / SPEED)
    client.disconnect(terminate=True)
    return heard


@pytest.mark.parametrize("model", [SpeechModel.u3_rt_pro, SpeechModel.universal_streaming_english])
async def test_the_sdk_streams_a_file(model: SpeechModel) -> None:
    async with run_sandbox(recogniser=NumberedWords, speed=SPEED) as sandbox:
        given = {"sample_rate": 16000, "speech_model": model, "format_turns": True, "keyterms_prompt": ["a b", "c"]}
        # model_validate: its field without a default confuses mypy, which knows nothing of pydantic here.
        parameters = StreamingParameters.model_validate(given)
        heard = await asyncio.to_thread(stream, sandbox.port, parameters)
        await sandbox.settled()
        assert sandbox.sessions[0].ended_by == "terminated"
    assert heard["Error"] == []
    (begin,), (termination,) = heard["Begin"], heard["Termination"]
    assert isinstance(begin, BeginEvent)
    assert begin.configuration is not None
    assert begin.configuration.model == "sandbox"
    assert isinstance(termination, TerminationEvent)
    assert termination.audio_duration_seconds == 5
    turns = heard["Turn"]
    assert all(isinstance(turn, TurnEvent) for turn in turns)
    assert any(not turn.end_of_turn for turn in turns)
    formatted = [turn.transcript for turn in turns if turn.end_of_turn and turn.turn_is_formatted]
    assert formatted == ["One two three four five six seven eight.", "Nine ten eleven twelve thirteen."]
    pro = model is SpeechModel.u3_rt_pro
    assert len(heard["SpeechStarted"]) == (2 if pro else 0)
    assert len([turn for turn in turns if turn.end_of_turn]) == (2 if pro else 4)


@pytest.mark.parametrize(
    ("step", "code"),
    [(f.ErrorFrame(name="bad_key"), 1008), (f.Refuse(status=403), 403), (f.Close(code=3005, at_ms=500), 3005)],
)
async def test_the_sdk_reports_planned_failures(step: f.Step, code: int) -> None:
    async with run_sandbox(recogniser=NumberedWords, speed=SPEED, faults=FaultPlan({"*": [step]})) as sandbox:
        heard = await asyncio.to_thread(
            stream, sandbox.port, StreamingParameters.model_validate({"sample_rate": 16000})
        )
    (error,) = heard["Error"]
    assert isinstance(error, StreamingError)
    assert error.code == code
