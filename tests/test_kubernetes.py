"""The Kubernetes manifests: built by kustomize, each of its schema, and held against the code and one another."""

import re
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import check_bind, check_upstream, load_settings, settings_table
from tests.engines import installed
from tests.test_deploy import CREDENTIALS, DEPLOY, STOPS_WITHIN

SETTINGS = {row.name for row in settings_table()}
Yaml = dict[str, Any]
KUBERNETES = DEPLOY / "kubernetes"
FORMS = ["base", "overlays/production", "overlays/sandbox"]
OF_KEDA = {"ScaledObject", "TriggerAuthentication"}


@pytest.fixture(scope="module", params=FORMS)
def objects(request: pytest.FixtureRequest) -> list[Yaml]:
    """What `kubectl apply -k` would send."""
    run = subprocess.run([installed("kubectl"), "kustomize", KUBERNETES / request.param],
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


def test_pods_have_time_to_drain_and_are_asked_rightly(objects: list[Yaml]) -> None:
    for name in ("turnwire-api", "turnwire-worker"):
        spec = _pods(objects)[name]["spec"]
        (container,) = spec["containers"]
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert spec["terminationGracePeriodSeconds"] >= pause + STOPS_WITHIN
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


@pytest.mark.parametrize("name", ["turnwire-api", "turnwire-worker"])
def test_a_pod_would_start_with_what_it_is_given(
    objects: list[Yaml], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The values too, combinations included, with the example's placeholders as secrets."""
    given = {("configMapRef", one["metadata"]["name"]): one["data"] for one in _of(objects, "ConfigMap")}
    given |= {("secretRef", one["metadata"]["name"]): one["stringData"] for one in SECRETS}
    monkeypatch.chdir(tmp_path)  # away from anybody's .env
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TURNWIRE_HOST", "0.0.0.0")  # the image's
    for source in _pods(objects)[name]["spec"]["containers"][0]["envFrom"]:
        ((kind, reference),) = source.items()
        for variable, value in given[kind, reference["name"]].items():
            monkeypatch.setenv(variable, value)
    settings = load_settings()
    assert settings.cluster
    check_bind(settings, stored_keys=False)
    if name == "turnwire-worker":
        check_upstream(settings)


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
