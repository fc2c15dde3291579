"""Every setting of the service, checked at the start. FLOOR 1, the only reader of the environment.

`load_settings` reads the environment and `.env`, and stops with one clear line at the first thing wrong: an unknown
name, a value out of form, a combination that cannot work. What only serving needs is asked
by `check_upstream` and `check_bind`, so that `turnwire migrate` and `keys` run without an AssemblyAI key. Durations are
seconds, sizes bytes. No message repeats a secret.
"""

import base64
import contextlib
import difflib
import ipaddress
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "TURNWIRE_"


class SettingsError(Exception):
    """The service cannot start as configured; the text is one line naming the variable and what to do."""


# --- the form of single values ---------------------------------------------------------------------------------------

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SIZES = {"": 1, "b": 1} | {
    f"{p}{b}": base**n for n, p in enumerate("kmgt", 1) for b, base in (("b", 1000), ("ib", 1024))
}
_DURATION_PART = r"(\d+(?:\.\d+)?)(ms|[smhdw])"


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if re.fullmatch(f"(?:{_DURATION_PART})+", text):
        return math.fsum(float(number) * _UNITS[unit] for number, unit in re.findall(_DURATION_PART, text))
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    raise ValueError("should be a duration such as 8s, 15m, 12h or 7d")


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if match is None or match[2] not in _SIZES:
        raise ValueError("should be a number of bytes, or a size such as 500MB or 1GiB")
    return int(float(match[1]) * _SIZES[match[2]]) if "." in match[1] else int(match[1]) * _SIZES[match[2]]


def _list_of(parse: Callable[[str], object], form: str) -> BeforeValidator:
    """Comma-separated items; `parse` raises ValueError for one that is not of the `form` described."""

    def split(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return tuple(parse(item) for item in map(str.strip, value.split(",")) if item)
        except ValueError:
            raise ValueError(f"should be {form}, comma-separated") from None

    return BeforeValidator(split)


def _matching(pattern: str) -> Callable[[str], str]:
    def parse(item: str) -> str:
        if not re.fullmatch(pattern, item, re.IGNORECASE):
            raise ValueError
        return item.lower()

    return parse


def _webhook_secret(item: str) -> SecretStr:
    """Standard Webhooks. https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md"""
    secret = base64.b64decode(item.removeprefix("whsec_"), validate=True)
    if not item.startswith("whsec_") or not 24 <= len(secret) <= 64:
        raise ValueError
    return SecretStr(item)


class ApiKey(NamedTuple):
    """A key from the environment; `name` owns the jobs made with it."""

    name: str
    key: SecretStr


def _assemblyai_key(value: SecretStr | None) -> SecretStr | None:
    """It becomes a header as it is; a line break copied along with it would break every connection."""
    if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value().strip()):
        raise ValueError("should be one word of visible ASCII characters")
    return SecretStr(value.get_secret_value().strip()) if value is not None else None


def _api_keys(value: object) -> object:
    if not isinstance(value, str):
        return value
    keys: dict[str, str] = {}
    for number, item in enumerate(filter(str.strip, value.split(","))):
        name, _, key = (part.strip() for part in item.partition(":"))
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or not key:
            raise ValueError(f"entry {number + 1} should be name:key, the name of letters, digits, '.', '_' and '-'")
        if not re.fullmatch(r"[\x21-\x7e]{16,}", key):
            raise ValueError(f"the key of '{name}' should have at least 16 characters, visible ASCII only")
        if name in keys or key in keys.values():
            raise ValueError(f"'{name}' or its key is there twice; each name has one key of its own")
        keys[name] = key
    return tuple(ApiKey(name, SecretStr(key)) for name, key in keys.items())


def _websocket_url(value: str) -> str:
    with contextlib.suppress(ValueError):  # of a bad port or IPv6 address
        url = urlsplit(value)
        plain = not (url.username or url.query or url.fragment)
        if plain and url.scheme in ("ws", "wss") and url.hostname and url.port != 0:
            return value
    raise ValueError("should be a ws:// or wss:// URL without user, query or fragment")


def _url_of(*schemes: str) -> AfterValidator:
    def check(value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().startswith(schemes):
            raise ValueError(f"should start with {' or '.join(schemes)}")
        return value

    return AfterValidator(check)


Duration = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]
Size = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_HOST = r"([a-z0-9.-]+|\[[0-9a-f:.]+\])"
HostNames = Annotated[tuple[str, ...], _list_of(_matching(_HOST), "host names without scheme, port or path")]
Origins = Annotated[
    tuple[str, ...],
    _list_of(_matching(f"https?://{_HOST}(:[0-9]{{1,5}})?"), "exact origins such as https://app.example.com"),
]
Networks = Annotated[
    tuple[Network, ...], _list_of(ipaddress.ip_network, "networks such as 10.0.0.0/8 or fd00::/8, no host bits set")
]
WebhookSecrets = Annotated[
    tuple[SecretStr, ...], _list_of(_webhook_secret, "whsec_ followed by base64 of 24 to 64 random bytes")
]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lambda value: str(value).lower())]


