"""Items that the serving model has never seen, known by their text alone. No I/O.

A post published a minute ago has no row in the model's item table. Its text gives it a vector of
the same space, so that it is scored like any other item until a newer model knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    Texts are kept apart from vectors: a model swap makes new vectors, and may make items warm (or
    cold again, when it is taken back).

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
        #: Items that still need a vector from the bundle at `_path`.
        self._pending: dict[str, str] = {}
        self._path: Path | None = None
        #: Items with a vector; None where there are none.
        self.index: ColdIndex | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def note(self, item: str, text: str, seen_s: float) -> bool:
        """Keep the text of `item`; False where it is known already: the first text counts."""
        if item in self._texts or self._max_items < 1:
            return False
        text = text[:MAX_TEXT_CHARS]
        self._texts[item] = (text, seen_s)
        self._pending[item] = text
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
            self._pending.pop(item, None)
        if items and self.index is not None:
            kept = [at for at, item in enumerate(self.index.items) if item in self._texts]
            self.index = (
                ColdIndex(tuple(self.index.items[at] for at in kept), self.index.vectors[kept])
                if kept
                else None
            )

    def without_vector(self, bundle: Bundle) -> dict[str, str]:
        """Texts by item that `bundle` has to encode before `index` is complete."""
        if bundle.path != self._path:
            self._path, self.index = bundle.path, None
            self._pending = {item: text for item, (text, _) in self._texts.items()}
        known = [item for item in self._pending if item in bundle.index]
        for item in known:
            del self._pending[item]
        return dict(self._pending)

    def add_vectors(self, items: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Take in what the bundle made of `without_vector`: float32 `[items, width]`."""
        for item in items:
            self._pending.pop(item, None)
        # Some may have gone while they were encoded.
        kept = [at for at, item in enumerate(items) if item in self._texts]
        items, vectors = [items[at] for at in kept], vectors[kept]
        if self.index is not None:
            items = (*self.index.items, *items)
            vectors = np.concatenate([self.index.vectors, vectors])
        self.index = ColdIndex(tuple(items), vectors) if items else None
