"""Alerts are tested, and say what to do. tests/integration/test_prometheus.py has them fire."""

import re
from pathlib import Path
from typing import Any

import yaml

from worker.metrics import Metrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus"


def rules() -> list[dict[str, Any]]:
    files = (yaml.safe_load((RULES / name).read_text()) for name in ("rules.yml", "alerts.yml"))
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def exported() -> set[str]:
    """Names of the series of a worker's own metrics."""
    ends = "", "_total", "_bucket", "_count", "_sum"
    return {family.name + end for family in Metrics().registry.collect() for end in ends}


def test_every_alert_is_seen_to_fire_in_a_test() -> None:
    cases = "".join((RULES / name).read_text() for name in ("tests.yml", "tests_days.yml"))
    assert [name for name in alerts() if f'alertname="{name}"' not in cases] == []


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    text = (ROOT / "docs" / "runbooks.md").read_text()
    sections = re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == list(alerts())
    for name, section in sections:
        for part in ("Means", "Users feel", "Look", "Causes", "Do", "Escalate"):
            assert re.search(part, section, re.IGNORECASE), f"{name} does not say: {part}"


def test_every_alert_says_what_where_and_how_bad() -> None:
    for name, alert in alerts().items():
        assert alert["labels"]["severity"] in ("page", "ticket"), name
        notes = alert["annotations"]
        assert notes.keys() == {"summary", "description", "runbook_url"}, name
        assert notes["runbook_url"] == f"docs/runbooks.md#{name.lower()}"


def test_rules_ask_for_metrics_and_labels_that_there_are() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        names = set(re.findall(r"[a-z_]*:?streamrec_[a-z_:0-9]+", rule["expr"]))
        assert names or "process_start" in rule["expr"]
        assert names <= exported() | recorded, rule


def test_the_name_of_a_recording_rule_begins_with_the_labels_that_it_leaves() -> None:
    for rule in rules():
        if "record" in rule:
            level, metric, operations = rule["record"].split(":")
            left = re.search(r"by \(([^)]+)\)", rule["expr"])
            if left is not None:
                assert level == left[1].removesuffix(", le").replace(", ", "_")
            assert metric.startswith("streamrec_") and operations
