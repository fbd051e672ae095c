"""Lists hold the best items that may be shown, however deep the model must be asked."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker.bundle import Bundle, open_bundle
from worker.events import Event, EventType, Surface
from worker.history import History
from worker.ranking import Filter, not_shown, pick
from worker.recommender import Recommender
from worker.rules import Rules, SurfaceRules

NAMES = tuple(f"i{number}" for number in range(1, 61))
LENGTH = 12


class Table:
    """A model that likes items by a fixed order, which depends on the newest item."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.items = NAMES
        self.index = {name: number for number, name in enumerate(NAMES, start=1)}
        self.manifest = SimpleNamespace(
            reference="posts@v1", catalogue="1", max_length=8, min_length=1, carry_width=None,
            any_length=False, item_count=len(NAMES), most=len(NAMES),
        )  # fmt: skip

    def order(self, last: int) -> NDArray[np.int64]:
        return np.random.default_rng(last).permutation(len(NAMES)) + 1

    def score(
        self, history: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        self.asked.append(k)
        items = np.stack([self.order(int(row[-1]))[:k] for row in history])
        scores = np.tile(np.arange(k, 0, -1, dtype=np.float32), (len(history), 1))
        return items, scores


def user(items: list[int], hidden: list[int], kind: EventType, surface: Surface) -> History:
    history = History(LENGTH)
    acts = [(number, kind) for number in items] + [(number, EventType.HIDE) for number in hidden]
    for offset, (number, act) in enumerate(acts):
        history.apply(
            Event("u", f"i{number}", act, surface, offset, None, None, "t", 0, offset, offset)
        )
    return history


numbers = st.lists(st.integers(1, 80), max_size=20)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 80), min_size=1, max_size=20), numbers), max_size=9),
    st.sampled_from([Surface.POSTS, Surface.FRIENDS]),
    st.sampled_from(
        [
            Rules(),
            Rules(block=frozenset({"i3", "i9"})),
            Rules(surfaces={Surface.POSTS: SurfaceRules(allow=frozenset({"i5", "i6", "i7"}))}),
            Rules(
                surfaces={Surface.POSTS: SurfaceRules(max_per_author=1)},
                authors={name: name[-1] for name in NAMES},
            ),
        ]
    ),
)
def test_a_list_is_what_filtering_the_whole_order_gives(
    given_users: list[tuple[list[int], list[int]]], surface: Surface, rules: Rules
) -> None:
    table = Table()
    kind = EventType.FOLLOW if surface is Surface.FRIENDS else EventType.VIEW
    histories = [user(items, hidden, kind, surface) for items, hidden in given_users]
    names = [f"i{number}" for number in range(1, len(histories) + 1)]
    if not histories:
        return
    recommender = Recommender(surface, rules, top_k=5)
    lists = recommender.rank(cast(Bundle, table), names, histories).ranked
    for at, history in enumerate(histories):
        known = [table.index[item] for item in history.items if item in table.index]
        if not known:
            assert at not in lists
            continue
        order = [NAMES[number - 1] for number in table.order(known[-1])]
        expected, _ = Filter(rules, surface).top(
            [(name, 0.0) for name in order],
            exclude=not_shown(names[at], surface, history),
            count=5,
        )
        assert lists[at][0] == expected


def ask(recommender: Recommender, table: Table, history: History) -> list[int]:
    table.asked.clear()
    recommender.rank(cast(Bundle, table), ["u"], [history])
    return list(table.asked)


def test_it_learns_how_deep_to_ask() -> None:
    table = Table()
    blocked = frozenset(NAMES[int(number) - 1] for number in table.order(7)[:40])
    recommender = Recommender(Surface.POSTS, Rules(block=blocked), top_k=5)
    history = user([7], [], EventType.VIEW, Surface.POSTS)
    first = ask(recommender, table, history)
    assert len(first) > 1 and first[-1] >= 45
    assert len(ask(recommender, table, history)) == 1
    # And forgets it when no longer needed.
    recommender._shown_of = ""
    recommender._filter = Filter(Rules(), Surface.POSTS)
    for _ in range(200):
        last = ask(recommender, table, history)
    assert last == [16]


