"""Opening all cells gives exact lists; opening some gives valid ones, and most of the best."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.compress.cells import Cells, cells
from models.compress.draft import CompressionError, Draft, save
from models.evaluate import bundle_score
from tests.conftest import ITEMS, tiny_bundle
from tests.unit.drafts import (
    assert_scores_are_of,
    context_of,
    draft_of,
    histories,
    lists,
    made,
    rounded_table,
)
from worker.bundle import open_bundle
from worker.bundle_checks import check_bundle
from worker.errors import BundleError
from worker.scorer import Run, score

COUNT = 130
FORMS = [
    "",
    "int8 + ",
    "int4 + ",
    "int4:head=0.2 + ",
    "weights:8 + ",
    "half + ",
    "pq:codes=4,centroids=16 + ",
    "prune:0.8 + int8 + ",
]


def plan_of(draft: Draft) -> Cells:
    (plan,) = draft.late
    assert isinstance(plan, Cells)
    return plan


@pytest.mark.parametrize("form", FORMS)
def test_with_all_cells_open_every_item_gets_its_score(form: str) -> None:
    draft = made(f"{form}cells:9,probe=9", COUNT)
    found = lists(draft, COUNT)
    assert np.sort(found.items, axis=1).tolist() == [list(range(1, COUNT + 1))] * 5
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert_scores_are_of(found, rounded_table(draft), 0.1 if "int" in form else 1e-5)


@pytest.mark.parametrize("form", ["", "pq:codes=4,centroids=16 + "])
def test_with_all_cells_open_lists_are_the_exact_ones(form: str) -> None:
    exact = lists(made(form.strip(" +"), COUNT) if form else draft_of(COUNT), 10)
    found = lists(made(f"{form}cells:9,probe=9", COUNT), 10)
    np.testing.assert_allclose(found.scores, exact.scores, atol=0.1 if form else 1e-5)
    if not form:
        np.testing.assert_array_equal(found.items, exact.items)


def test_histories_are_read_as_before_whatever_the_order_of_the_rows() -> None:
    exact, found = lists(draft_of(COUNT), 1), lists(made("cells:9,probe=2", COUNT), 1)
    np.testing.assert_allclose(found.states, exact.states, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(2, 90), data=st.data())
def test_any_size_gives_distinct_real_items_up_to_max_k(count: int, data: st.DataObject) -> None:
    cells = data.draw(st.integers(1, count))
    probe = data.draw(st.integers(1, cells))
    draft = made(f"int8 + cells:{cells},probe={probe},least=1", count)
    most = draft.manifest.most
    found = lists(draft, most)
    assert np.isfinite(found.scores).all()
    assert found.items.min() >= 1
    assert found.items.max() <= count
    assert all(len(set(row)) == most for row in found.items.tolist())


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 90), data=st.data())
def test_every_item_lies_in_one_cell_and_cells_are_of_one_size(
    count: int, data: st.DataObject
) -> None:
    cells = data.draw(st.integers(1, count))
    plan = plan_of(made(f"cells:{cells},probe=1,least=1", count))
    assert sorted(plan.items[plan.items > 0].tolist()) == list(range(1, count + 1))
    assert plan.items.shape[0] == cells
    assert (plan.items == 0).any()


def test_the_number_of_open_cells_reaches_the_recall_that_was_asked_for() -> None:
    users = 40
    exact = lists(draft_of(COUNT), 10, users).items
    opened = []
    for recall in (0.5, 0.9, 1.0):
        draft = made(f"cells:30,recall={recall},least=10", COUNT)
        found = lists(draft, 10, users).items
        shared = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
        assert np.mean(shared) / 10 >= recall - 0.02
        opened.append(plan_of(draft).probe)
    assert opened[0] < opened[1] < opened[2] <= 30


def test_a_run_can_always_give_the_least_that_was_asked_for() -> None:
    assert made("cells:30,probe=1,least=50", COUNT).manifest.most >= 50


def test_a_saved_bundle_is_valid_and_says_what_it_gives_at_most(tmp_path: Path) -> None:
    draft = made("int8 + cells:30,probe=5,least=1", COUNT)
    path = save(draft, tmp_path / "v-cells", golden=histories(COUNT))
    bundle = open_bundle(path)
    assert bundle.manifest.max_k == draft.manifest.most < COUNT
    assert "30 of 5 items, 5 opened" in bundle.manifest.provenance["cells"]
    assert [finding.level for finding in check_bundle(path)] == ["warning"]  # no metrics
    run = Run(np.arange(COUNT), histories(COUNT))
    candidates, _ = score(bundle, run, bundle.manifest.most + 1)
    assert candidates.complete
    assert len(list(candidates.of(0))) == bundle.manifest.most
    table = bundle_score(bundle)(histories(COUNT))
    assert (np.isfinite(table).sum(axis=1) == bundle.manifest.most).all()


def test_a_bundle_that_gives_less_than_its_max_k_is_refused(tmp_path: Path) -> None:
    draft = made("cells:30,probe=5,least=1", COUNT)
    slots = 5 * plan_of(draft).items.shape[1]
    assert draft.manifest.most < slots  # there are fillers
    with pytest.raises(BundleError, match="not all finite"):
        manifest = msgspec.structs.replace(draft.manifest, max_k=slots)
        save(replace(draft, manifest=manifest), tmp_path / "v-cells")


@pytest.mark.parametrize("max_k", [0, -1, len(ITEMS) + 1])
def test_a_max_k_beyond_the_catalogue_is_refused(tmp_path: Path, max_k: int) -> None:
    with pytest.raises(BundleError, match="max_k"):
        tiny_bundle(tmp_path / "v1", max_k=max_k)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("cells:131", "131 cells"),
        ("cells:5,probe=6", "6 opened"),
        ("cells:5,recall=0", "recall"),
        ("cells:5,probe=1 + blocks:block=16,parts=table", "has no form by cells"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: str, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        lists(made(recipe, COUNT), 1)


def test_without_histories_the_number_of_open_cells_must_be_given() -> None:
    nothing = replace(context_of(COUNT), validation=None)
    with pytest.raises(CompressionError, match="histories"):
        cells(draft_of(COUNT), nothing)
