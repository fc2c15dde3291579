"""The query string: what is ignored, what is taken, and the words of each refusal."""

import json
from urllib.parse import urlencode

import pytest

from service.sandbox.parameters import ParameterError, parse_query


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("sample_rate=7999", "Invalid 'sample_rate': Value error, sample_rate must be at least 8,000 Hz"),
        ("sample_rate=96001", "Invalid 'sample_rate': Value error, sample_rate must be at most 96,000 Hz"),
        (
            "sample_rate=x",
            "Invalid 'sample_rate': Input should be a valid integer, unable to parse string as an integer",
        ),
        ("encoding=flac", "'flac' is not a valid Encoding"),
        ("format_turns=maybe", "Invalid 'format_turns': Input should be a valid boolean, unable to interpret input"),
        ("vad_threshold=1.5", "Invalid 'vad_threshold': Input should be less than or equal to 1"),
        ("vad_threshold=nan", "Invalid 'vad_threshold': Input should be greater than or equal to 0"),
        ("inactivity_timeout=4", "Invalid 'inactivity_timeout': Input should be greater than or equal to 5"),
        ("mode=fast", "Invalid 'mode': Input should be 'min_latency', 'balanced' or 'max_accuracy'"),
        ("domain=law", "Invalid 'domain': Input should be 'medical-v1'"),
        (
            urlencode({"agent_context": "x" * 1800}),
            "Invalid 'agent_context': Value error, agent_context exceeds maximum length of 1750 characters (got 1800)",
        ),
        (
            urlencode({"keyterms_prompt": json.dumps(["a"] * 101)}),
            "Invalid 'keyterms_prompt': Value error, Max 100 items",
        ),
        ("keyterms_prompt=a,b", "Invalid 'keyterms_prompt': Value error, Invalid JSON array"),
        ("keyterms_prompt=a&keyterms_prompt=b", "Invalid 'keyterms_prompt': Value error, Invalid JSON array"),
        (
            "language_codes=%5B%22multi%22%2C%22en%22%5D",
            "Invalid 'language_codes': Value error, 'multi' must be the only item",
        ),
        (
            "language_codes=%5B%22English%22%5D",
            "Invalid 'language_codes': Value error, Unsupported language code 'English'",
        ),
        (
            "redact_pii_policies=person_name,nose",
            "Invalid 'redact_pii_policies': Value error, 'nose' is not a valid policy",
        ),
        (
            "voice_focus_threshold=0.5",
            "Invalid 'voice_focus_threshold': Value error, voice_focus_threshold requires voice_focus",
        ),
        ("llm_gateway=%5B%5D", "Invalid 'llm_gateway': Value error, Invalid JSON object"),
        (
            "speech_model=whisper-rt&prompt=x",
            "prompt is only supported with the 'u3-rt-pro' speech_model. Current speech_model: whisper-rt",
        ),
    ],
)
def test_a_known_name_with_a_bad_value_is_fatal(query: str, error: str) -> None:
    with pytest.raises(ParameterError) as refused:
        parse_query(query)
    assert str(refused.value) == f"User Input Validation Error: {error}"


def test_an_unknown_model_is_refused_with_the_list() -> None:
    with pytest.raises(
        ParameterError, match="Invalid 'speech_model': Input should be 'universal-streaming-english', '"
    ):
        parse_query("speech_model=u3-pro")


def test_an_unknown_name_is_ignored_and_a_default_applies() -> None:
    parameters = parse_query("keyterms=x&samplerate=1&token=t")
    assert parameters.values == {}
    assert (parameters.speech_model, parameters.sample_rate, parameters.encoding) == (
        "universal-3-6-pro",
        16000,
        "pcm_s16le",
    )
    assert parameters.is_pro


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1"])
def test_booleans_are_of_any_case(text: str) -> None:
    assert parse_query(f"format_turns={text}").on("format_turns")
    assert not parse_query(f"format_turns={text.replace('1', '0').lower().replace('true', 'False')}").on("format_turns")


def test_what_the_sdk_sends_is_taken() -> None:
    query = (
        "vad_threshold=0.4&format_turns=True&keyterms_prompt=%5B%22a+b%22%2C+%22c%22%5D&sample_rate=16000&speech_model=u3-rt-pro"
        "&redact_pii_policies=%5B%22person_name%22%5D&language_codes=%5B%22en%22%5D"
    )
    values = parse_query(query).values
    assert values["keyterms_prompt"] == ["a b", "c"]
    assert values["vad_threshold"] == 0.4


def test_update_ignores_what_the_model_cannot_change() -> None:
    us = parse_query("speech_model=universal-streaming-english")
    us.update({"type": "UpdateConfiguration", "prompt": "x", "format_turns": True, "min_turn_silence": None})
    assert us.values == {"speech_model": "universal-streaming-english", "format_turns": True}
    with pytest.raises(ParameterError, match="Invalid JSON array"):
        us.update({"keyterms_prompt": "a"})
