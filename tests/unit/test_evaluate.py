"""Ranks and metrics on cases worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.dataset import (
    Interactions,
    Queries,
    index_interactions,
    leave_one_out,
    next_events,
    padded,
    sample,
    windows,
)
from models.evaluate import accuracy, ranks


def test_hr_ndcg_and_mrr_of_known_ranks() -> None:
    found = accuracy(np.array([0, 1, 9, 10]))
    assert found.hit_rate == 0.75
    assert found.ndcg == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11)) / 4)
    assert found.mrr == pytest.approx((1 + 1 / 2 + 1 / 10) / 4)


def test_seen_items_are_no_candidates_and_ties_count_against_the_model() -> None:
    scores = np.array([[9.0, 5.0, 5.0, 1.0]], dtype=np.float32)
    queries = Queries([np.array([1])], np.array([3]))
    found = ranks(lambda history: np.repeat(scores, len(history), axis=0), queries, length=4)
    assert found.tolist() == [1]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=50))
def test_metrics_stay_in_bounds_and_order(values: list[int]) -> None:
    found = accuracy(np.array(values))
    assert 0 <= found.mrr <= found.ndcg <= found.hit_rate <= 1


def test_leave_one_out_takes_the_last_two_items_of_each_user() -> None:
    data = index_interactions(["u", "u", "u", "v", "v", "v"], list("abcabd"))
    train, validation, test = leave_one_out(data)
    names = ("", *data.item_ids)
    assert [[names[i] for i in sequence] for sequence in train] == [["a"], ["a"]]
    assert [names[i] for i in validation.targets] == ["b", "b"]
    assert [names[i] for i in test.targets] == ["c", "d"]


def test_the_time_split_asks_with_the_history_before_each_event() -> None:
    data = index_interactions(["u", "v", "u", "u"], list("abcd"))
    queries = next_events(data, 0.5, 1.0)
    names = ("", *data.item_ids)
    assert [[names[i] for i in h] for h in queries.histories] == [["a"], ["a", "c"]]
    assert [names[i] for i in queries.targets] == ["c", "d"]


def test_every_item_but_the_first_is_a_target_once() -> None:
    cut = windows([np.arange(1, 12)], length=4)
    assert sorted(cut[:, 1:][cut[:, :-1] > 0].tolist()) == list(range(2, 12))


def test_padding_is_on_the_left() -> None:
    assert padded([np.array([1, 2, 3]), np.array([4])], 2).tolist() == [[2, 3], [0, 4]]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=60),
    st.integers(1, 20),
)
def test_events_drawn_beforehand_are_those_drawn_afterwards(
    events: list[tuple[int, int]], limit: int
) -> None:
    users, items = (np.array(part) for part in zip(*events, strict=True))
    data = Interactions(users, items, tuple("abcdefghi"))
    every = next_events(data, 0.5, 1.0)
    for query, (place, user) in enumerate(
        (n, u) for n, u in enumerate(users) if n >= len(users) // 2 and u in users[:n]
    ):
        assert every.histories[query].tolist() == items[:place][users[:place] == user].tolist()
        assert every.targets[query] == items[place]
    drawn, after = next_events(data, 0.5, 1.0, limit=limit), sample(every, limit)
    assert [h.tolist() for h in drawn.histories] == [h.tolist() for h in after.histories]
    assert drawn.targets.tolist() == after.targets.tolist()