# --- the settings ----------------------------------------------------------------------------------------------------


def _setting(default: Any, description: str, *, shown: str = "", **bounds: Any) -> Any:  # noqa: ANN401 - like Field itself
    """A field; `shown` replaces the default in the table where the value itself would tell nothing."""
    return Field(default, description=description, json_schema_extra={"shown": shown}, **bounds)


class Settings(BaseSettings):
    """The whole configuration, immutable. Make it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, enable_decoding=False,
        validate_by_name=True, validate_by_alias=True, extra="ignore", frozen=True, hide_input_in_errors=True,
    )  # fmt: skip

    # fmt: off
    assemblyai_api_key: Annotated[SecretStr | None, AfterValidator(_assemblyai_key)] = _setting(
        None, "required when the upstream host is AssemblyAI's; others get it if set; never by `ws://` off loopback",
        validation_alias="ASSEMBLYAI_API_KEY")
    upstream_url: Annotated[str, AfterValidator(_websocket_url)] = _setting(
        "wss://streaming.assemblyai.com/v3/ws", "EU, self-hosted, sandbox: only this changes")
    speech_model: str = _setting("u3-rt-pro", "the model of jobs that name none", pattern=r"^[a-z0-9._-]{1,64}$")
    upstream_patience: Duration = _setting(
        900.0, "how long an upstream outage is waited out without progress before `upstream_unavailable`", shown="15m")
    data_dir: Path = _setting(
        Path("data"), "embedded mode: SQLite database and audio files; one process at a time", shown="./data")
    database_url: Annotated[SecretStr | None, _url_of("postgresql+asyncpg://")] = _setting(
        None, "`postgresql+asyncpg://…`", shown="SQLite in the data directory")
    broker_url: Annotated[SecretStr, _url_of("memory:", "nats://", "tls://")] = _setting(
        SecretStr("memory:"), "`nats://…` or `tls://…` = cluster mode", shown="memory:")
    audio_url: Annotated[SecretStr | None, _url_of("s3://", "gs://", "az://")] = _setting(
        None, "`s3://bucket/prefix`, `gs://…`, `az://…`", shown="files in the data directory")
    host: str = _setting(
        "127.0.0.1", "address to listen on; any but loopback needs API keys or `TURNWIRE_AUTH=none`", min_length=1)
    port: int = _setting(8000, "port to listen on", ge=0, le=65535)
    allowed_hosts: HostNames = _setting((), "`Host` names served beside loopback's")
    cors_origins: Origins = _setting((), "exact origins whose pages may call")
    max_upload_bytes: Size = _setting(2**30, "largest upload", shown="1GiB")
    max_audio_hours: float = _setting(12, "longest audio", gt=0, allow_inf_nan=False)
    max_streams: int = _setting(100, "upstream sessions at once", ge=1)
    max_queue: int = _setting(1000, "jobs waiting at most; further uploads are answered 429", ge=1)
    sessions_per_minute: int = _setting(
        0, "new upstream sessions per minute, of all processes on a database together; 0 = no limit of ours", ge=0)
    retain_audio: Duration = _setting(7 * 86400.0, "how long the audio of an ended job is kept", shown="7d")
    retain_jobs: Duration = _setting(30 * 86400.0, "how long an ended job is kept", shown="30d")
    api_keys: Annotated[tuple[ApiKey, ...], BeforeValidator(_api_keys)] = _setting(
        (), "`name:key,name2:key2`, keys of at least 16 characters")
    auth: Literal["none"] | None = _setting(None, "`none` = whoever reaches the port may call")
    token_secret: SecretStr | None = _setting(
        None, "signs the tokens of `POST /jobs/{id}/token`; at least 32 characters",
        shown="made and kept in the database", min_length=32)
    webhook_secret: WebhookSecrets = _setting(
        (), "`whsec_…`, comma-separated for rotation; webhook options are 422 without it")
    webhook_allow: Networks = _setting((), "CIDRs webhooks may call beside public addresses; plain http only there")
    drain: Duration = _setting(8.0, "how long a stopping process lets its work end", shown="8s")
    log_format: Literal["json", "console"] | None = _setting(
        None, "`json` or `console`", shown="json when not a terminal")
    log_level: LogLevel = _setting("info", "`debug`, `info`, `warning` or `error`")
    # fmt: on

    @property
    def cluster(self) -> bool:
        """Whether workers are processes of their own."""
        return not self.broker_url.get_secret_value().startswith("memory:")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - given by pydantic-settings, as is file_secret_settings
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment before `.env`, both without names that are not ours; an unknown TURNWIRE_ name stops here."""
        for source in (env_settings, dotenv_settings):
            assert isinstance(source, EnvSettingsSource)
            source.env_vars = {n: value for n, value in source.env_vars.items() if not _service_link(n, value or "")}
            for name in source.env_vars:
                _must_be_known(name.upper())
        return init_settings, env_settings, dotenv_settings


