"""The query string of a session and what `UpdateConfiguration` may change in it.

Unknown names are ignored without a word, known names with bad values are fatal: that is the service's rule, and its
sharpest edge. Fields are data: one row per parameter says its kind and range; the texts are the live validator's where
they are known. https://www.assemblyai.com/docs/streaming/api-spec/streaming-websocket.md
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

US_MODELS = ("universal-streaming-english", "universal-streaming-multilingual")
SPEECH_MODELS = (
    *US_MODELS,
    "whisper-rt",
    "u3-rt-pro",
    "u3-rt-pro-beta-1",
    "u3-rt-agent",
    "universal-3-5-pro",
    "universal-3-6-pro",
    "universal-3-6",
    "universal-3-7-preview",
    "_universal-3-5-notetaker",
)
DEFAULT_MODEL = "universal-3-6-pro"
ENCODINGS = ("pcm_s16le", "pcm_mulaw", "opus", "ogg_opus", "aac")
_POLICY_NAMES = """
account_number banking_information blood_type credit_card_number credit_card_expiration credit_card_cvv date
date_interval date_of_birth drivers_license drug duration email_address event filename gender_sexuality gender
healthcare_number injury ip_address language location marital_status medical_condition medical_process
money_amount nationality number_sequence passport_number password person_age person_name phone_number
physical_attribute political_affiliation occupation organization organization_medical_facility religion
sexuality statistics time url us_social_security_number username vehicle_id zodiac_sign
"""
PII_POLICIES = frozenset(_POLICY_NAMES.split())

Validator = Callable[[str, object], Any]

MAX_TEXT = 1750
MAX_KEYTERMS = 100
MAX_LANGUAGES = 10


class ParameterError(Exception):
    """A parameter the service would refuse; the text is the whole `error` of the Error frame."""


def _refuse(name: str, detail: str) -> ParameterError:
    return ParameterError(f"User Input Validation Error: Invalid '{name}': {detail}")


def _bool(name: str, value: object) -> bool:
    # Any case: the Python SDK writes `True`, LiveKit and Pipecat write `true`.
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in {"true", "1"}:
        return True
    if isinstance(value, str) and value.lower() in {"false", "0"}:
        return False
    raise _refuse(name, "Input should be a valid boolean, unable to interpret input")


def _number(name: str, value: object, kind: type[int] | type[float], low: float, high: float) -> float:
    word = "integer" if kind is int else "number"
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        if not isinstance(value, int | float | str):
            raise TypeError
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise _refuse(
            name, f"Input should be a valid {word}, unable to parse string as a{'n' * (kind is int)} {word}"
        ) from None
    if not number >= low:
        raise _refuse(name, f"Input should be greater than or equal to {low:g}")
    if not number <= high:
        raise _refuse(name, f"Input should be less than or equal to {high:g}")
    return number


def _sample_rate(name: str, value: object) -> float:
    rate = _number(name, value, int, float("-inf"), float("inf"))
    if rate < 8000:
        raise _refuse(name, "Value error, sample_rate must be at least 8,000 Hz")
    if rate > 96000:
        raise _refuse(name, "Value error, sample_rate must be at most 96,000 Hz")
    return rate


def _choice(name: str, value: object, options: Sequence[str]) -> str:
    if value in options:
        return str(value)
    if name == "encoding":
        raise ParameterError(f"User Input Validation Error: '{value}' is not a valid Encoding")
    quoted = [f"'{option}'" for option in options]
    listing = " or ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]
    raise _refuse(name, f"Input should be {listing}")


def _text(name: str, value: object, longest: int | None = None) -> str:
    if not isinstance(value, str):
        raise _refuse(name, "Input should be a valid string")
    if longest is not None and len(value) > longest:
        raise _refuse(name, f"Value error, {name} exceeds maximum length of {longest} characters (got {len(value)})")
    return value


def _strings(name: str, value: object) -> list[str]:
    """A list is one JSON string in the query (repeated or comma-separated: refused), a real one in a message."""
    try:
        items = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise _refuse(name, "Value error, Invalid JSON array")
    return items


def _keyterms(name: str, value: object) -> list[str]:
    terms = _strings(name, value)
    if len(terms) > MAX_KEYTERMS:
        raise _refuse(name, f"Value error, Max {MAX_KEYTERMS} items")
    return terms


def _languages(name: str, value: object) -> list[str]:
    codes = _strings(name, value)
    if len(codes) > MAX_LANGUAGES:
        raise _refuse(name, f"Value error, Max {MAX_LANGUAGES} items")
    if "multi" in codes and len(codes) > 1:
        raise _refuse(name, "Value error, 'multi' must be the only item")
    for code in codes:
        if code != "multi" and not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]{2,4})?", code):
            raise _refuse(name, f"Value error, Unsupported language code '{code}'")
    return codes


def _policies(name: str, value: object) -> list[str]:
    # Documented as comma-separated, measured as a JSON array: both pass.
    names = value.split(",") if isinstance(value, str) and not value.lstrip().startswith("[") else _strings(name, value)
    for policy in names:
        if policy not in PII_POLICIES:
            raise _refuse(name, f"Value error, '{policy}' is not a valid policy")
    return names


def _object(name: str, value: object) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _refuse(name, "Value error, Invalid JSON object")
    return found


def _int(low: float, high: float) -> Validator:
    return lambda name, value: int(_number(name, value, int, low, high))


def _unit(name: str, value: object) -> float:
    return _number(name, value, float, 0, 1)


def _one_of(*options: str) -> Validator:
    return partial(_choice, options=options)


_ANY = _int(0, float("inf"))
_LONG_TEXT = partial(_text, longest=MAX_TEXT)
_FOCUS = _one_of("near-field", "far-field")

FIELDS: dict[str, Validator] = {
    "speech_model": _one_of(*SPEECH_MODELS),
    "sample_rate": lambda name, value: int(_sample_rate(name, value)),
    "encoding": _one_of(*ENCODINGS),
    "mode": _one_of("min_latency", "balanced", "max_accuracy"),
    "format_turns": _bool,
    "end_of_turn_confidence_threshold": _unit,
    "min_turn_silence": _ANY,
    "min_end_of_turn_silence_when_confident": _ANY,
    "max_turn_silence": _ANY,
    "vad_threshold": _unit,
    "interruption_delay": _int(0, 1000),
    "continuous_partials": _bool,
    "include_partial_turns": _bool,
    "keyterms_prompt": _keyterms,
    "prompt": _LONG_TEXT,
    "agent_context": _LONG_TEXT,
    "previous_context_n_turns": _int(0, 100),
    "language_codes": _languages,
    "language_code": _text,
    "language_detection": _bool,
    "speaker_labels": _bool,
    "max_speakers": _int(1, 10),
    "speaker_labels_revision_interval_ms": _ANY,
    "inactivity_timeout": _int(5, 3600),
    "session_heartbeat": _bool,
    "acknowledge_silence": _bool,
    "filter_profanity": _bool,
    "redact_pii": _bool,
    "redact_pii_policies": _policies,
    "redact_pii_sub": _one_of("hash", "entity_name"),
    "domain": _one_of("medical-v1"),
    "voice_focus": _FOCUS,
    "voice_focus_threshold": _unit,
    "noise_suppression_model": _FOCUS,
    "noise_suppression_threshold": _unit,
    "llm_gateway": _object,
    "webhook_url": _text,
    "webhook_auth_header_name": _text,
    "webhook_auth_header_value": _text,
    "customer_support_audio_capture": _bool,
}

_UPDATE_ALL = {"session_heartbeat", "keyterms_prompt", "min_turn_silence", "max_turn_silence", "filter_profanity"}
_UPDATE_US = {"end_of_turn_confidence_threshold", "format_turns"}
_UPDATE_PRO = {
    *(
        "prompt",
        "agent_context",
        "vad_threshold",
        "interruption_delay",
        "continuous_partials",
        "language_codes",
        "mode",
    ),
    "acknowledge_silence",
}


@dataclass(slots=True)
class Parameters:
    """The settings of one session; `values` holds every known one that was given."""

    values: dict[str, Any] = field(default_factory=dict)

    @property
    def speech_model(self) -> str:
        return str(self.values.get("speech_model", DEFAULT_MODEL))

    @property
    def is_pro(self) -> bool:
        return self.speech_model not in US_MODELS and self.speech_model != "whisper-rt"

    @property
    def sample_rate(self) -> int:
        return int(self.values.get("sample_rate", 16000))

    @property
    def encoding(self) -> str:
        return str(self.values.get("encoding", "pcm_s16le"))

    def on(self, name: str, default: bool = False) -> bool:
        return bool(self.values.get(name, default))

    def update(self, message: Mapping[str, Any]) -> None:
        """Take `UpdateConfiguration`; names this model cannot change are ignored, a bad value raises ParameterError."""
        allowed = _UPDATE_ALL | (_UPDATE_PRO if self.is_pro else _UPDATE_US)
        for name in allowed & message.keys():
            if message[name] is not None:
                self.values[name] = FIELDS[name](name, message[name])


def parse_query(query: str) -> Parameters:
    """Validate a query string; raises ParameterError with the text of the Error frame."""
    given: dict[str, str] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        # A list given twice is not a list (measured): join it into something that is not JSON.
        given[name] = f"{given[name]},{text}" if name == "keyterms_prompt" and name in given else text
    parameters = Parameters({name: FIELDS[name](name, text) for name, text in given.items() if name in FIELDS})
    if "prompt" in given and not parameters.is_pro:
        raise ParameterError(
            "User Input Validation Error: prompt is only supported with the 'u3-rt-pro' speech_model. "
            f"Current speech_model: {parameters.speech_model}"
        )
    for threshold, owner in (
        ("voice_focus_threshold", "voice_focus"),
        ("noise_suppression_threshold", "noise_suppression_model"),
    ):
        if threshold in given and owner not in given:
            raise _refuse(threshold, f"Value error, {threshold} requires {owner}")
    return parameters