def test_a_list_stays_short_where_nothing_more_is_allowed() -> None:
    table = Table()
    rules = Rules(surfaces={Surface.POSTS: SurfaceRules(allow=frozenset({"i5"}))})
    recommender = Recommender(Surface.POSTS, rules, top_k=5)
    history = user([7], [], EventType.VIEW, Surface.POSTS)
    assert recommender.rank(cast(Bundle, table), ["u"], [history]).ranked[0][0] == ["i5"]
    assert table.asked[-1] >= len(NAMES)


def test_no_bundle_is_kept_after_its_batch() -> None:
    table = Table()
    recommender = Recommender(Surface.POSTS, Rules(block=frozenset({"i3"})), top_k=5)
    history = user([7], [], EventType.VIEW, Surface.POSTS)
    recommender.rank(cast(Bundle, table), ["u"], [history])
    alive = weakref.ref(table)
    del table
    gc.collect()
    assert alive() is None


def test_a_failing_model_is_reported() -> None:
    table = cast(Any, Table())
    table.score = lambda history, k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Recommender(Surface.POSTS, Rules(), top_k=5).rank(
            table, ["u"], [user([7], [], EventType.VIEW, Surface.POSTS)]
        )


def test_rows_are_told_apart() -> None:
    items = np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1]])
    scores = np.array([[3.0, 2.0, 1.0]] * 3, dtype=np.float32)
    banned = np.array([[0, 2], [1, 0], [0, 0]], dtype=np.int32)
    picked = pick(items, scores, banned=banned, shown=None, count=2)
    assert picked.items == [1, 3, 2, 3, 3, 2]
    assert picked.scores == [3.0, 1.0, 2.0, 1.0, 3.0, 2.0]
    assert picked.ends == [2, 4, 6]
    assert picked.depth.tolist() == [3, 3, 2]
    few = pick(items, scores, banned=np.array([[1, 2], [1, 2], [3, 2]], dtype=np.int32),
               shown=None, count=2)  # fmt: skip
    assert few.ends == [1, 2, 3] and few.depth.tolist() == [0, 0, 0]


# -- a recurrent model that ships

RECURRENT = Path(__file__).parents[2] / "models" / "shipped" / "posts-recurrent"


def view(history: History, item: str, number: int) -> None:
    history.apply(
        Event("u", item, EventType.VIEW, Surface.POSTS, number, None, None, "t", 0, number, number)
    )


@pytest.mark.parametrize("version", sorted(path.name for path in RECURRENT.iterdir()))
def test_lists_made_step_by_step_are_those_made_from_the_whole_history(version: str) -> None:
    bundle = open_bundle(RECURRENT / version)
    rng = np.random.default_rng(3)
    stepping = Recommender(Surface.POSTS, Rules(), top_k=10)
    whole = Recommender(Surface.POSTS, Rules(), top_k=10)
    histories = [History(200) for _ in range(70)]
    users = [f"u{number}" for number in range(len(histories))]
    for turn in range(12):
        for history in histories:
            # Now and then several events before the next list, or none, or an unknown item.
            for _ in range(int(rng.integers(0, 4))):
                item = "unknown" if rng.random() < 0.1 else str(rng.choice(bundle.items))
                view(history, item, turn * 10 + len(history.items))
        made = stepping.rank(bundle, users, histories).ranked
        fresh = [History.from_bytes(history.to_bytes(), 200) for history in histories]
        expected = whole.rank(bundle, users, fresh).ranked
        assert made.keys() == expected.keys()
        for row, (items, scores) in expected.items():
            assert made[row][1] == pytest.approx(scores, abs=0.3)
            assert len(set(made[row][0]) & set(items)) >= 8
    assert sum(history.carry is not None for history in histories) > 60


def test_a_recurrent_model_reads_only_what_is_new() -> None:
    bundle = open_bundle(RECURRENT / sorted(path.name for path in RECURRENT.iterdir())[-1])
    read: list[int] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(bundle, name)

        def advance(self, history: NDArray[np.int64], *arguments: Any) -> Any:
            read.append(history.shape[1])
            return bundle.advance(history, *arguments)

    recommender, history = Recommender(Surface.POSTS, Rules(), top_k=10), History(200)
    for number, item in enumerate(bundle.items[:30]):
        view(history, item, number)
        recommender.rank(cast(Bundle, Spy()), ["u"], [history])
    assert read == [1] * 30
