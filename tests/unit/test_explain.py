"""Influences on models whose every score is known, and the text that people read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from models.explanations import MIN_HISTORY, agreement
from tests.conftest import ITEMS, tiny_bundle, tiny_model
from worker import explain as module
from worker.bundle import Bundle, open_bundle
from worker.explain import (
    NO_ITEM,
    NOT_A_CANDIDATE,
    NOT_IN_CATALOGUE,
    ONE_ITEM,
    explain,
    leave_one_out,
)
from worker.manifest import Manifest
from worker.readable import as_text

#: Scores float64 `[item_count]` of one unpadded history of model indexes.
Scorer = Callable[[list[int]], NDArray[np.float64]]


class FakeSession:
    """A model of any score function, with the contract of docs/bundle.md."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.batches: list[list[list[int]]] = []

    def run(self, _: object, inputs: dict[str, NDArray[np.int64]]) -> list[Any]:
        histories = [[item for item in row if item] for row in inputs["history"].tolist()]
        for row, history in zip(inputs["history"].tolist(), histories, strict=True):
            assert history, "the contract promises no score after an empty history"
            assert row[len(row) - len(history) :] == history, "padding is on the left"
        self.batches.append(histories)
        scores = np.array([self.scorer(history) for history in histories], dtype=np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : int(inputs["k"][0])]
        return [order + 1, np.take_along_axis(scores, order, axis=1)]


class LimitedManifest(Manifest, frozen=True, kw_only=True):
    """A manifest of a graph that returns no more than `max_k` items."""

    limit: int = 0

    @property
    def max_k(self) -> int:
        return self.limit


def fake(scorer: Scorer, items: tuple[str, ...] = ITEMS, length: int = 8, max_k: int = 0) -> Bundle:
    manifest = (LimitedManifest if max_k else Manifest)(
        format_version=1,
        name="posts",
        version="v1",
        surface="posts",
        created_at="2026-11-24T10:00:00+00:00",
        precision="fp32",
        recipe="a function",
        max_length=length,
        item_count=len(items),
        inputs=[],
        outputs=[],
        files={},
        **({"limit": max_k} if max_k else {}),
    )
    return Bundle(manifest, Path(), cast(Any, FakeSession(scorer)), items)


def sums(seed: int = 0, ignored: int = 0) -> Scorer:
    """A history's score of an item is the sum of one number for each history item."""
    weights = np.random.default_rng(seed).normal(size=(len(ITEMS) + 1, len(ITEMS)))
    weights[ignored] = 0.0
    return lambda history: weights[history].sum(axis=0)


def by_age(history: list[int]) -> NDArray[np.float64]:
    """Each history item adds one over its age to the item of the same index."""
    scores = np.zeros(len(ITEMS))
    for age, item in enumerate(reversed(history), start=1):
        scores[item - 1] += 1.0 / age
    return scores


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(tiny_bundle(tmp_path_factory.mktemp("tiny") / "v1"))


def tiny_table() -> NDArray[np.float32]:
    model = onnx.load_from_string(tiny_model())
    return numpy_helper.to_array(next(w for w in model.graph.initializer if w.name == "table"))


histories = st.lists(st.sampled_from(ITEMS), min_size=2, max_size=12)


@given(histories, st.sampled_from(ITEMS))
def test_for_a_mean_of_vectors_the_influence_is_the_product_of_both_items_vectors(
    tiny: Bundle, history: list[str], item: str
) -> None:
    table, index = tiny_table(), tiny.index
    (found,) = explain(tiny, history, [item])
    read = history[-8:]
    expected = [table[index[seen]] @ table[index[item]] / 8 for seen in read]
    assert [one.item for one in found.influences] == read
    assert [one.value for one in found.influences] == pytest.approx(expected, abs=1e-5)
    assert found.score == pytest.approx(sum(expected), abs=1e-5)
    assert found.base == pytest.approx(expected[-1], abs=1e-5)


