"""The baselines on cases worked out by hand, and against slow, plain versions of themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.baselines import (
    EASE_MOST_ITEMS,
    BaselineError,
    ease,
    item_knn,
    popularity_score,
    sequential_rules,
)
from models.dataset import padded
from models.evaluate import Score

Sequences = list[NDArray[np.int64]]

ITEMS = 6
sequences = st.lists(
    st.lists(st.integers(1, ITEMS), max_size=8).map(lambda one: np.array(one, dtype=np.int64)),
    min_size=1,
    max_size=8,
)


def seen(train: Sequences) -> NDArray[np.float64]:
    table = np.zeros((len(train), ITEMS))
    for row, sequence in enumerate(train):
        table[row, sequence - 1] = 1.0
    return table


def asked(score: Score, *history: int) -> list[float]:
    found = score(padded([np.array(history, dtype=np.int64)], 4))
    assert found.dtype == np.float32
    return found[0].tolist()


def weights(score: Score) -> NDArray[np.float32]:
    """What each item alone adds: float32 `[items, items]`."""
    return score(np.arange(1, ITEMS + 1)[:, None])


def test_popularity_counts_whoever_asks() -> None:
    score = popularity_score(np.array([1, 3, 3]), 3)
    assert asked(score, 2) == asked(score, 1) == [1.0, 0.0, 2.0]


@given(sequences, st.sampled_from([0.5, 10.0]))
@settings(max_examples=30, deadline=None)
def test_ease_solves_each_items_ridge_regression_on_the_others(train: Sequences, l2: float) -> None:
    table = seen(train)
    found = weights(ease(train, ITEMS, l2=l2))
    for target in range(ITEMS):
        others = [item for item in range(ITEMS) if item != target]
        x, y = table[:, others], table[:, target]
        solved = np.linalg.solve(x.T @ x + l2 * np.eye(ITEMS - 1), x.T @ y)
        assert found[others, target] == pytest.approx(solved, abs=1e-4)
        assert found[target, target] == 0.0


@given(sequences, st.integers(1, ITEMS), st.sampled_from([0.0, 5.0]))
@settings(max_examples=50, deadline=None)
def test_item_knn_keeps_each_items_nearest_by_shrunk_cosine(
    train: Sequences, neighbours: int, shrink: float
) -> None:
    table = seen(train)
    both = table.T @ table
    norms = np.sqrt(np.outer(np.diag(both), np.diag(both)))
    similar = np.divide(both, norms + shrink, out=np.zeros_like(both), where=both > 0)
    np.fill_diagonal(similar, 0.0)
    found = weights(item_knn(train, ITEMS, neighbours=neighbours, shrink=shrink))
    for target in range(ITEMS):
        kept = np.flatnonzero(found[:, target])
        assert found[kept, target] == pytest.approx(similar[kept, target], rel=1e-5)
        best = np.sort(similar[:, target])[::-1][:neighbours]
        assert np.sort(found[kept, target])[::-1] == pytest.approx(best[best > 0], rel=1e-5)


@given(sequences, st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_sequential_rules_count_what_comes_within_the_steps(train: Sequences, steps: int) -> None:
    counts = np.zeros((ITEMS, ITEMS))
    for sequence in train:
        for place, first in enumerate(sequence):
            for gap, after in enumerate(sequence[place + 1 : place + 1 + steps]):
                if first != after:
                    counts[first - 1, after - 1] += 0.5**gap
    scale = counts.sum(1, keepdims=True) ** 0.75 * counts.sum(0, keepdims=True) ** 0.25 + 2.0
    found = weights(
        sequential_rules(train, ITEMS, steps=steps, recency=0.5, penalty=0.25, shrink=2.0)
    )
    assert found == pytest.approx(counts / scale, rel=1e-4, abs=1e-7)


def test_rules_have_a_direction_and_cosines_have_none() -> None:
    train = [np.array([1, 2])]
    assert asked(sequential_rules(train, 2, shrink=0.0), 1) == [0.0, 1.0]
    assert asked(sequential_rules(train, 2, shrink=0.0), 2) == [0.0, 0.0]
    knn = item_knn(train, 2, neighbours=1, shrink=0.0)
    assert asked(knn, 1) == [0.0, 1.0] and asked(knn, 2) == [1.0, 0.0]


def test_older_items_count_less_and_an_items_last_place_counts() -> None:
    train = [np.array([1, 3]), np.array([2, 4])]
    score = item_knn(train, 4, neighbours=1, shrink=0.0, recency=0.5)
    assert asked(score, 1, 2) == [0.0, 0.0, 0.5, 1.0]
    assert asked(score, 1, 2, 1) == [0.0, 0.0, 1.0, 0.5]
    static = item_knn(train, 4, neighbours=1, shrink=0.0)
    assert asked(static, 1, 2, 1) == [0.0, 0.0, 1.0, 1.0]


def test_padding_alone_scores_nothing_and_rows_do_not_mix() -> None:
    score = ease([np.array([1, 2]), np.array([2, 3])], 3, l2=1.0)
    together = score(np.array([[0, 0], [0, 1]]))
    assert together[0].tolist() == [0.0, 0.0, 0.0]
    assert together[1].tolist() == score(np.array([[0, 1]]))[0].tolist()


def test_item_knn_gives_the_same_in_one_block_and_in_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    train = [rng.integers(1, ITEMS + 1, 4) for _ in range(9)]
    whole = weights(item_knn(train, ITEMS, neighbours=2, shrink=1.0))
    monkeypatch.setattr("models.baselines._BLOCK", 2 * ITEMS)
    assert (weights(item_knn(train, ITEMS, neighbours=2, shrink=1.0)) == whole).all()


def test_ease_refuses_a_catalogue_that_it_cannot_invert_and_names_what_can() -> None:
    with pytest.raises(BaselineError, match="use item_knn or sequential_rules"):
        ease([np.array([1, 2])], EASE_MOST_ITEMS + 1, l2=1.0)


@pytest.mark.parametrize(
    "fit",
    [
        lambda train: ease(train, 3, l2=0.0),
        lambda train: ease(train, 3, l2=1.0, recency=0.0),
        lambda train: item_knn(train, 3, neighbours=0, shrink=0.0),
        lambda train: item_knn(train, 3, neighbours=1, shrink=-1.0),
        lambda train: sequential_rules(train, 3, steps=0),
        lambda train: sequential_rules(train, 3, penalty=1.5),
        lambda train: sequential_rules(train, 3, recency=1.1),
    ],
)
def test_parameters_out_of_range_are_errors(fit: object) -> None:
    assert callable(fit)
    with pytest.raises(BaselineError, match="give"):
        fit([np.array([1, 2])])
