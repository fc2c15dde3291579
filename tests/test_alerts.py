"""Alerts and the board: every expression parses, and asks for metrics and labels that the code has."""

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Counter

from service.telemetry import Tally, metrics
from tests.test_deploy import DEPLOY

Yaml = dict[str, Any]
ALERTS: Yaml = yaml.safe_load((DEPLOY / "prometheus/turnwire-alerts.yml").read_text())
BOARD: Yaml = json.loads((DEPLOY / "grafana/turnwire.json").read_text())
OF_PROMETHEUS = {"job", "instance"}


def _known() -> dict[str, set[str]]:
    """Every series of /metrics, with its labels."""
    known: dict[str, set[str]] = {"up": set()}
    for family in metrics.registry.collect():
        known |= {sample.name: set(sample.labels) for sample in family.samples}
    for collector in metrics.registry._collector_to_names:  # also those with labels that nothing has counted yet
        if isinstance(collector, Counter | Tally):
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