@given(histories, st.integers(1, len(ITEMS)), st.integers(0, 3))
def test_an_item_that_the_model_ignores_has_no_influence(
    history: list[str], ignored: int, seed: int
) -> None:
    bundle = fake(sums(seed, ignored), length=12)
    for found in explain(bundle, history, ITEMS):
        for one in found.influences:
            assert (abs(one.value) < 1e-5) == (one.item == ITEMS[ignored - 1])


@given(histories)
def test_shares_are_parts_of_one_whole(history: list[str]) -> None:
    for found in explain(fake(sums()), history, ITEMS[:3]):
        assert sum(one.share for one in found.influences) == pytest.approx(1.0)


def test_the_gap_closes_so_older_items_come_nearer() -> None:
    # Without the newest item, `item-1` is the newest: its own score rises from 1/2 to 1.
    (found,) = explain(fake(by_age), ["item-1", "item-2"], ["item-1"])
    assert [one.value for one in found.influences] == pytest.approx([0.5, -0.5])
    assert [one.recency for one in found.influences] == [2, 1]


def test_no_older_item_moves_into_the_gap() -> None:
    bundle = fake(sums(), length=3)
    explain(bundle, list(ITEMS[:5]), [ITEMS[9]])
    assert cast(Any, bundle.session).batches == [[[3, 4, 5], [5], [4, 5], [3, 5], [3, 4]]]


def test_a_repeated_item_is_removed_one_position_at_a_time() -> None:
    (found,) = explain(fake(by_age), ["item-1", "item-2", "item-1"], ["item-1"])
    # Without the older: 4/3 to 1. Without the newer: the older one is second, 4/3 to 1/2.
    assert [one.value for one in found.influences] == pytest.approx([1 / 3, -1 / 6, 5 / 6])
    assert [one.recency for one in found.raised(3)] == [1, 3]
    assert [one.recency for one in found.lowered(1)] == [2]


def test_history_items_that_the_model_does_not_know_are_passed_over() -> None:
    (found,) = explain(fake(sums()), ["item-1", "new", "item-2", "new"], ["item-5"])
    assert [(one.item, one.recency) for one in found.influences] == [("item-1", 4), ("item-2", 2)]


def test_what_has_no_explanation_says_why() -> None:
    bundle = fake(sums())
    assert [one.note for one in explain(bundle, ["new"], ["item-1"])] == [NO_ITEM]
    assert [one.note for one in explain(bundle, ["item-2"], ["item-1"])] == [ONE_ITEM]
    found = explain(bundle, ["item-2", "item-3"], ["new", "item-1"])
    assert [(one.item, one.note) for one in found] == [("new", NOT_IN_CATALOGUE), ("item-1", None)]


def test_an_item_that_drops_out_of_a_limited_graphs_candidates_is_not_explained() -> None:
    def scorer(history: list[int]) -> NDArray[np.float64]:
        return by_age(history) + 10.0 * (np.arange(len(ITEMS)) == 4)

    history = ["item-1", "item-2", "item-3"]
    kept, dropped = explain(fake(scorer, max_k=3), history, ["item-5", "item-2"])
    assert kept.note is None and len(kept.influences) == 3
    # The candidates are items 5, 3 and 2; without item-2, items 5, 3 and 1.
    assert dropped.note == NOT_A_CANDIDATE and not dropped.influences
    assert dropped.score == pytest.approx(1 / 2)
    assert [one.note for one in explain(fake(scorer), history, ["item-5", "item-2"])] == [None] * 2


def test_a_large_catalogue_is_explained_in_runs_that_each_score_the_whole_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history, items = np.arange(1, 9), np.arange(10, 20)
    one_run = leave_one_out(fake(sums()), history, items)
    monkeypatch.setattr(module, "MAX_BYTES", 3 * module.BYTES_PER_SCORE * len(ITEMS))
    bundle = fake(sums())
    runs = leave_one_out(bundle, history, items)
    batches = cast(Any, bundle.session).batches
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 2]
    assert all(batch[0] == history.tolist() for batch in batches)
    for name in ("whole", "base", "influence"):
        np.testing.assert_array_equal(getattr(runs, name), getattr(one_run, name))


# -- agreement of two models


