"""The settings: every form that is accepted, and the one line that says what is wrong with the rest."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings, SettingsError, check_bind, check_upstream, load_settings, settings_table

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no `.env` of the machine reaches a test."""
    for name in list(os.environ):  # noqa: TID251 - the tests prepare what settings.py reads
        if name.upper().startswith(("TURNWIRE_", "ASSEMBLYAI_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def fails(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """The line that this environment stops with."""
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with pytest.raises(SettingsError) as caught:
            load_settings()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_contracts() -> None:
    settings = load_settings()
    assert settings.upstream_url == "wss://streaming.assemblyai.com/v3/ws"
    assert (settings.speech_model, settings.upstream_patience, settings.data_dir) == ("u3-rt-pro", 900, Path("data"))
    assert (settings.host, settings.port, settings.allowed_hosts, settings.cors_origins) == ("127.0.0.1", 8000, (), ())
    assert (settings.max_upload_bytes, settings.max_audio_hours) == (2**30, 12)
    assert (settings.max_streams, settings.max_queue, settings.sessions_per_minute) == (100, 1000, 0)
    assert (settings.retain_audio, settings.retain_jobs, settings.drain) == (7 * 86400, 30 * 86400, 8)
    assert settings.broker_url.get_secret_value() == "memory:"
    assert settings.log_format is None
    assert not settings.cluster


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8s", 8), ("15m", 900), ("7d", 604800), ("1h30m", 5400), ("250ms", 0.25), ("90", 90), ("0", 0)],
)
def test_durations(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    monkeypatch.setenv("TURNWIRE_DRAIN", text)
    assert load_settings().drain == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 2**30), ("500 MB", 500 * 10**6), ("4096", 4096), ("1.5KiB", 1536), ("2gb", 2 * 10**9)]
)
def test_sizes(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("TURNWIRE_MAX_UPLOAD_BYTES", text)
    assert load_settings().max_upload_bytes == size


def test_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "whsec_" + base64.b64encode(bytes(32)).decode()
    monkeypatch.setenv("TURNWIRE_ALLOWED_HOSTS", "api.Example.com, [::1]")
    monkeypatch.setenv("TURNWIRE_CORS_ORIGINS", "https://app.example.com,http://localhost:3000")
    monkeypatch.setenv("TURNWIRE_API_KEYS", f"ci:{KEY},ops:{KEY}:with:colons")
    monkeypatch.setenv("TURNWIRE_WEBHOOK_SECRET", f"{secret}, {secret}")
    monkeypatch.setenv("TURNWIRE_WEBHOOK_ALLOW", "10.0.0.0/8, fd00::/8")
    settings = load_settings()
    assert settings.allowed_hosts == ("api.example.com", "[::1]")
    assert settings.cors_origins == ("https://app.example.com", "http://localhost:3000")
    assert [(key.name, key.key.get_secret_value()) for key in settings.api_keys] == [
        ("ci", KEY),
        ("ops", f"{KEY}:with:colons"),
    ]
    assert len(settings.webhook_secret) == 2
    assert [str(network) for network in settings.webhook_allow] == ["10.0.0.0/8", "fd00::/8"]
    assert KEY not in repr(settings)
    assert secret not in repr(settings)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TURNWIRE_PORT", "TURNWIRE_API_KEYS", "TURNWIRE_AUTH", "TURNWIRE_LOG_FORMAT", "ASSEMBLYAI_API_KEY"):
        monkeypatch.setenv(name, "")
    settings = load_settings()
    assert (settings.port, settings.api_keys, settings.assemblyai_api_key) == (8000, (), None)


def test_order_is_override_then_environment_then_env_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text(f"TURNWIRE_PORT=9001\nTURNWIRE_DRAIN=1s\nUNRELATED=1\nASSEMBLYAI_API_KEY={KEY}\n")
    monkeypatch.setenv("TURNWIRE_DRAIN", "2s")
    settings = load_settings(host="::1", port=None)
    assert (settings.host, settings.port, settings.drain) == ("::1", 9001, 2)
    assert settings.assemblyai_api_key is not None
    assert settings.assemblyai_api_key.get_secret_value() == KEY
    assert load_settings(port=1).port == 1


def test_the_key_is_taken_without_a_line_break_copied_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLYAI_API_KEY", f"{KEY}\n")
    key = load_settings().assemblyai_api_key
    assert key is not None
    assert key.get_secret_value() == KEY


def test_unknown_names_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        fails(monkeypatch, TURNWIRE_MAX_STREAM="3")
        == "TURNWIRE_MAX_STREAM is no setting of Turnwire: did you mean TURNWIRE_MAX_STREAMS?"
    )
    assert "README" in fails(monkeypatch, TURNWIRE_XYZZY="3")
    assert "did you mean ASSEMBLYAI_API_KEY?" in fails(monkeypatch, TURNWIRE_ASSEMBLYAI_API_KEY=KEY)
    Path(".env").write_text("TURNWIRE_HOSTT=::1\n")
    assert "did you mean TURNWIRE_HOST?" in fails(monkeypatch)


def test_names_of_kubernetes_service_links_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    links = {
        "TURNWIRE_SERVICE_HOST": "10.0.0.1",
        "TURNWIRE_SERVICE_PORT": "8000",
        "TURNWIRE_SERVICE_PORT_HTTP": "8000",
        "TURNWIRE_PORT": "tcp://10.0.0.1:8000",
        "TURNWIRE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "TURNWIRE_PORT_8000_TCP_PROTO": "tcp",
        "TURNWIRE_PORT_8000_TCP_PORT": "8000",
        "TURNWIRE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "TURNWIRE_NATS_PORT": "tcp://10.0.0.2:4222",
        "TURNWIRE_NATS_SERVICE_HOST": "10.0.0.2",
    }
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    assert load_settings().port == 8000
    assert "TURNWIRE_NATS_PORT" in fails(monkeypatch, TURNWIRE_NATS_PORT="4222")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TURNWIRE_PORT", "eighty", "valid integer"),
        ("TURNWIRE_PORT", "70000", "65535"),
        ("TURNWIRE_DRAIN", "soon", "duration such as"),
        ("TURNWIRE_DRAIN", "-1s", "duration such as"),
        ("TURNWIRE_MAX_UPLOAD_BYTES", "1 zillion", "size such as"),
        ("TURNWIRE_MAX_AUDIO_HOURS", "nan", "finite"),
        ("TURNWIRE_MAX_STREAMS", "0", "greater than or equal to 1"),
        ("TURNWIRE_UPSTREAM_URL", "https://example.com", "ws:// or wss://"),
        ("TURNWIRE_UPSTREAM_URL", "wss://user:pw@example.com/v3/ws", "without user"),
        ("TURNWIRE_UPSTREAM_URL", "wss://example.com:99999/", "ws:// or wss://"),
        ("TURNWIRE_SPEECH_MODEL", "Best Model", "pattern"),
        ("TURNWIRE_API_KEYS", "just-a-key-of-some-length", "entry 1 should be name:key"),
        ("TURNWIRE_API_KEYS", "ci:short", "at least 16 characters"),
        ("TURNWIRE_API_KEYS", f"ci:{KEY}\u00e9", "visible ASCII"),
        ("TURNWIRE_API_KEYS", f"ci:{KEY},ci:{KEY}x", "is there twice"),
        ("TURNWIRE_API_KEYS", f"ci:{KEY},ops:{KEY}", "is there twice"),
        ("ASSEMBLYAI_API_KEY", "two words", "one word"),
        ("TURNWIRE_AUTH", "off", "'none'"),
        ("TURNWIRE_TOKEN_SECRET", "short", "at least 32"),
        ("TURNWIRE_WEBHOOK_SECRET", "hunter2", "whsec_"),
        ("TURNWIRE_WEBHOOK_SECRET", "whsec_c2hvcnQ=", "24 to 64"),
        ("TURNWIRE_WEBHOOK_ALLOW", "10.0.0.1/8", "host bits"),
        ("TURNWIRE_ALLOWED_HOSTS", "https://example.com", "host names without scheme"),
        ("TURNWIRE_CORS_ORIGINS", "*", "exact origins"),
        ("TURNWIRE_LOG_LEVEL", "loud", "'debug'"),
        ("TURNWIRE_DATABASE_URL", "mysql://db", "postgresql+asyncpg://"),
        ("TURNWIRE_BROKER_URL", "kafka://x", "nats://"),
    ],
)
def test_a_bad_value_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    line = fails(monkeypatch, **{name: value})
    assert line.startswith(f"{name}: ")
    assert expected in line


def test_no_line_repeats_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-canary"
    for name in ("API_KEYS", "TOKEN_SECRET", "WEBHOOK_SECRET", "DATABASE_URL", "BROKER_URL"):
        assert canary not in fails(monkeypatch, **{f"TURNWIRE_{name}": canary})
    assert canary not in fails(monkeypatch, TURNWIRE_API_KEYS=f"a:{canary},b:{canary}")


def test_env_file_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_bytes(b"\xff\xfe\x00")
    assert ".env" in fails(monkeypatch)


def test_the_default_may_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWIRE_BROKER_URL", "memory:")
    assert not load_settings().cluster


def test_combinations_of_cluster_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWIRE_BROKER_URL", "nats://bus")
    assert "TURNWIRE_DATABASE_URL" in fails(monkeypatch)
    monkeypatch.setenv("TURNWIRE_DATABASE_URL", "postgresql+asyncpg://u:p@db/x")
    assert "TURNWIRE_AUDIO_URL" in fails(monkeypatch)
    monkeypatch.setenv("TURNWIRE_AUDIO_URL", "s3://bucket")
    assert load_settings().cluster


def test_no_authentication_contradicts_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "contradicts" in fails(monkeypatch, TURNWIRE_AUTH="none", TURNWIRE_API_KEYS=f"ci:{KEY}")


def upstream_error(**overrides: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        check_upstream(load_settings(**overrides))
    return str(caught.value)


def test_only_streaming_asks_for_the_key() -> None:
    line = upstream_error()
    assert "ASSEMBLYAI_API_KEY" in line
    assert "--sandbox" in line
    assert "ASSEMBLYAI_API_KEY" in upstream_error(upstream_url="wss://streaming.eu.assemblyai.com/v3/ws")
    check_upstream(load_settings(upstream_url="ws://127.0.0.1:8765/v3/ws"))
    check_upstream(load_settings(upstream_url="wss://notassemblyai.com/v3/ws"))
    check_upstream(load_settings(assemblyai_api_key=KEY))


def test_the_key_never_travels_in_the_clear() -> None:
    line = upstream_error(upstream_url="ws://asr.internal/v3/ws", assemblyai_api_key=KEY)
    assert "asr.internal" in line
    assert KEY not in line
    for host in ("localhost", "127.0.0.2:99", "[::1]:8765"):
        check_upstream(load_settings(upstream_url=f"ws://{host}/v3/ws", assemblyai_api_key=KEY))


def test_without_keys_only_loopback_is_served() -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.com"):
        with pytest.raises(SettingsError, match="TURNWIRE_API_KEYS"):
            check_bind(load_settings(host=host), stored_keys=False)
        check_bind(load_settings(host=host), stored_keys=True)
        check_bind(load_settings(host=host, auth="none"), stored_keys=False)
        check_bind(load_settings(host=host, api_keys=f"ci:{KEY}"), stored_keys=False)
    check_bind(load_settings(host="localhost"), stored_keys=False)


def test_the_table_shows_every_setting_readably() -> None:
    rows = {row.name: row for row in settings_table()}
    assert len(rows) == len(Settings.model_fields)
    assert rows["TURNWIRE_UPSTREAM_PATIENCE"].default == "15m"
    assert rows["TURNWIRE_RETAIN_JOBS"].default == "30d"
    assert rows["TURNWIRE_MAX_UPLOAD_BYTES"].default == "1GiB"
    assert rows["TURNWIRE_DATA_DIR"].default == "./data"
    assert rows["ASSEMBLYAI_API_KEY"].default == "—"
    assert all(row.description for row in rows.values())