def _service_link(name: str, value: str) -> bool:
    """Names that Kubernetes injects for services called `turnwire…`.

    https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
    """
    always = r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
    pattern = f"(PORT|{always})" if re.match("(tcp|udp|sctp)://", value) else always
    return re.fullmatch(rf"TURNWIRE_(\w+_)?{pattern}", name.upper()) is not None


def _variable(field: str) -> str:
    alias = Settings.model_fields[field].validation_alias if field in Settings.model_fields else field
    return alias if isinstance(alias, str) else PREFIX + field.upper()


def _must_be_known(name: str) -> None:
    known = {_variable(field).removeprefix(PREFIX): _variable(field) for field in Settings.model_fields}
    if name.startswith(PREFIX) and name not in known.values():
        close = difflib.get_close_matches(name.removeprefix(PREFIX), known, 1)
        hint = f"did you mean {known[close[0]]}?" if close else "unset it; the README lists all settings"
        raise SettingsError(f"{name} is no setting of Turnwire: {hint}")


# --- loading and checking --------------------------------------------------------------------------------------------


def load_settings(**overrides: Any) -> Settings:  # noqa: ANN401 - any field's value
    """Read and check the settings; raises `SettingsError`. `overrides` (by field; None: not given) win."""
    given = {field: value for field, value in overrides.items() if value is not None}
    assert given.keys() <= Settings.model_fields.keys()
    try:
        settings = Settings(**given)
    except ValidationError as exc:
        problem = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        text = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise SettingsError(f"{_variable(str(problem['loc'][0]))}: {text[:1].lower()}{text[1:]}") from None
    except UnicodeDecodeError:
        raise SettingsError(".env is not UTF-8 text; save it as UTF-8 or remove it") from None
    _check_combinations(settings)
    return settings


def _check_combinations(settings: Settings) -> None:
    if settings.cluster and settings.database_url is None:
        raise SettingsError("TURNWIRE_BROKER_URL: cluster mode needs a shared database; set TURNWIRE_DATABASE_URL")
    if settings.cluster and settings.audio_url is None:
        raise SettingsError("TURNWIRE_BROKER_URL: cluster mode needs a shared audio store; set TURNWIRE_AUDIO_URL")
    if settings.auth == "none" and settings.api_keys:
        raise SettingsError("TURNWIRE_AUTH=none contradicts TURNWIRE_API_KEYS; unset one of them")


def check_upstream(settings: Settings) -> None:
    """What streaming needs beyond well-formed settings; raises `SettingsError`."""
    url = urlsplit(settings.upstream_url)
    host = (url.hostname or "").rstrip(".")
    if settings.assemblyai_api_key is None and (host == "assemblyai.com" or host.endswith(".assemblyai.com")):
        raise SettingsError(
            "ASSEMBLYAI_API_KEY is not set: set it to stream to AssemblyAI, or work offline with --sandbox"
        )
    if settings.assemblyai_api_key is not None and url.scheme == "ws" and not is_loopback(host):
        problem = f"ASSEMBLYAI_API_KEY is never sent unencrypted to {host}; use wss://, or unset ASSEMBLYAI_API_KEY"
        raise SettingsError(f"TURNWIRE_UPSTREAM_URL: {problem}")


def check_bind(settings: Settings, *, stored_keys: bool) -> None:
    """What listening needs; `stored_keys`: whether the database holds an API key. Raises `SettingsError`."""
    if stored_keys and settings.auth == "none":
        raise SettingsError("TURNWIRE_AUTH=none contradicts stored API keys; unset it, or `turnwire keys revoke` them")
    if not (stored_keys or settings.api_keys or settings.auth == "none" or is_loopback(settings.host)):
        raise SettingsError(
            f"TURNWIRE_HOST: without API keys only loopback is served, not {settings.host}; "
            "set TURNWIRE_API_KEYS, run `turnwire keys create`, or set TURNWIRE_AUTH=none"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


# --- the table of the README -----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One setting as documented."""

    name: str
    default: str
    description: str


def settings_table() -> list[Row]:
    """Every setting, in order of declaration."""
    rows = []
    for field, info in Settings.model_fields.items():
        assert isinstance(info.json_schema_extra, dict)
        default = "—" if info.default in (None, ()) else str(info.default)
        rows.append(Row(_variable(field), str(info.json_schema_extra["shown"]) or default, info.description or ""))
    return rows
