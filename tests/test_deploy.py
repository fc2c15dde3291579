"""What is delivered beside the code: compose, Kubernetes, NATS, Prometheus, Grafana. Read by the tools that will read
them, as far as these run without a container engine, and held against the code. `tests/e2e/test_nginx.py` runs the proxy,
`tests/e2e/test_compose.py` the whole of compose.
"""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from compose_spec import PyCompose
from prometheus_client import Counter

from service.settings import load_settings, settings_table
from service.telemetry import metrics

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SETTINGS = {row.name for row in settings_table()}
CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP"}
Yaml = dict[str, Any]


def _tool(name: str) -> Path:
    """A program that a package of the tests has installed beside their interpreter."""
    path = Path(sys.executable).with_name(name)
    assert path.exists(), f"{name} is missing: pip install -e '.[dev]'"
    return path


def _seconds(text: str) -> float:
    assert re.fullmatch(r"\d+s", text), text
    return float(text[:-1])


@pytest.fixture(scope="module")
def drain() -> float:
    """Seconds a process takes to stop, a few for closing included."""
    return load_settings(upstream_url="ws://127.0.0.1:1/v3/ws").drain + 5


# --- the image -------------------------------------------------------------------------------------------------------


def test_the_dockerfile_passes_its_linter() -> None:
    run = subprocess.run([_tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
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
def test_a_service_of_compose_has_no_more_than_it_needs(name: str, drain: float) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["restart"] == ("on-failure" if name == "migrate" else "unless-stopped")
    if name in OURS:
        assert service["build"] == "."
        assert service["init"] is True
        assert _seconds(service["stop_grace_period"]) >= drain
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
    run = subprocess.run([_tool("nats-server"), "-t", "-c", tmp_path / "turnwire.conf"],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr


# --- Kubernetes ------------------------------------------------------------------------------------------------------

KUBERNETES = DEPLOY / "kubernetes"
FORMS = ["base", "overlays/production", "overlays/sandbox"]
OF_KEDA = {"ScaledObject", "TriggerAuthentication"}


@pytest.fixture(scope="module", params=FORMS)
def objects(request: pytest.FixtureRequest) -> list[Yaml]:
    """What `kubectl apply -k` would send."""
    run = subprocess.run([_tool("kubectl"), "kustomize", KUBERNETES / request.param],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    return list(yaml.safe_load_all(run.stdout))


def _of(objects: list[Yaml], *kinds: str) -> Iterator[Yaml]:
    return (one for one in objects if one["kind"] in kinds)


def _pods(objects: list[Yaml]) -> dict[str, Yaml]:
    return {one["metadata"]["name"]: one["spec"]["template"] for one in _of(objects, "Deployment", "Job")}


def test_every_object_is_of_its_schema(objects: list[Yaml]) -> None:
    for one in objects:
        assert one["metadata"].get("namespace", one["metadata"]["name"]) == "turnwire"
        if one["kind"] not in OF_KEDA:
            kubernetes_validate.validate(one, "1.37", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):  # the check can fail
        kubernetes_validate.validate({**next(_of(objects, "Deployment")), "spce": {}}, "1.37", strict=True)


def test_pods_are_hardened_and_alike(objects: list[Yaml]) -> None:
    pods = _pods(objects)
    assert len({pod["spec"]["containers"][0]["image"] for pod in pods.values()}) == 1
    for name, pod in pods.items():
        spec = pod["spec"]
        (container,) = spec["containers"]
        assert spec["enableServiceLinks"] is False, name
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert {"requests", "limits"} <= container["resources"].keys()
        assert not re.search(r":latest$|^[^:]+$", container["image"])


def test_pods_have_time_to_drain_and_are_asked_rightly(objects: list[Yaml], drain: float) -> None:
    for name in ("turnwire-api", "turnwire-worker"):
        spec = _pods(objects)[name]["spec"]
        (container,) = spec["containers"]
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert spec["terminationGracePeriodSeconds"] >= pause + drain
        paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")]
        assert paths == ["/healthz", "/healthz", "/readyz"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"http": 8000}  # TURNWIRE_PORT's default: nothing sets another
        assert all(
            container[f"{kind}Probe"]["httpGet"]["port"] == "http" for kind in ("startup", "liveness", "readiness")
        )


def test_whatever_names_another_finds_it(objects: list[Yaml]) -> None:
    pods = _pods(objects)
    labels = [pod["metadata"]["labels"] for pod in pods.values()]
    ports = {port["name"] for pod in pods.values() for port in pod["spec"]["containers"][0].get("ports", [])}
    names = {(one["kind"], one["metadata"]["name"]) for one in objects}
    for one in _of(objects, "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = one["spec"]
        selector = spec.get("selector", spec.get("podSelector"))
        wanted = selector.get("matchLabels", {}) if one["kind"] != "Service" else selector
        assert any(wanted.items() <= found.items() for found in labels), one["metadata"]["name"]
        for port in spec.get("ports", []):
            assert port["targetPort"] in ports
        for rule in spec.get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= ports
    for one in _of(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = one["spec"]["scaleTargetRef"]
        assert ("Deployment", target["name"]) in names
        deployment = next(d for d in _of(objects, "Deployment") if d["metadata"]["name"] == target["name"])
        assert "replicas" not in deployment["spec"], "an apply would undo the scaler"
    example = {secret["metadata"]["name"] for secret in SECRETS}
    for pod in pods.values():
        for source in pod["spec"]["containers"][0].get("envFrom", []):
            if "configMapRef" in source:
                assert ("ConfigMap", source["configMapRef"]["name"]) in names
            else:
                assert source["secretRef"]["name"] in example


SECRETS: list[Yaml] = list(yaml.safe_load_all((KUBERNETES / "base/secrets.example.yaml").read_text()))


def test_settings_are_known_and_no_secret_is_here(objects: list[Yaml]) -> None:
    assert not list(_of(objects, "Secret"))
    named = {name for one in _of(objects, "ConfigMap") for name in one["data"]}
    secret = {name: value for one in SECRETS for name, value in one["stringData"].items()}
    assert named | secret.keys() - {"connection"} <= SETTINGS | CREDENTIALS
    assert all("REPLACE" in value for value in secret.values())
    for one in SECRETS:
        kubernetes_validate.validate(one, "1.37", strict=True)


def test_only_the_worker_gets_the_key_that_costs_money(objects: list[Yaml]) -> None:
    for name, pod in _pods(objects).items():
        sources = pod["spec"]["containers"][0].get("envFrom", [])
        secrets = {source["secretRef"]["name"] for source in sources if "secretRef" in source}
        sandboxed = any(one["metadata"]["name"] == "turnwire-sandbox" for one in objects)
        assert ("turnwire-worker" in secrets) is (name == "turnwire-worker" and not sandboxed)


def test_the_scaler_asks_what_the_schema_can_answer(migrated: Path) -> None:
    documents = list(yaml.safe_load_all((KUBERNETES / "overlays/production/workers.yaml").read_text()))
    scaled, authentication = documents
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    (reference,) = authentication["spec"]["secretTargetRef"]
    secret = next(one for one in SECRETS if one["metadata"]["name"] == reference["name"])
    assert reference["key"] in secret["stringData"]
    with sqlite3.connect(migrated) as database:  # the schema is one for both databases
        assert database.execute(trigger["metadata"]["query"]).fetchone() == (0,)
    base = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())
    literals = next(one["literals"] for one in base["configMapGenerator"] if one["name"] == "turnwire-worker")
    streams = next(int(one.partition("=")[2]) for one in literals if one.startswith("TURNWIRE_MAX_STREAMS="))
    assert int(trigger["metadata"]["targetQueryValue"]) < streams
    status = set(re.findall(r"'(\w+)'", trigger["metadata"]["query"]))
    assert status == {"queued", "processing"}


# --- Prometheus and Grafana ------------------------------------------------------------------------------------------

ALERTS: Yaml = yaml.safe_load((DEPLOY / "prometheus/turnwire-alerts.yml").read_text())
BOARD: Yaml = json.loads((DEPLOY / "grafana/turnwire.json").read_text())
OF_PROMETHEUS = {"job", "instance"}


def _known() -> dict[str, set[str]]:
    """Every series of /metrics, with its labels."""
    known: dict[str, set[str]] = {"up": set()}
    for family in metrics.registry.collect():
        known |= {sample.name: set(sample.labels) for sample in family.samples}
    for collector in metrics.registry._collector_to_names:  # also those with labels that nothing has counted yet
        if isinstance(collector, Counter):
            known[f"{collector._name}_total"] = set(collector._labelnames)
    return known


def _selectors(expression: Any) -> Iterator[Any]:
    """Every vector selector of a parsed expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
        inner = getattr(expression, name, None)
        for one in inner if isinstance(inner, list) else [inner]:
            if one is not None and not isinstance(one, str):
                yield from _selectors(one)


def _rules() -> Iterator[tuple[str, str]]:
    for rule in ALERTS["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m").replace("$__range", "1h")
            yield panel["title"], expression.replace("$job", "turnwire-api")


@pytest.mark.parametrize(("title", "expression"), list(_rules()))
def test_every_expression_asks_for_what_is_there(title: str, expression: str) -> None:
    known = _known()
    selectors = list(_selectors(promql_parser.parse(expression)))
    named = re.findall(r"\b(?:turnwire|process)_\w+|\bup\b", expression)
    assert [one.name for one in selectors] == named, "none is overlooked"
    allowed = set.union(OF_PROMETHEUS, *(known[one.name] for one in selectors))
    for one in selectors:
        asked = {matcher.name for matcher in one.matchers.matchers}
        assert asked <= known[one.name] | OF_PROMETHEUS, f"{title}: {one.name} has no such label"
    for group in re.findall(r"\b(?:by|on) \(([\w, ]*)\)", expression):
        assert {name.strip() for name in group.split(",") if name.strip()} <= allowed


def test_every_metric_of_ours_is_on_the_board_and_every_alert_in_the_runbook() -> None:
    shown = {name for _, expression in _rules() for name in re.findall(r"\bturnwire_\w+", expression)}
    ours = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in _known() if name.startswith("turnwire_")}
    assert {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown} == ours
    runbook = (DEPLOY / "README.md").read_text()
    for rule in ALERTS["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert f"`{rule['alert']}`" in runbook, rule["alert"]
        legends = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert legends <= OF_PROMETHEUS | {"result", "kind"}


def test_prometheus_finds_the_rules_and_the_pods(objects: list[Yaml]) -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus/scrape.yml").read_text())
    assert [(DEPLOY / "prometheus" / name).exists() for name in scrape["rule_files"]] == [True]
    (job,) = scrape["scrape_configs"]
    keep = next(rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep")
    found = {
        name
        for name, pod in _pods(objects).items()
        for port in pod["spec"]["containers"][0].get("ports", [])
        if re.fullmatch(keep, f"{pod['metadata']['labels']['app.kubernetes.io/name']};{port['name']}")
    }
    assert found == {"turnwire-api", "turnwire-worker"}


def test_the_tools_of_these_tests_are_here() -> None:
    for name in ("nginx", "curl"):
        assert shutil.which(name, path="/usr/sbin:/usr/bin:/bin:/usr/local/bin"), f"apt-get install {name}"
