"""From candidates to the list that is served: seen filter, rules, caps, top-k. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from worker.events import Surface
from worker.history import History
from worker.rules import Rules

Source = Literal["model", "fallback"]


class Origin(msgspec.Struct, frozen=True, gc=False):
    """The record that caused a recommendation; consumers drop repeats by it."""

    topic: str
    partition: int
    offset: int


class Recommendations(msgspec.Struct, frozen=True, gc=False):
    """What is cached in Redis and published, as JSON."""

    user_id: str
    surface: Surface
    items: list[str]
    #: One per item, descending. Comparable within one list only.
    scores: list[float]
    #: `<model name>@<version>`, or `popularity` where the fallback made the list.
    model_version: str
    source: Source
    #: Epoch milliseconds.
    generated_at_ms: int
    #: The newest event that the list reflects.
    origin: Origin


def not_shown(user_id: str, surface: Surface, history: History) -> set[str]:
    """Items that `user_id` is not shown: seen, hidden, and on friends whom they follow, however
    long ago, and themselves."""
    items = {*history.items, *history.hidden, *history.followed}
    if surface is Surface.FRIENDS:
        items.add(user_id)
    return items


@dataclass(frozen=True, slots=True)
class Picked:
    """What `pick` left of a batch of candidates."""

    #: Model indexes and scores of all rows one after the other, best first within a row.
    items: list[int]
    scores: list[float]
    #: Row r has those from `ends[r - 1]` to `ends[r]`.
    ends: list[int]
    #: Candidates looked at until a row was full, int64 `[batch]`; 0 where it is not.
    depth: NDArray[np.int64]


def pick(
    items: NDArray[np.int64],
    scores: NDArray[np.float32],
    *,
    banned: NDArray[np.int32],
    shown: NDArray[np.bool_] | None,
    count: int,
) -> Picked:
    """The first `count` candidates of each row that may be shown.

    Args:
        items: model indexes `[batch, k]`, best first.
        scores: `[batch, k]`.
        banned: model indexes that a row is not shown `[batch, n]`; 0 stands for none.
        shown: whether an item may be shown to anybody, by model index; None allows all.
    """
    free = ~_among(items, banned)
    if shown is not None:
        free &= shown[items]
    place = free.cumsum(axis=1)
    kept = free & (place <= count)
    full = place[:, -1] >= count
    depth = np.where(full, (place >= count).argmax(axis=1) + 1, 0)
    return Picked(
        items[kept].tolist(), scores[kept].tolist(), kept.sum(axis=1).cumsum().tolist(), depth
    )


def _among(items: NDArray[np.int64], sets: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether each of `items` `[batch, k]` is in its row of `sets` `[batch, n]`."""
    if not sets.size:
        return np.zeros(items.shape, dtype=np.bool_)
    # Rows made disjoint by an offset, sorted each for itself, are sorted as a whole.
    stride = int(max(items.max(initial=0), sets.max())) + 1
    offset = np.arange(len(items))[:, None] * stride
    known = (np.sort(sets, axis=1) + offset).ravel()
    asked = (items + offset).ravel()
    found: NDArray[np.bool_] = known[np.minimum(known.searchsorted(asked), len(known) - 1)] == asked
    return np.reshape(found, items.shape)


class Filter:
    """Decides which items of `surface` may be shown, by rules alone."""

    def __init__(self, rules: Rules, surface: Surface) -> None:
        own = rules.of(surface)
        self._block = rules.block
        self._allow = own.allow
        self._authors = rules.authors
        self._max_per_author = own.max_per_author

    @property
    def capped(self) -> bool:
        """Whether an item may depend on those before it, so that `pick` cannot do it."""
        return self._max_per_author is not None

    def shown(self, items: Sequence[str]) -> NDArray[np.bool_] | None:
        """Whether each of `items` may be shown, `[len(items) + 1]` by model index; None: all."""
        if not self._block and self._allow is None:
            return None
        allowed = [
            item not in self._block and (self._allow is None or item in self._allow)
            for item in items
        ]
        return np.array([False, *allowed])

    def top(
        self, candidates: Iterable[tuple[str, float]], *, exclude: Set[str], count: int
    ) -> tuple[list[str], list[float]]:
        """The first `count` of `candidates` (best first) that may be shown.

        Args:
            exclude: items that this user is not shown.

        Returns:
            Items and scores, both at most `count` long; shorter where candidates ran out.
        """
        items: list[str] = []
        scores: list[float] = []
        shown_of: Counter[str] = Counter()
        for item, score in candidates:
            if item in exclude or item in self._block:
                continue
            if self._allow is not None and item not in self._allow:
                continue
            if self._max_per_author is not None:
                author = self._authors.get(item)
                if author is not None:
                    if shown_of[author] >= self._max_per_author:
                        continue
                    shown_of[author] += 1
            items.append(item)
            scores.append(score)
            if len(items) == count:
                break
        return items, scores
