"""Interactions as per-user sequences of model indexes, and the splits that evaluation uses.

Every rating counts as an interaction, as is usual for sequential recommendation. All items are
kept: the worker must know each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interactions:
    """Events in time order.

    `users`: int64 `[events]`, 0-based; `items`: int64 `[events]`, model indexes from 1;
    `item_ids[i - 1]` is the id of model index `i`.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    item_ids: tuple[str, ...]

    @property
    def user_count(self) -> int:
        """Number of users."""
        return int(self.users.max(initial=-1)) + 1

    @property
    def item_count(self) -> int:
        """Number of items."""
        return len(self.item_ids)

    def until(self, share: float) -> Interactions:
        """The first `share` of the events by time."""
        end = int(len(self.users) * share)
        return Interactions(self.users[:end], self.items[:end], self.item_ids)

    def sequences(self) -> list[NDArray[np.int64]]:
        """Items of each user, oldest first; empty for a user without events."""
        order = np.argsort(self.users, kind="stable")
        bounds = np.searchsorted(self.users[order], np.arange(self.user_count + 1))
        items = self.items[order]
        return [items[a:b] for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class Queries:
    """Questions to a recommender: after this history, which item comes next?

    `histories`: items seen before, oldest first; `targets`: int64 `[queries]`; `users`: int64
    `[queries]`, who asks, or None where each query is another user's. One user's queries are not
    independent. `barred`: int64 `[queries]`, an item that is no candidate though it is not in the
    history (where items are users, whoever asks), 0 for none; None bars nothing.
    """

    histories: Sequence[NDArray[np.int64]]
    targets: NDArray[np.int64]
    users: NDArray[np.int64] | None = None
    barred: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.targets)


def index_interactions(users: Sequence[str], items: Sequence[str]) -> Interactions:
    """Number users and items; events must be in time order.

    Items are numbered by how often they occur, most often first (ties by id), so that a table cut
    short keeps what matters.
    """
    names, inverse, counts = np.unique(np.asarray(items), return_inverse=True, return_counts=True)
    order = np.lexsort((names, -counts))
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(1, len(names) + 1)
    _, user_index = np.unique(np.asarray(users), return_inverse=True)
    return Interactions(
        user_index.astype(np.int64), rank[inverse], tuple(str(name) for name in names[order])
    )


def index_by(users: Sequence[str], items: Sequence[str], item_ids: Sequence[str]) -> Interactions:
    """Number items as a bundle does; events with items that it does not know are left out."""
    place = {item: number for number, item in enumerate(item_ids, start=1)}
    numbers = np.array([place.get(str(item), 0) for item in items], dtype=np.int64)
    known = numbers > 0
    _, user_index = np.unique(np.asarray(users)[known], return_inverse=True)
    return Interactions(user_index.astype(np.int64), numbers[known], tuple(item_ids))


@dataclass(frozen=True)
class Split:
    """What to learn from, what to choose by, and what to be judged by once."""

    name: str
    train: list[NDArray[np.int64]]
    validation: Queries
    test: Queries


#: Names of the splits, with the share of time before the test for those by time.
LEAVE_ONE_OUT, BY_TIME, EVERYTHING = "leave-one-out", "time", "all"
TRAIN_END, TEST_START = 0.75, 0.8
_ALL_TRAIN_END = 0.95


def split(data: Interactions, name: str, *, limit: int | None = None, seed: int = 0) -> Split:
    """Divide events.

    Args:
        name: `leave-one-out`, the protocol of most published figures, which lets a model see other
            users' future; or `time`: train on the first 75 % of events, choose by the next 5 %,
            test on the last 20 %, which is what a worker meets; or `all`: choose by the last 5 %,
            test on nothing.
        limit: at most this many validation and test queries, drawn at random.

    Raises:
        ValueError: there is no such split.
    """
    if name == LEAVE_ONE_OUT:
        train, validation, test = leave_one_out(data)
    elif name == BY_TIME:
        train = data.until(TRAIN_END).sequences()
        validation = next_events(data, TRAIN_END, TEST_START, limit=limit, seed=seed)
        test = next_events(data, TEST_START, 1.0, limit=limit, seed=seed)
    elif name == EVERYTHING:
        train = data.until(_ALL_TRAIN_END).sequences()
        validation = next_events(data, _ALL_TRAIN_END, 1.0, limit=limit, seed=seed)
        test = _queries([])
    else:
        raise ValueError(f"no split {name!r}; there are {LEAVE_ONE_OUT}, {BY_TIME}, {EVERYTHING}")
    return Split(name, train, sample(validation, limit, seed), sample(test, limit, seed))


