"""Alerts and dashboard: they ask for metrics that there are, and every alert is shown to fire and is explained."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cairn.cli.metrics_dashboard import render
from cairn.cli.metrics_docs import VLLM_LABELS, inventory

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
TESTS = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
#: Of every sample that Prometheus has scraped.
TARGET = {"job", "instance"}


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no `promtool`: apt-get install prometheus"
)


def promtool(*arguments: str | Path) -> None:
    ran = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@cache
def series() -> dict[str, set[str]]:
    """Every name that a query can have, with the labels of its samples as Prometheus shows them."""
    found: dict[str, set[str]] = {}
    for process, metrics in inventory().items():
        for one in metrics:
            own = {f"exported_{label}" if label in TARGET else label for label in one.labels}
            for name in one.series:
                known = found.setdefault(name, set(TARGET))
                known |= own | ({"le"} if name.endswith("_bucket") else set())
                known |= set(VLLM_LABELS) if process == "engine" else set()
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """(where it stands, PromQL)."""
    for rule in (rule for group in RULES["groups"] for rule in group["rules"]):
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in json.loads(render())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@needs_promtool
def test_promtool_finds_the_rules_right_and_every_alert_fires() -> None:
    promtool("check", "rules", "alerts.yaml")
    promtool("test", "rules", "alerts_test.yaml")


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    cases: list[dict[str, Any]] = [case for test in TESTS for case in test["alert_rule_test"]]
    named = {rule["alert"] for rule in ALERTS}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == named
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == named


@pytest.mark.parametrize("told", sorted({one["series"] for test in TESTS for one in test["input_series"]}))
def test_what_the_cases_are_made_of_is_there(told: str) -> None:
    """An alert that fires on series which no process exports would say nothing."""
    name, _, labels = told.partition("{")
    assert {*re.findall(r"(\w+)=", labels)} <= series()[name]


@needs_promtool
def test_a_case_that_expects_wrongly_fails(tmp_path: Path) -> None:
    """promtool is not one that passes whatever is in the file."""
    told = (
        (PROMETHEUS / "alerts_test.yaml")
        .read_text()
        .replace("tier: remote}\n            exp_annotations", "tier: x}\n            exp_annotations")
    )
    (tmp_path / "alerts_test.yaml").write_text(told)
    (tmp_path / "alerts.yaml").write_text((PROMETHEUS / "alerts.yaml").read_text())
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", tmp_path / "alerts_test.yaml")


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_an_expression_asks_for_what_there_is(where: str, expression: str) -> None:
    """Names, labels that it chooses by, and labels that it groups by."""
    known, asked = series(), re.findall(r"(?<![\w:])(cairn_\w+)", expression)
    recorded = re.findall(r"\w+:\w+:\w+", expression)
    assert asked or recorded
    assert {*recorded} <= RECORDED
    assert {*asked} <= known.keys()
    labels = set.intersection(*(known[name] for name in asked)) if asked else TARGET
    chosen = [matcher for part in re.findall(r"\{([^}]*)\}", expression) for matcher in re.findall(r"(\w+)\s*=", part)]
    grouped = [label for part in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in re.findall(r"\w+", part)]
    assert {*chosen, *grouped} <= labels | {"le"}


@needs_promtool
def test_the_dashboards_expressions_are_promql(tmp_path: Path) -> None:
    """promtool reads rules, so each becomes one."""
    rules = [
        {"record": f"a:b{i}", "expr": expression.replace("$__rate_interval", "5m")}
        for i, (_, expression) in enumerate(expressions())
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "rules.yaml")


def test_the_committed_dashboard_is_the_one_that_is_made() -> None:
    assert (ROOT / "deploy" / "grafana" / "cairn.json").read_text() == render(), "make docs"
    panels = json.loads(render())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    assert re.findall(r"^### (Cairn\w+)", page, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


def test_every_metric_that_the_design_names_is_there() -> None:
    known = series()
    wanted = {
        "cairn_hit_tokens_total": "tier",
        "cairn_miss_tokens_total": "reason",
        "cairn_transfer_bytes_total": "tier",
        "cairn_transfer_seconds_total": "direction",
        "cairn_compression_ratio": "tier",
        "cairn_decompression_duration_seconds_bucket": "tier",
        "cairn_blend_hits_total": "unit",
        "cairn_blend_lookups_total": "unit",
        "cairn_layerwise_load_latency_seconds_bucket": "le",
        "cairn_tier_batches_under_way": "tier",
        "cairn_tier_write_queue_blocks": "tier",
        "cairn_tier_evicted_blocks_total": "tier",
        "cairn_tier_breaker_open": "tier",
        "cairn_serve_ttft_seconds_bucket": "le",
        "cairn_serve_tpot_seconds_bucket": "le",
        "cairn_serve_waiting": "job",
    }
    assert {name: label for name, label in wanted.items() if label not in known.get(name, ())} == {}
