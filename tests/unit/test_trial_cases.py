"""Canaries of `python -m benchmarks trials`: spoiled as meant, and what is read of their trials."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from benchmarks.spoil import copied, off_by_one, permuted, slowed
from benchmarks.trials import CASES, Outcome, live_quality, served_between, trials_table
from tests.conftest import ITEMS, tiny_bundle
from worker.bundle import Bundle, open_bundle
from worker.events import Surface
from worker.ranking import Origin, Recommendations

HISTORIES = np.array([[0, 0, 0, 0, 0, 1, 2, 3], [0, 0, 9, 8, 7, 6, 5, 4]])
BEGAN = datetime(2026, 11, 27, 6, 0, tzinfo=UTC)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "v1")


def names(bundle: Bundle) -> list[list[str]]:
    items, _ = bundle.score(HISTORIES, 5)
    return [[bundle.items[at - 1] for at in row] for row in items.tolist()]


def test_a_copy_answers_the_same_under_another_version(source: Path, tmp_path: Path) -> None:
    copy = open_bundle(copied(source, tmp_path / "v2"))
    assert names(copy) == names(open_bundle(source))
    assert (copy.manifest.version, copy.manifest.parents) == ("v2", ["v1"])


def test_an_item_map_off_by_one_names_each_item_by_the_next(source: Path, tmp_path: Path) -> None:
    shifted = open_bundle(copied(source, tmp_path / "v2", off_by_one))
    following = dict(zip(ITEMS, (*ITEMS[1:], ITEMS[0]), strict=True))
    expected = [[following[item] for item in row] for row in names(open_bundle(source))]
    assert names(shifted) == expected


def test_permuted_rows_change_the_answers_and_not_the_catalogue(
    source: Path, tmp_path: Path
) -> None:
    spoiled = open_bundle(copied(source, tmp_path / "v2", permuted))
    assert names(spoiled) != names(open_bundle(source))
    assert spoiled.items == ITEMS


def test_a_slowed_copy_has_more_nodes_and_the_same_scores(source: Path, tmp_path: Path) -> None:
    slow = copied(source, tmp_path / "v2", slowed(50))
    for ours, theirs in zip(
        open_bundle(slow).score(HISTORIES, 5), open_bundle(source).score(HISTORIES, 5), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert (slow / "model.onnx").stat().st_size > (source / "model.onnx").stat().st_size


def made(user: str, after_s: float) -> Recommendations:
    at = BEGAN + timedelta(seconds=after_s)
    return Recommendations(
        user,
        Surface.POSTS,
        [],
        [],
        "posts@v",
        "model",
        int(at.timestamp() * 1000),
        Origin("events", 0, 0),
    )


def test_lists_count_from_the_canarys_start_to_the_decision() -> None:
    lists = [made("before", -1), made("during", 1), made("after", 3)]
    within = served_between(lists, BEGAN, BEGAN + timedelta(seconds=2))
    assert [one.user_id for one in within] == ["during"]
    undecided = served_between(lists, BEGAN, None)
    assert [one.user_id for one in undecided] == ["during", "after"]


def test_quality_is_read_only_while_a_canary_is_judged() -> None:
    def sample(role: str, bound: str, value: float) -> tuple[str, dict[str, str], float]:
        return "streamrec_live_quality", {"role": role, "figure": "mrr", "bound": bound}, value

    stable = [sample("stable", "low", 0.1), ("streamrec_events_total", {}, 5.0)]
    assert live_quality(stable) == {}
    assert live_quality([*stable, sample("canary", "low", 0.2)]) == {
        "stable": {"mrr": {"low": 0.1}},
        "canary": {"mrr": {"low": 0.2}},
    }


def test_the_table_shows_the_decision_and_what_was_lost() -> None:
    outcome = Outcome(
        "permuted", "spoiled", 0.2, action="rollback", reason="gate: quality", seconds=3.25,
        events=4000, users=5, users_in_all=20, sent=100, applied=97, dead_letters=1,
        figures={"events": 400.0, "latencies": 9.0, "latency_ratio": 1.5},
    )  # fmt: skip
    head, row = trials_table([outcome])
    shown = dict(zip(head, row, strict=True))
    assert shown["decision"] == "rollback: quality"
    assert shown["users who saw it"] == "5 of 20 (25%)"
    assert (shown["lost"], shown["dead letters"], shown["latency ratio"]) == ("2", "1", "1.50")


def test_a_trial_without_a_decision_says_so() -> None:
    head, row = trials_table([Outcome("good", "int8", 0.05)])
    assert dict(zip(head, row, strict=True))["decision"] == "none"


def test_only_good_canaries_are_unchanged_and_whole() -> None:
    for name, case in CASES.items():
        assert case.good == (case.change is None and not case.damaged), name
