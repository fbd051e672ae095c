"""Follows as events, the graph around a user, and whom the worker does not recommend."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.dataset import Queries, index_by, split
from models.evaluate import ranked, ranks
from models.events import TYPE_CODES, EventLog, Events, SourceError
from models.friends import (
    Graph,
    adamic_adar,
    catalogue,
    followers,
    follows,
    friends_of_friends,
    graph_of,
    own_items,
    spectral,
    without_self,
)
from models.sources import read_events
from models.synthetic import synthetic_follows
from worker.events import Event, EventType, Surface
from worker.history import MAX_FOLLOWED, History, StoredHistory1
from worker.ranking import not_shown


def events(*rows: tuple[str, str] | tuple[str, str, EventType]) -> Events:
    log = EventLog()
    kinds = [row[2] if len(row) == 3 else EventType.FOLLOW for row in rows]
    log.extend(
        log.users.codes(row[0] for row in rows),
        log.items.codes(row[1] for row in rows),
        np.array([TYPE_CODES[kind] for kind in kinds], dtype=np.int8),
        np.arange(len(rows), dtype=np.int64),
    )
    return log.events(name="test", sha256="")


def pairs(of: Events) -> list[tuple[str, str]]:
    return list(zip(of.users.tolist(), of.items.tolist(), strict=True))


def graph(count: int, *edges: tuple[int, int]) -> Graph:
    both = np.array(edges, dtype=np.int64).reshape(-1, 2)
    return Graph(both[:, 0], both[:, 1], count)


def lists(sequences: Sequence[np.ndarray]) -> list[list[int]]:
    return [sequence.tolist() for sequence in sequences]


# -- synthetic follows


@settings(max_examples=15, deadline=None)
@given(users=st.integers(20, 80), share=st.floats(0.001, 0.1), seed=st.integers(0, 1000))
def test_made_up_follows_are_distinct_between_two_users_and_in_time_order(
    users: int, share: float, seed: int
) -> None:
    count = max(1, int(users * (users - 1) * share))
    made = synthetic_follows(users, count, seed)
    assert len(set(pairs(made))) == len(made) == count
    assert all(follower != followed for follower, followed in pairs(made))
    assert (np.diff(made.timestamps_ms) >= 0).all()
    assert set(made.types.tolist()) == {"follow"}


def test_made_up_follows_say_so_and_are_the_same_each_time() -> None:
    made = synthetic_follows(100, 900, 3)
    assert "synthetic" in made.name
    assert made.sha256 == synthetic_follows(100, 900, 3).sha256
    assert pairs(made) == pairs(synthetic_follows(100, 900, 3))
    assert made.sha256 != synthetic_follows(100, 900, 4).sha256
    assert pairs(synthetic_follows(100, 900, 3, limit=10)) == pairs(made)[:10]


def test_made_up_follows_are_mutual_closed_and_unequal_beyond_chance() -> None:
    made = synthetic_follows(300, 4000, 1)
    edges = set(pairs(made))
    density = len(edges) / (300 * 299)
    assert sum((b, a) in edges for a, b in edges) / len(edges) > 5 * density
    of: dict[str, set[str]] = {}
    for a, b in edges:
        of.setdefault(a, set()).add(b)
    closed = sum(any(b in of.get(z, ()) for z in of[a] - {b}) for a, b in edges)
    assert closed / len(edges) > 0.7
    counts = np.unique(made.items, return_counts=True)[1]
    assert counts.max() > 4 * np.median(counts)


@pytest.mark.parametrize(("users", "count"), [(19, 5), (100, 991), (100, 0)])
def test_impossible_numbers_of_follows_are_refused(users: int, count: int) -> None:
    with pytest.raises(SourceError, match="give 20 users or more"):
        synthetic_follows(users, count, 1)


def test_the_made_up_source_is_of_the_surface_friends_only() -> None:
    with pytest.raises(SourceError, match="surface friends"):
        read_events("synthetic-follows", surface="posts")


# -- events to sequences


def test_only_the_first_follow_of_somebody_else_counts() -> None:
    found = follows(
        events(
            ("a", "b", EventType.VIEW), ("a", "b"), ("a", "a"), ("b", "a"), ("a", "b"),
            ("a", "c", EventType.CLICK), ("a", "c"),
        )
    )  # fmt: skip
    assert pairs(found) == [("a", "b"), ("b", "a"), ("a", "c")]


def test_a_source_without_follows_is_refused_with_what_to_do() -> None:
    with pytest.raises(SourceError, match="no event of type follow"):
        follows(events(("a", "b", EventType.VIEW), ("a", "a")))


def test_the_catalogue_holds_everybody_the_most_followed_first() -> None:
    made = events(("a", "c"), ("b", "c"), ("d", "b"), ("d", "c"))
    assert catalogue(made) == ["c", "b", "d", "a"]
    assert catalogue(made, 2) == ["c", "b", "d"]


@pytest.mark.parametrize(("name", "last"), [("time", False), ("leave-one-out", True)])
def test_the_graph_holds_the_follows_to_train_on_and_no_later_ones(name: str, last: bool) -> None:
    made = synthetic_follows(60, 300, 2)
    data = index_by(made.users.tolist(), made.items.tolist(), catalogue(made))
    parts = split(data, name)
    own = own_items(made, data)
    found = graph_of(data, parts.train, own)
    assert len(found.followed) == sum(map(len, parts.train))
    names = ["", *data.item_ids]
    known = [(names[a], names[b]) for a, b in zip(found.followers, found.followed, strict=True)]
    if not last:
        assert known == pairs(made)[:225]
    asked = {
        (names[own[user]], names[target])
        for user, target in zip(parts.test.users, parts.test.targets, strict=True)  # type: ignore[arg-type]
    }
    assert asked
    assert not asked & set(known)


def test_each_user_heads_their_followers_in_time_order() -> None:
    known = graph(4, (3, 2), (1, 4), (1, 2), (0, 2))
    assert lists(followers(known)) == [[2, 3, 1], [4, 1]]


def test_vectors_to_start_from_are_near_where_users_are_joined() -> None:
    def clique(low: int) -> list[tuple[int, int]]:
        return [(a, b) for a in range(low, low + 5) for b in range(low, low + 5) if a != b]

    # User 11 follows two of the first clique and is followed by nobody; user 12 is alone.
    known = graph(12, *clique(1), *clique(6), (11, 1), (11, 2))
    table = spectral(known, 4, seed=1)
    assert table.shape == (13, 4)
    assert table.dtype == np.float32
    assert not table[0].any()
    near = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    assert near[11] @ near[3] > 0.5
    assert near[11] @ near[3] > near[11] @ near[8] + 0.5
    assert table[12].any()


def test_vectors_to_start_from_are_random_where_no_follower_is_an_item() -> None:
    table = spectral(graph(3, (0, 1), (0, 2)), 4, seed=1)
    assert not table[0].any()
    assert table[1:].any(axis=1).all()


# -- baselines


def test_common_neighbours_count_less_the_more_neighbours_they_have() -> None:
    # 1 asks; 2 leads to 4 and has three neighbours, 3 leads to 5 and has two.
    known = graph(6, (1, 2), (1, 3), (2, 4), (6, 2), (5, 3))
    history = np.array([[0, 2, 3]])
    assert friends_of_friends(known)(history)[0].tolist() == [2, 0, 0, 1, 1, 1]
    found = adamic_adar(known)(history)[0]
    assert found[3] == pytest.approx(1 / math.log(3))
    assert found[4] == pytest.approx(1 / math.log(2))


def test_nobody_competes_with_the_target_of_their_own_query() -> None:
    scores = np.array([[9.0, 5.0, 4.0]], dtype=np.float32)

    def score(history: np.ndarray) -> np.ndarray:
        return np.repeat(scores, len(history), axis=0)

    asked = Queries([np.array([3]), np.array([3])], np.array([2, 2]), np.array([0, 1]))
    assert ranks(score, asked, length=2).tolist() == [1, 1]
    data = index_by(["u", "v"], ["x", "x"], ["u", "x", "y"])
    parts = split(data, "all")
    own = own_items(events(("u", "x"), ("v", "x")), data)
    assert own.tolist() == [1, 0]
    barred = without_self(type(parts)("all", [], asked, asked), own).test
    found = ranked(score, barred, length=2)
    assert found.ranks.tolist() == [0, 1]
    assert 1 not in found.top[0]


# -- the worker


def followed(history: History, *items: str, start: int = 0, kind: str = "follow") -> None:
    for number, item in enumerate(items, start):
        history.apply(
            Event(
                "u",
                item,
                EventType(kind),
                Surface.FRIENDS,
                number,
                None,
                None,
                "t",
                0,
                number,
                number,
            )
        )


def test_who_was_followed_long_ago_is_not_shown_nor_is_oneself() -> None:
    history = History(2)
    followed(history, *"abcd")
    assert history.items == ("c", "d")
    kept = History.from_bytes(history.to_bytes(), 2)
    assert not_shown("u", Surface.FRIENDS, kept) == {"a", "b", "c", "d", "u"}
    assert not_shown("u", Surface.POSTS, History(2)) == set()


def test_a_profile_that_was_only_viewed_comes_back_when_it_leaves_the_history() -> None:
    history = History(1)
    followed(history, "a", kind="view")
    followed(history, "b", start=1)
    assert not_shown("u", Surface.FRIENDS, history) == {"b", "u"}


def test_who_is_hidden_is_followed_no_more() -> None:
    history = History(2)
    followed(history, "a")
    followed(history, "a", start=1, kind="hide")
    assert not history.followed
    assert "a" in not_shown("u", Surface.FRIENDS, history)


def test_follows_are_bounded_and_the_newest_stay() -> None:
    history = History(2)
    followed(history, *(f"i{n}" for n in range(MAX_FOLLOWED + 3)), "i3")
    assert len(history.followed) == MAX_FOLLOWED
    assert next(iter(history.followed)) == "i4"
    assert list(history.followed)[-1] == "i3"


def test_a_history_stored_before_follows_were_kept_is_read() -> None:
    stored = msgspec.to_builtins(StoredHistory1(1, ["a"], [5], [], [7], {}, []))
    data = msgspec.msgpack.encode(stored[:-1])
    assert History.from_bytes(data, 3).items == ("a",)
