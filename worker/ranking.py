"""From candidates to the list that is served: seen filter, rules, caps, top-k. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from typing import Literal

import msgspec

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


class Filter:
    """Decides which items of `surface` may be shown, by rules alone."""

    def __init__(self, rules: Rules, surface: Surface) -> None:
        own = rules.of(surface)
        self._block = rules.block
        self._allow = own.allow
        self._authors = rules.authors
        self._max_per_author = own.max_per_author

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