def before_test(data: Interactions, name: str) -> list[NDArray[np.int64]]:
    """Sequences of all events that the split does not test on: train and validation together."""
    if name == LEAVE_ONE_OUT:
        return [s[:-1] if len(s) >= 3 else s for s in data.sequences()]
    return data.until(TEST_START if name == BY_TIME else 1.0).sequences()


def sample(queries: Queries, limit: int | None, seed: int = 0) -> Queries:
    """At most `limit` queries, drawn at random, order kept."""
    if limit is None or len(queries) <= limit:
        return queries
    chosen = _drawn(np.arange(len(queries)), limit, seed)
    users = queries.users[chosen] if queries.users is not None else None
    barred = queries.barred[chosen] if queries.barred is not None else None
    return Queries([queries.histories[n] for n in chosen], queries.targets[chosen], users, barred)


def _drawn(places: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    if limit is None or len(places) <= limit:
        return places
    return places[np.sort(np.random.default_rng(seed).choice(len(places), limit, replace=False))]


def leave_one_out(
    data: Interactions,
) -> tuple[list[NDArray[np.int64]], Queries, Queries]:
    """Train sequences, validation and test queries: each user's last item is the test target, the
    one before it the validation target (Kang & McAuley, ICDM 2018)."""
    train, validation, test, users = [], [], [], []
    for user, sequence in enumerate(data.sequences()):
        if len(sequence) < 3:
            train.append(sequence)
            continue
        train.append(sequence[:-2])
        validation.append((sequence[:-2], sequence[-2]))
        test.append((sequence[:-1], sequence[-1]))
        users.append(user)
    asked = np.array(users, dtype=np.int64)
    return (
        train,
        replace(_queries(validation), users=asked),
        replace(_queries(test), users=asked),
    )


def next_events(
    data: Interactions, start: float, end: float, *, limit: int | None = None, seed: int = 0
) -> Queries:
    """Every event between two shares of the time line, asked with the user's history before it.

    This is what the worker is asked in production: the model is older than the history.

    Args:
        limit: at most this many, as `sample` draws them, so that no other history is built.
    """
    first, last = int(len(data.users) * start), int(len(data.users) * end)
    users = data.users[:last]
    begun = np.full(data.user_count, last)
    np.minimum.at(begun, users, np.arange(last))
    asked = np.flatnonzero(begun[users] < np.arange(last))
    asked = _drawn(asked[asked >= first], limit, seed)
    wanted = np.zeros(last, dtype=bool)
    wanted[asked] = True
    past: dict[int, list[int]] = {}
    pairs = []
    for user, item, now in zip(
        users.tolist(), data.items[:last].tolist(), wanted.tolist(), strict=True
    ):
        history = past.setdefault(user, [])
        if now:
            pairs.append((np.array(history, dtype=np.int64), item))
        history.append(item)
    return replace(_queries(pairs), users=users[asked])


def padded(histories: Sequence[NDArray[np.int64]], length: int) -> NDArray[np.int64]:
    """int64 `[batch, length]`: the last `length` items of each, zeros on the left."""
    tensor = np.zeros((len(histories), length), dtype=np.int64)
    for row, history in enumerate(histories):
        kept = history[-length:]
        if len(kept):
            tensor[row, length - len(kept) :] = kept
    return tensor


def windows(sequences: Sequence[NDArray[np.int64]], length: int) -> NDArray[np.int64]:
    """int64 `[windows, length + 1]`: each sequence cut from its end, so that every item but a
    sequence's first is a target once."""
    cut = []
    for sequence in sequences:
        end = len(sequence)
        while end >= 2:
            cut.append(sequence[max(0, end - length - 1) : end])
            end -= length
    return padded(cut, length + 1)


def _queries(pairs: Sequence[tuple[NDArray[np.int64], int]]) -> Queries:
    return Queries(
        [history for history, _ in pairs], np.array([target for _, target in pairs], dtype=np.int64)
    )
