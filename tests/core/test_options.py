"""Options: every one accepted in its types and ranges, everything else refused with a code and a name."""

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import CallerError
from service.core.options import NAMES, Options, clean_filename, parse_options


def parse(*pairs: tuple[str, str], webhooks: bool = True) -> Options:
    return parse_options(pairs, default_model="u3-rt-pro", webhooks_enabled=webhooks)


def refused(*pairs: tuple[str, str], webhooks: bool = True) -> CallerError:
    with pytest.raises(CallerError) as caught:
        parse(*pairs, webhooks=webhooks)
    return caught.value


def test_nothing_given_shows_no_default_noise() -> None:
    options = parse()
    assert options.streaming == {"speech_model": "u3-rt-pro"}
    assert options.public() == {"speech_model": "u3-rt-pro", "chunk_ms": 100}
    assert (options.channels, options.filename, options.metadata, options.webhook_url) == ("reject", None, {}, None)
    assert options.webhook_events == ["job.canceled", "job.completed", "job.failed"]


ACCEPTED: list[tuple[str, str, Any]] = [
    ("speech_model", "universal-3-6-pro", "universal-3-6-pro"),
    ("speech_model", "_universal-3-5-notetaker", "_universal-3-5-notetaker"),
    ("format_turns", "True", True),
    ("keyterms_prompt", "Acme, Inc.", ["Acme, Inc."]),
    ("keyterms_prompt", '["a b", "c"]', ["a b", "c"]),
    ("prompt", "Transcribe [verbatim], please.", "Transcribe [verbatim], please."),
    ("language_codes", "en,pt-BR", ["en", "pt-BR"]),
    ("language_codes", '["multi"]', ["multi"]),
    ("language_detection", "false", False),
    ("speaker_labels", "true", True),
    ("max_speakers", "10", 10),
    ("min_turn_silence", "50", 50),
    ("max_turn_silence", "2560", 2560),
    ("end_of_turn_confidence_threshold", "0.4", 0.4),
    ("vad_threshold", "1", 1.0),
    ("vad_threshold", ".5", 0.5),
    ("mode", "max_accuracy", "max_accuracy"),
    ("domain", "medical-v1", "medical-v1"),
    ("filter_profanity", "true", True),
    ("redact_pii", "true", True),
    ("redact_pii_policies", "person_name, us_social_security_number", ["person_name", "us_social_security_number"]),
    ("redact_pii_sub", "entity_name", "entity_name"),
    ("continuous_partials", "FALSE", False),
    ("include_partial_turns", "true", True),
    ("voice_focus", "near-field", "near-field"),
]


@pytest.mark.parametrize(("name", "text", "value"), ACCEPTED)
def test_streaming_options_are_typed_and_shown(name: str, text: str, value: object) -> None:
    options = parse((name, text))
    assert options.streaming == {"speech_model": "u3-rt-pro", name: value}
    assert type(options.streaming[name]) is type(value)
    assert options.public() == {"chunk_ms": 100, **options.streaming}


def test_our_own_options() -> None:
    options = parse(
        ("channels", "split"),
        ("chunk_ms", "50"),
        ("filename", "C:\\calls\\one.wav"),
        ("metadata", '{"case": [1, {"a": null}]}'),
        ("webhook_url", "https://hooks.example.com/x?y=1"),
        ("webhook_events", "job.failed,job.completed"),
    )
    assert options.streaming == {"speech_model": "u3-rt-pro"}
    assert options.filename == "one.wav"
    assert options.metadata == {"case": [1, {"a": None}]}
    assert options.public() == {
        "speech_model": "u3-rt-pro",
        "chunk_ms": 50,
        "channels": "split",
        "webhook_url": "https://hooks.example.com/x?y=1",
        "webhook_events": ["job.failed", "job.completed"],
    }


def test_every_name_of_the_contract_is_known() -> None:
    assert {name for name, _, _ in ACCEPTED} | {
        "channels", "chunk_ms", "filename", "metadata", "webhook_url", "webhook_events",
    } == set(NAMES)  # fmt: skip


def test_lists_may_be_repeated() -> None:
    options = parse(("keyterms_prompt", "Acme, Inc."), ("keyterms_prompt", '["b"]'), ("language_codes", "en"))
    assert options.streaming["keyterms_prompt"] == ["Acme, Inc.", "b"]


def test_unknown_names_get_a_hint() -> None:
    error = refused(("keyterm_prompt", "x"))
    assert error.code == "unknown_option"
    assert "did you mean keyterms_prompt?" in error.detail
    assert refused(("sample_rate", "16000")).code == "unknown_option"
    assert len(refused(("x" * 9000, "1")).detail) < 200
    assert "\n" not in refused(("a\nb", "1")).detail


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("keyterms_prompt", "language_codes")])
def test_an_empty_value_is_refused(name: str) -> None:
    if name != "filename":
        assert refused((name, ""), ("webhook_url", "https://example.com")).code == "bad_option"


