"""Items that the serving model has never seen, known by their text alone. No I/O.

A post published a minute ago has no row in the model's item table. Its text gives it a vector of
the same space, so that it is scored like any other item until a newer model knows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from worker.bundle import Bundle
from worker.text import MAX_TEXT_CHARS


@dataclass(frozen=True)
class ColdIndex:
    """Cold items as one bundle sees them: `vectors` is float32 `[cold, width]`."""

    items: tuple[str, ...]
    vectors: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.items)

    def best(
        self, states: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places in `items` and scores, both `[batch, min(count, cold)]`, of the best items for
        float32 `states` `[batch, width]`; in no order."""
        scores = states @ self.vectors.T
        if count >= len(self):
            places = np.broadcast_to(np.arange(len(self)), scores.shape)
            return places, scores
        places = np.argpartition(scores, -count, axis=1)[:, -count:]
        return places, np.take_along_axis(scores, places, axis=1)


class ColdItems:
    """The texts of one surface's cold items, at most `max_items`, and their vectors.

    Texts are kept apart from vectors: each bundle that serves has vectors of its own, and what is
    cold for one may be warm for another.

    Args:
        max_items: beyond it, the tenth that came first goes. With `MAX_TEXT_CHARS` of text each it
            bounds memory, and with that the time of scoring.
        ttl_s: an item goes this long after it was first seen.
    """

    def __init__(self, *, max_items: int, ttl_s: float) -> None:
        self._max_items = max_items
        self._ttl_s = ttl_s
        #: Text and when it was first seen (Unix time), in order of coming.
        self._texts: dict[str, tuple[str, float]] = {}
        #: By path of the bundle.
        self._views: dict[Path, _View] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def note(self, item: str, text: str, seen_s: float) -> bool:
        """Keep the text of `item`; False where it is known already: the first text counts."""
        if item in self._texts or self._max_items < 1:
            return False
        text = text[:MAX_TEXT_CHARS]
        self._texts[item] = (text, seen_s)
        for view in self._views.values():
            view.pending[item] = text
        if len(self._texts) > self._max_items:
            self._forget(list(self._texts)[: 1 + self._max_items // 10])
        return True

    def expire(self, now_s: float) -> None:
        """Let items go whose time is over."""
        oldest_s = now_s - self._ttl_s
        self._forget([item for item, (_, seen_s) in self._texts.items() if seen_s < oldest_s])

    def _forget(self, items: Sequence[str]) -> None:
        for item in items:
            del self._texts[item]
        for view in self._views.values():
            for item in items:
                view.pending.pop(item, None)
            index = view.index
            if items and index is not None:
                kept = [at for at, item in enumerate(index.items) if item in self._texts]
                view.index = (
                    ColdIndex(tuple(index.items[at] for at in kept), index.vectors[kept])
                    if kept
                    else None
                )

    def keep(self, bundles: Iterable[Bundle]) -> None:
        """Drop the vectors of all other bundles."""
        paths = {bundle.path for bundle in bundles}
        for path in self._views.keys() - paths:
            del self._views[path]

    def index(self, bundle: Bundle) -> ColdIndex | None:
        """Items with a vector of `bundle`; None where there are none."""
        view = self._views.get(bundle.path)
        return None if view is None else view.index

    def without_vector(self, bundle: Bundle) -> dict[str, str]:
        """Texts by item that `bundle` has to encode before `index` is complete."""
        view = self._views.get(bundle.path)
        if view is None:
            texts = {item: text for item, (text, _) in self._texts.items()}
            view = self._views[bundle.path] = _View(texts)
        known = [item for item in view.pending if item in bundle.index]
        for item in known:
            del view.pending[item]
        return dict(view.pending)

    def add_vectors(
        self, bundle: Bundle, items: Sequence[str], vectors: NDArray[np.float32]
    ) -> None:
        """Take in what `bundle` made of `without_vector`: float32 `[items, width]`."""
        view = self._views[bundle.path]
        for item in items:
            view.pending.pop(item, None)
        # Some may have gone while they were encoded.
        kept = [at for at, item in enumerate(items) if item in self._texts]
        items, vectors = [items[at] for at in kept], vectors[kept]
        if view.index is not None:
            items = (*view.index.items, *items)
            vectors = np.concatenate([view.index.vectors, vectors])
        view.index = ColdIndex(tuple(items), vectors) if items else None


@dataclass(slots=True)
class _View:
    """Cold items as one bundle sees them."""

    #: Texts of items that still need a vector.
    pending: dict[str, str]
    index: ColdIndex | None = None
