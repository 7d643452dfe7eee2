"""The alert rules that are shipped: correct, tested, about metrics that exist, and explained."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from poller.telemetry import Metrics
from tests.deploy.programs import DEPLOY, ROOT, metrics_in, promtool
from tests.deploy.published import SERIES

RULES = DEPLOY / "prometheus/poller.rules.yml"
TESTS = Path(__file__).with_name("poller.rules.test.yml")


def alerts() -> dict[str, dict[str, Any]]:
    [group] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def headings(markdown: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


def highest_bucket_s(series: str) -> float:
    """The highest bound of a histogram: no quantile of it is ever above."""
    metrics = Metrics()
    metrics.poll_duration.labels("a")
    metrics.detection_bound.labels("a")
    bounds = [
        float(sample.labels["le"])
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == series
    ]
    return max(bound for bound in bounds if bound < math.inf)


def test_promtool_accepts_the_rules() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", RULES)


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    config = (DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8")
    token = tmp_path / "token"
    token.touch()
    (tmp_path / RULES.name).write_bytes(RULES.read_bytes())
    path = tmp_path / "prometheus.yml"
    path.write_text(config.replace("/run/secrets/poller_token", str(token)), encoding="utf-8")
    assert "SUCCESS" in promtool("check", "config", path)


def test_every_alert_is_raised_when_it_should_be_and_not_before() -> None:
    assert "SUCCESS" in promtool("test", "rules", TESTS)


def test_every_alert_is_tested_raised_and_not_raised() -> None:
    silent: set[str] = set()
    raised: set[str] = set()
    for test in yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]:
        for case in test.get("alert_rule_test", []):
            (raised if "exp_alerts" in case else silent).add(case["alertname"])
    assert (silent, raised) == (set(alerts()), set(alerts()))


@pytest.mark.parametrize("name", alerts())
def test_an_alert_asks_for_metrics_that_exist(name: str) -> None:
    assert metrics_in(alerts()[name]["expr"]) <= SERIES


@pytest.mark.parametrize("name", alerts())
def test_an_alert_leads_to_its_chapter(name: str) -> None:
    page, _, anchor = alerts()[name]["annotations"]["runbook"].partition("#")
    assert anchor == name.lower()
    assert anchor in headings((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [n for n, rule in alerts().items() if "quantile" in rule["expr"]])
def test_an_alert_waits_for_nothing_that_its_histogram_cannot_tell(name: str) -> None:
    expression = alerts()[name]["expr"]
    [series] = metrics_in(expression)
    assert float(expression.rpartition(">")[2]) < highest_bucket_s(series)
