"""Interactions as per-user sequences of model indexes, and the splits that evaluation uses.

Every rating counts as an interaction, as is usual for sequential recommendation. All items are
kept: the worker must know each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        return int(self.users.max()) + 1

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

    `histories`: items seen before, oldest first; `targets`: int64 `[queries]`.
    """

    histories: Sequence[NDArray[np.int64]]
    targets: NDArray[np.int64]

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


def leave_one_out(
    data: Interactions,
) -> tuple[list[NDArray[np.int64]], Queries, Queries]:
    """Train sequences, validation and test queries: each user's last item is the test target, the
    one before it the validation target (Kang & McAuley, ICDM 2018)."""
    train, validation, test = [], [], []
    for sequence in data.sequences():
        if len(sequence) < 3:
            train.append(sequence)
            continue
        train.append(sequence[:-2])
        validation.append((sequence[:-2], sequence[-2]))
        test.append((sequence[:-1], sequence[-1]))
    return train, _queries(validation), _queries(test)


def next_events(data: Interactions, start: float, end: float) -> Queries:
    """Every event between two shares of the time line, asked with the user's history before it.

    This is what the worker is asked in production: the model is older than the history.
    """
    first, last = int(len(data.users) * start), int(len(data.users) * end)
    past: dict[int, list[int]] = {}
    asked = []
    for position in range(last):
        user, item = int(data.users[position]), int(data.items[position])
        history = past.setdefault(user, [])
        if position >= first and history:
            asked.append((np.array(history, dtype=np.int64), item))
        history.append(item)
    return _queries(asked)


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
