"""What is delivered beside the code: the image, compose, NATS. Read by the tools that will read them, as far as these run
without a container engine, and held against the code. `test_kubernetes.py` and `test_alerts.py` have the rest;
`e2e/test_nginx.py` runs the proxy, `e2e/test_compose.py` the whole of compose.
"""

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nats
import pytest
import yaml
from compose_spec import PyCompose

from service.backends.nats import NatsBroker
from service.settings import Settings, settings_table
from tests.engines import installed
from tests.engines.nats import Nats

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SETTINGS = {row.name for row in settings_table()}
CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP"}
Yaml = dict[str, Any]
# Seconds a process takes to end: the drain, and a few for closing.
STOPS_WITHIN: float = Settings.model_fields["drain"].default + 5


def _seconds(text: str) -> float:
    assert re.fullmatch(r"\d+s", text), text
    return float(text[:-1])


# --- the image -------------------------------------------------------------------------------------------------------


def test_the_dockerfile_passes_its_linter() -> None:
    run = subprocess.run([installed("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


# --- compose ---------------------------------------------------------------------------------------------------------

COMPOSE: Yaml = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Yaml] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"] == "turnwire"]


def test_compose_is_what_the_specification_allows() -> None:
    PyCompose.from_yaml(yaml.safe_dump(COMPOSE)).validate()
    with pytest.raises(ValueError, match="heathcheck"):  # the check can fail
        PyCompose.from_yaml(yaml.safe_dump({"services": {"a": {"image": "a", "heathcheck": {}}}}))


def test_compose_publishes_one_port_on_loopback() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "nginx": ["127.0.0.1:8000:8080"]
    }
    assert COMPOSE["networks"]["engines"]["internal"] is True
    assert all(SERVICES[name]["networks"] == ["engines"] for name in ("postgres", "nats", "objects", "migrate"))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_of_compose_has_no_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["restart"] == ("on-failure" if name == "migrate" else "unless-stopped")
    if name in OURS:
        assert service["build"] == "."
        assert service["init"] is True
        assert _seconds(service["stop_grace_period"]) >= STOPS_WITHIN
    else:
        assert re.search(r":\d+\.\d+(\.\d+)?(-[a-z0-9.]+)?$", service["image"]), "pinned by its version"
    for mount in service.get("volumes", []):
        source = mount.partition(":")[0]
        assert (ROOT / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"], mount
    assert set(service.get("environment", {})) <= SETTINGS | CREDENTIALS | {
        "POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB", "POSTGRES_INITDB_ARGS"
    }  # fmt: skip


def test_compose_starts_everything_after_what_it_needs() -> None:
    needs = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    for name, wanted in needs.items():
        for other, how in wanted.items():
            if how["condition"] == "service_healthy":  # it has a check, of its own or the image's
                assert "healthcheck" in SERVICES[other] or other in ("api", "worker"), f"{name} waits for ever"
            else:
                assert (other, how["condition"]) == ("migrate", "service_completed_successfully")
    for name in ("api", "worker"):
        assert set(needs[name]) >= {"postgres", "nats", "objects", "migrate"}
        assert SERVICES[name]["deploy"]["replicas"] == 2
    assert set(needs["nginx"]) == {"api"}
    assert SERVICES["migrate"]["healthcheck"] == {"disable": True}


def test_the_nats_server_accepts_its_configuration(tmp_path: Path) -> None:
    assert "./deploy/nats/turnwire.conf:/etc/nats/turnwire.conf:ro" in SERVICES["nats"]["volumes"]
    text = (DEPLOY / "nats/turnwire.conf").read_text().replace("/store", str(tmp_path))
    (tmp_path / "turnwire.conf").write_text(text)
    run = subprocess.run([installed("nats-server"), "-t", "-c", tmp_path / "turnwire.conf"],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr


async def test_the_stream_for_nats_is_the_one_workers_make() -> None:
    with Nats() as server:
        async with NatsBroker(server.url):
            stream, workers = await _definitions(server.url)
    for made, file in ((stream, "jobs-stream.json"), (workers, "workers-consumer.json")):
        given = json.loads((DEPLOY / "nats" / file).read_text())
        assert {name: made.get(name) for name in given} == given
        # What the server adds by itself is its default, hence nothing.
        rest = {name: value for name, value in made.items() if name not in given and name not in ("metadata", "name")}
        assert not any(value for value in rest.values() if value != "none"), rest


async def test_a_stream_made_beforehand_is_left_as_it_is() -> None:
    given = json.loads((DEPLOY / "nats/jobs-stream.json").read_text()) | {"description": "three replicas, say"}
    with Nats() as server:
        client = await nats.connect(server.url)
        await client.request("$JS.API.STREAM.CREATE.turnwire-jobs", json.dumps(given).encode())
        await client.close()
        async with NatsBroker(server.url):
            stream, workers = await _definitions(server.url)
    assert stream["description"] == given["description"]
    assert workers["durable_name"] == "workers"


async def _definitions(url: str) -> list[Yaml]:
    """Stream and consumer as the server has them, once it has both."""
    client = await nats.connect(url)
    try:
        async with asyncio.timeout(30):
            while True:
                answers = [
                    json.loads((await client.request(f"$JS.API.{what}")).data)
                    for what in ("STREAM.INFO.turnwire-jobs", "CONSUMER.INFO.turnwire-jobs.workers")
                ]
                if all("config" in answer for answer in answers):
                    return [answer["config"] for answer in answers]
                await asyncio.sleep(0.05)
    finally:
        await client.close()


def test_the_tools_of_these_tests_are_here() -> None:
    for name in ("nginx", "curl"):
        assert shutil.which(name, path="/usr/sbin:/usr/bin:/bin:/usr/local/bin"), f"apt-get install {name}"
