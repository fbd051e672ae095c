"""From histories to candidates: one run of the bundle for all users of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from worker.bundle import Bundle
from worker.history import History, known_indexes


class Candidates:
    """Candidates of one batch of users: model indexes and scores, both `[batch, k]`."""

    def __init__(
        self, bundle: Bundle, items: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> None:
        self._bundle = bundle
        self._items = items
        self._scores = scores

    @property
    def count(self) -> int:
        """Candidates per user."""
        return int(self._items.shape[1])

    def of(self, row: int) -> Iterator[tuple[str, float]]:
        """Item ids and scores of one user, best first."""
        names = self._bundle.items
        for index, score in zip(self._items[row].tolist(), self._scores[row].tolist(), strict=True):
            yield names[index - 1], score


def model_inputs(
    histories: Sequence[History], bundle: Bundle
) -> tuple[NDArray[np.int64], list[int]]:
    """Padded histories int64 `[batch, length]` of those users that the model can score.

    Returns:
        The tensor, most recent item last, and the positions in `histories` of its rows. A user
        whose known history is shorter than the manifest's `min_length` is left out.
    """
    manifest = bundle.manifest
    rows: list[list[int]] = []
    positions: list[int] = []
    for position, history in enumerate(histories):
        known = known_indexes(history.items, bundle.index, manifest.max_length)
        if len(known) >= max(1, manifest.min_length):
            rows.append(known)
            positions.append(position)
    tensor = np.zeros((len(rows), manifest.max_length), dtype=np.int64)
    for row, known in enumerate(rows):
        tensor[row, manifest.max_length - len(known) :] = known
    return tensor, positions


def score(bundle: Bundle, history: NDArray[np.int64], count: int) -> Candidates:
    """The `count` best candidates for each row of `history`, int64 `[batch, length]`."""
    items, scores = bundle.score(history, min(count, bundle.manifest.item_count))
    return Candidates(bundle, items, scores)
