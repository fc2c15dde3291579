"""The options of `POST /jobs`: from form fields and query parameters to checked, typed values. FLOOR 0.

The tables below are exhaustive: another name is `unknown_option`, a value out of type or range `bad_option`, both
before any audio is sent, because AssemblyAI ignores misspelt names silently and ends the session at a bad value.
Ranges: https://www.assemblyai.com/docs/streaming/api-spec/streaming-websocket (state of November 2026). Names of
models, languages and redaction policies are checked by form only; such lists age.
"""

import difflib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from service.core.errors import CallerError
from service.core.job import TERMINAL_EVENTS
from service.core.protocol import MAX_CHUNK_MS, MIN_CHUNK_MS

DEFAULT_CHUNK_MS = 100
DEFAULT_FILENAME = "audio.wav"
_MAX_METADATA_BYTES, _MAX_METADATA_DEPTH = 4096, 32
_MAX_FILENAME_BYTES = 255


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What one upload asked for. `streaming` goes upstream as it is; `given` are the names that the caller chose."""

    streaming: dict[str, Any]
    channels: str = "reject"
    chunk_ms: int = DEFAULT_CHUNK_MS
    filename: str | None = None
    metadata: dict[str, Any] = {}
    webhook_url: str | None = None
    webhook_events: list[str] = msgspec.field(default_factory=lambda: sorted(TERMINAL_EVENTS))
    given: list[str] = []

    def public(self) -> dict[str, Any]:
        """The job's `options`: model and chunk length always, the rest when given.

        File name and metadata are members of the job itself.
        """
        ours: dict[str, Any] = {
            "channels": self.channels,
            "webhook_url": self.webhook_url,
            "webhook_events": self.webhook_events,
        }
        shown = {name: value for name, value in ours.items() if name in self.given}
        return {**self.streaming, "chunk_ms": self.chunk_ms, **shown}


# --- one value -------------------------------------------------------------------------------------------------------
# Each parser takes the text and returns the value, or raises ValueError with what it should be.


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("should be true or false")
    return text.lower() == "true"


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"should be a whole number from {low} to {high}")
        return int(text)

    return parse


def _fraction(text: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or float(text) > 1:
        raise ValueError("should be a number from 0 to 1")
    return float(text)


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"should be {' or '.join(choices)}")
        return text

    return parse


def _matching(pattern: str, form: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"should be {form}")
        return text

    return parse


def _text(most: int) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not 1 <= len(text) <= most:
            raise ValueError(f"should have 1 to {most} characters, not {len(text)}")
        return text

    return parse


def _metadata(text: str) -> dict[str, Any]:
    if len(text.encode()) > _MAX_METADATA_BYTES:
        raise ValueError(f"should be at most {_MAX_METADATA_BYTES} bytes of JSON")
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise ValueError("should be a JSON object") from None
    if _depth(value) > _MAX_METADATA_DEPTH:
        raise ValueError(f"should be nested at most {_MAX_METADATA_DEPTH} deep")
    return value


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [member for v in level for member in (v.values() if isinstance(v, dict) else v)]
    return depth


def _webhook_url(text: str) -> str:
    """Form only: whether the address may be called is decided when it is called."""
    try:
        url = urlsplit(text)
        sound = bool(url.hostname) and url.port != 0 and not url.username and not url.fragment
    except ValueError:
        sound = False
    if not sound or url.scheme not in ("http", "https") or not re.fullmatch(r"[\x21-\x7e]{1,2048}", text):
        raise ValueError("should be an https URL of at most 2048 characters, without user or fragment")
    return text


# --- lists -----------------------------------------------------------------------------------------------------------


def _list(parse: Callable[[str], str], most: int, *, commas: bool = True) -> Callable[[Sequence[str]], list[str]]:
    """A JSON list, repeated values or (`commas`) comma-separated ones, in any mixture."""

    def parse_all(texts: Sequence[str]) -> list[str]:
        items = [parse(item) for text in texts for item in _items(text, commas=commas)]
        if not 1 <= len(items) <= most:
            raise ValueError(f"should be 1 to {most} values, not {len(items)}")
        return items

    return parse_all


def _items(text: str, *, commas: bool) -> list[str]:
    if text.lstrip().startswith("["):
        try:
            return msgspec.json.decode(text, type=list[str])
        except (msgspec.DecodeError, UnicodeError):
            raise ValueError("should be a JSON list of strings") from None
    return [part.strip() for part in text.split(",")] if commas else [text]


def _languages(texts: Sequence[str]) -> list[str]:
    code = _matching(r"[A-Za-z]{2,3}([_-][A-Za-z0-9]{2,8})*|multi", "language codes such as en or pt-BR")
    codes = _list(code, 10)(texts)
    if "multi" in codes and len(codes) > 1:
        raise ValueError("'multi' should stand alone")
    return codes


# --- file names ------------------------------------------------------------------------------------------------------

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean_filename(raw: str) -> str:
    """A name for display only (storage goes by job id): NFC, last path segment, no controls, at most 255 bytes."""
    name = unicodedata.normalize("NFC", "".join(c for c in raw if not _control(c)))
    name = re.split(r"[/\\]", name)[-1].strip()
    if name in ("", ".", ".."):
        return DEFAULT_FILENAME
    stem, dot, suffix = name.rpartition(".")
    if stem and len(suffix) <= 16:  # a name that is too long keeps what tells its type
        return _cut(stem, _MAX_FILENAME_BYTES - len((dot + suffix).encode())) + dot + suffix
    return _cut(name, _MAX_FILENAME_BYTES)


def _control(character: str) -> bool:
    return character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore").strip()


# --- the table -------------------------------------------------------------------------------------------------------

_STREAMING: dict[str, Callable[[str], Any]] = {
    "speech_model": _matching(r"[a-z0-9._-]{1,64}", "a model name such as u3-rt-pro: a-z, 0-9, '.', '_' and '-'"),
    "format_turns": _boolean,
    "prompt": _text(1750),
    "language_detection": _boolean,
    "speaker_labels": _boolean,
    "max_speakers": _integer(1, 10),
    "min_turn_silence": _integer(50, 10_000),
    "max_turn_silence": _integer(0, 999_999_999),
    "end_of_turn_confidence_threshold": _fraction,
    "vad_threshold": _fraction,
    "mode": _one_of("min_latency", "balanced", "max_accuracy"),
    "domain": _one_of("medical-v1"),
    "filter_profanity": _boolean,
    "redact_pii": _boolean,
    "redact_pii_sub": _one_of("hash", "entity_name"),
    "continuous_partials": _boolean,
    "include_partial_turns": _boolean,
    "voice_focus": _one_of("near-field", "far-field"),
}
_STREAMING_LISTS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "keyterms_prompt": _list(_text(50), 100, commas=False),  # a term may hold a comma
    "language_codes": _languages,
    "redact_pii_policies": _list(_matching(r"[a-z0-9_]{1,64}", "policy names such as person_name"), 100),
}
_OURS: dict[str, Callable[[str], Any]] = {
    "channels": _one_of("reject", "mix", "first", "split"),
    "chunk_ms": _integer(MIN_CHUNK_MS, MAX_CHUNK_MS),
    "filename": clean_filename,
    "metadata": _metadata,
    "webhook_url": _webhook_url,
}
_OUR_LISTS = {"webhook_events": _list(_one_of(*sorted(TERMINAL_EVENTS)), len(TERMINAL_EVENTS))}
_SINGLE, _LISTS = _STREAMING | _OURS, _STREAMING_LISTS | _OUR_LISTS
NAMES = (*_STREAMING, *_STREAMING_LISTS, *_OURS, *_OUR_LISTS)


def parse_options(pairs: Sequence[tuple[str, str]], *, default_model: str, webhooks_enabled: bool) -> Options:
    """Check every pair; raises `CallerError` for the first that is wrong, in the order given."""
    texts: dict[str, list[str]] = {}
    for name, text in pairs:
        if name not in NAMES:
            raise CallerError("unknown_option", _unknown(name))
        texts.setdefault(name, []).append(text)
    if not webhooks_enabled and ("webhook_url" in texts or "webhook_events" in texts):
        raise _bad("webhook_url", "this server sends no webhooks: it has no TURNWIRE_WEBHOOK_SECRET")
    if "webhook_events" in texts and "webhook_url" not in texts:
        raise _bad("webhook_events", "needs webhook_url")
    values = {name: _value(name, given) for name, given in texts.items()}
    streaming = {name: values[name] for name in (*_STREAMING, *_STREAMING_LISTS) if name in values}
    ours = {name: value for name, value in values.items() if name not in streaming}
    return Options(streaming={"speech_model": default_model} | streaming, given=list(values), **ours)


def _value(name: str, texts: Sequence[str]) -> Any:  # noqa: ANN401 - each option has a type of its own
    try:
        for text in texts:
            if "\0" in text or not _encodable(text):
                raise ValueError("should be UTF-8 text without NUL")
        if name in _LISTS:
            return _LISTS[name](texts)
        if len(texts) > 1:
            raise ValueError("is given twice")
        return _SINGLE[name](texts[0])
    except ValueError as exc:
        raise _bad(name, str(exc)) from None


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _bad(name: str, problem: str) -> CallerError:
    return CallerError("bad_option", f"{name}: {problem}.")


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name[:64], NAMES, 1)
    return f"There is no option {name[:64]!r}" + (
        f"; did you mean {close[0]}?" if close else "; /docs lists all options."
    )


def upstream_options(public: Mapping[str, Any]) -> dict[str, Any]:
    """Of a job's `options`, those that AssemblyAI is handed."""
    return {name: value for name, value in public.items() if name in _STREAMING or name in _STREAMING_LISTS}