def sample(count: int = 20, length: int = 8) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(3)
    return [rng.permutation(len(ITEMS))[:length] + 1 for _ in range(count)]


def test_a_model_agrees_with_itself_in_everything() -> None:
    found = agreement(fake(sums()), fake(sums()), sample())
    assert (found.histories, found.explanations, found.skipped) == (20, 60, 0)
    assert found.top1.mean == found.top3_overlap.mean == found.top1.low == 1.0
    assert found.rank_correlation.mean == pytest.approx(1.0)
    assert found.relative_difference.mean == 0.0
    assert found.top1_by_chance == pytest.approx(1 / 8)


def test_items_are_matched_by_id_however_the_models_number_them() -> None:
    scorer = sums()
    turned = fake(
        lambda history: scorer([len(ITEMS) + 1 - item for item in history])[::-1], ITEMS[::-1]
    )
    found = agreement(fake(scorer), turned, sample())
    assert found.top1.mean == 1.0
    assert found.relative_difference.mean == pytest.approx(0.0, abs=1e-6)


def test_a_model_that_reads_less_is_compared_on_what_both_read() -> None:
    found = agreement(fake(sums(), length=8), fake(sums(), length=6), sample())
    assert found.top1.mean == 1.0
    assert found.top1_by_chance == pytest.approx(1 / 6)


def test_the_opposite_model_agrees_in_nothing() -> None:
    scorer = sums()
    found = agreement(fake(scorer), fake(lambda history: -scorer(history)), sample())
    assert found.top1.mean == 0.0
    assert found.rank_correlation.mean == pytest.approx(-1.0)
    assert found.relative_difference.mean > 1.0


def test_an_unrelated_model_agrees_as_often_as_chance() -> None:
    def noise(seed: int) -> Scorer:
        return lambda history: np.random.default_rng([seed, *history]).normal(size=len(ITEMS))

    found = agreement(fake(noise(1)), fake(noise(2)), sample(200))
    assert found.top1.low <= found.top1_by_chance <= found.top1.high
    assert found.rank_correlation.low <= 0.0 <= found.rank_correlation.high


def test_short_histories_are_skipped_and_counted() -> None:
    short = [np.arange(1, MIN_HISTORY)]
    assert agreement(fake(sums()), fake(sums()), [*sample(5), *short]).skipped == 1
    with pytest.raises(ValueError, match="no history has 5 items"):
        agreement(fake(sums()), fake(sums()), short)


def test_a_constant_model_orders_nothing() -> None:
    found = agreement(fake(sums()), fake(lambda _: np.zeros(len(ITEMS))), sample())
    assert found.rank_correlation.mean == 0.0
    assert found.as_dict()["relative_difference"]["mean"] > 0.0


# -- text


def served(**changes: object) -> dict[str, Any]:
    return {
        "user_id": "ann",
        "surface": "posts",
        "items": ["item-4"],
        "scores": [1.25],
        "model_version": "posts@v1",
        "generated_at_ms": 1_764_000_000_000,
        **changes,
    }


def test_text_shows_what_raised_and_what_lowered() -> None:
    influence = {"item": "item-1", "recency": 1, "value": 0.5, "share": 0.25}
    reason = {
        "item": "item-4", "score": 1.5, "base": 0.0, "note": None,
        "raised": [influence], "lowered": [{**influence, "value": -0.125}],
    }  # fmt: skip
    explained = {
        "note": "changed", "history_changed": True, "history_items": 2, "items": [reason],
    }  # fmt: skip
    text = as_text(served(explanations=explained))
    assert text.splitlines() == [
        "user ann on posts: 1 item by posts@v1, made 2025-11-24 16:00:00 UTC",
        "the model reads 2 history items; beside each, what it added to the score",
        "changed",
        "",
        "     1.25  item-4  (now 1.50)",
        "           raised   item-1 (+0.50, 25%)",
        "           lowered  item-1 (-0.12, 25%)",
    ]


def test_text_cannot_steer_a_terminal() -> None:
    text = as_text(served(items=["\x1b[2J\ud800"]))
    assert "\x1b" not in text
    text.encode()
