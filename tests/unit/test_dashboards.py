"""Dashboards are what their code says, and can be read."""

import re
from itertools import combinations
from typing import Any

import pytest

from deploy.grafana.generate import DASHBOARDS, OUT, files
from deploy.grafana.model import COLUMNS
from tests.unit.test_alerts import exported, rules


def panels() -> list[dict[str, Any]]:
    return [
        panel for board in DASHBOARDS for panel in board.json()["panels"] if panel["type"] != "row"
    ]


def test_the_committed_files_are_what_make_dashboards_writes() -> None:
    assert {path.name: path.read_text() for path in OUT.iterdir()} == files()


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_no_panel_covers_another(board: Any) -> None:
    made = board.json()["panels"]
    assert len({panel["id"] for panel in made}) == len(made)
    places = [panel["gridPos"] for panel in made]
    assert all(place["x"] + place["w"] <= COLUMNS for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_every_panel_says_what_it_shows_and_in_what() -> None:
    for panel in panels():
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        several = len(panel["targets"]) > 1
        for target in panel["targets"]:
            assert target["legendFormat"] != "__auto" or not several, panel["title"]


def test_queries_ask_for_what_is_exported_or_recorded_and_for_chosen_workers_only() -> None:
    known = exported() | {rule["record"] for rule in rules() if "record" in rule}
    for panel in panels():
        for target in panel["targets"]:
            expr = target["expr"]
            names = set(re.findall(r"[a-z_]*:?streamrec_[a-z_:0-9]+", expr))
            assert names <= known, (panel["title"], names - known)
            assert names or "ALERTS" in expr or "process_" in expr
            assert expr.count("$job") == expr.count('job=~"'), expr
            assert "$job" in expr or "ALERTS" in expr, expr


def test_variables_are_used_and_there() -> None:
    for board in DASHBOARDS:
        text = str(board.json()["panels"])
        for variable in board.variables:
            assert f"${variable.name}" in text, variable.name
        used = set(re.findall(r"\$(\w+)", text)) - {"__rate_interval", "datasource"}
        assert used <= {variable.name for variable in board.variables}
