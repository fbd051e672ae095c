"""From histories to candidates: one run of the bundle for all users of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from worker.bundle import Bundle
from worker.cold_items import ColdIndex
from worker.history import History, known_indexes


class Candidates:
    """Candidates of one batch of users: indexes and scores, both `[batch, k]`.

    Args:
        items: model indexes; those above `bundle.manifest.item_count` are places in `cold`.
        complete: whether the model gives nothing beyond these.
    """

    def __init__(
        self,
        bundle: Bundle,
        items: NDArray[np.int64],
        scores: NDArray[np.float32],
        *,
        complete: bool,
        cold: Sequence[str] = (),
    ) -> None:
        self._names = bundle.items
        self._items = items
        self._scores = scores
        self._cold = cold
        self.complete = complete

    def of(self, row: int) -> Iterator[tuple[str, float]]:
        """Item ids and scores of one user, best first."""
        names, cold, known = self._names, self._cold, len(self._names)
        for index, score in zip(self._items[row].tolist(), self._scores[row].tolist(), strict=True):
            yield names[index - 1] if index <= known else cold[index - known - 1], score


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


def score(
    bundle: Bundle, history: NDArray[np.int64], count: int, cold: ColdIndex | None = None
) -> Candidates:
    """The `count` best candidates for each row of `history`, int64 `[batch, length]`.

    With `cold`, up to as many cold items come in between them, by score.
    """
    known, most = bundle.manifest.item_count, bundle.manifest.most
    kept, complete = min(count, most), count >= most
    if cold is None:
        items, scores = bundle.score(history, kept)
        return Candidates(bundle, items, scores, complete=complete)
    items, scores, states = bundle.score_with_states(history, kept)
    places, cold_scores = cold.best(states, len(cold) if complete else count)
    items = np.concatenate([items, places + (known + 1)], axis=1)
    scores = np.concatenate([scores, cold_scores], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    if not complete:
        # Below the model's last candidate an item of the catalogue may be missing.
        order = order[:, :kept]
    return Candidates(
        bundle,
        np.take_along_axis(items, order, axis=1),
        np.take_along_axis(scores, order, axis=1),
        complete=complete,
        cold=cold.items,
    )