@pytest.mark.parametrize(
    "pair",
    [
        ("speech_model", "Best"),
        ("speech_model", "a" * 65),
        ("speech_model", "a\n"),
        ("format_turns", "yes"),
        ("keyterms_prompt", ""),
        ("keyterms_prompt", "x" * 51),
        ("keyterms_prompt", json.dumps(["a"] * 101)),
        ("keyterms_prompt", "[1]"),
        ("keyterms_prompt", "[]"),
        ("keyterms_prompt", '["\\ud800"]'),
        ("prompt", "x" * 1751),
        ("prompt", "nul\0"),
        ("prompt", "\udcff"),
        ("language_codes", "en,multi"),
        ("language_codes", "english please"),
        ("language_codes", ",".join(["en"] * 11)),
        ("max_speakers", "0"),
        ("max_speakers", "11"),
        ("max_speakers", "2.5"),
        ("max_speakers", "٣"),
        ("min_turn_silence", "49"),
        ("min_turn_silence", "10001"),
        ("max_turn_silence", "-1"),
        ("vad_threshold", "1.01"),
        ("vad_threshold", "nan"),
        ("end_of_turn_confidence_threshold", "-0.1"),
        ("mode", "fast"),
        ("domain", "legal"),
        ("redact_pii_policies", "Person Name"),
        ("redact_pii_sub", "stars"),
        ("voice_focus", "far"),
        ("channels", "2"),
        ("chunk_ms", "49"),
        ("chunk_ms", "1001"),
        ("metadata", "[]"),
        ("metadata", "{"),
        ("metadata", json.dumps({"x": "y" * 4096})),
        ("metadata", '{"a":' * 33 + "1" + "}" * 33),
        ("metadata", '{"a":' + "[" * 2000 + "]" * 2000 + "}"),
        ("metadata", '{"a": NaN}'),
        ("webhook_url", "ftp://example.com"),
        ("webhook_url", "https://user:pw@example.com"),
        ("webhook_url", "https://example.com:99999"),
        ("webhook_url", "https://[::1"),
        ("webhook_url", "https://exa mple.com"),
        ("webhook_url", "https://example.com/#x"),
        ("webhook_url", "https:///x"),
        ("webhook_events", "job.status"),
        ("webhook_events", "job.failed"),
    ],
)
def test_a_bad_value_is_refused_by_name(pair: tuple[str, str]) -> None:
    error = refused(pair)
    assert error.code == "bad_option"
    assert error.detail.startswith(f"{pair[0]}: ")
    assert len(error.detail) < 250


def test_a_single_option_given_twice_is_refused() -> None:
    error = refused(("chunk_ms", "100"), ("mode", "balanced"), ("chunk_ms", "100"))
    assert (error.code, error.detail) == ("bad_option", "chunk_ms: is given twice.")


@pytest.mark.parametrize("name", ["webhook_url", "webhook_events"])
def test_without_a_secret_there_are_no_webhooks(name: str) -> None:
    error = refused((name, "https://example.com"), webhooks=False)
    assert error.code == "bad_option"
    assert "TURNWIRE_WEBHOOK_SECRET" in error.detail


@given(st.lists(st.tuples(st.sampled_from(NAMES) | st.text(), st.text() | st.sampled_from(["1", "true", "{}", "[]"]))))
def test_anything_else_is_a_caller_error(pairs: list[tuple[str, str]]) -> None:
    codes = set()
    try:
        json.dumps(parse(*pairs).public()).encode()
    except CallerError as error:
        codes = {error.code}
    assert codes <= {"unknown_option", "bad_option"}


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("audio.wav", "audio.wav"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\x\\a.wav", "a.wav"),
        ("a/b\\c.wav", "c.wav"),
        ("\x1b[31mred.wav", "[31mred.wav"),
        ("a\r\nb\x00\x85\u2028.wav", "ab.wav"),
        ("gnp\u202evaw.exe", "gnpvaw.exe"),
        ("e\u0301.wav", "\u00e9.wav"),
        ("", "audio.wav"),
        ("dir/", "audio.wav"),
        ("..", "audio.wav"),
        (" \t ", "audio.wav"),
        ("\udcff.wav", ".wav"),
    ],
)
def test_file_names(raw: str, name: str) -> None:
    assert clean_filename(raw) == name


def test_a_name_that_is_too_long_keeps_its_suffix() -> None:
    name = clean_filename("ä" * 300 + ".wav")
    assert name.endswith("ä.wav")
    assert 250 <= len(name.encode()) <= 255


@given(st.text(max_size=400))
def test_any_name_becomes_a_clean_one(raw: str) -> None:
    name = clean_filename(raw)
    assert 1 <= len(name.encode()) <= 255
    assert not set(name) & set("/\\\r\n\x00\u202e")
    assert name == unicodedata.normalize("NFC", name)
    assert clean_filename(name) == name
