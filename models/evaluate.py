"""Full-ranking evaluation: every item of the catalogue is a candidate, seen items are filtered.

Sampled metrics rank models inconsistently (Krichene & Rendle, KDD 2020), so none are offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.dataset import Queries, padded
from worker.bundle import Bundle

#: int64 histories `[batch, length]` -> float32 scores `[batch, item_count]` of items 1...
Score = Callable[[NDArray[np.int64]], NDArray[np.float32]]

AT = 10


@dataclass(frozen=True)
class Accuracy:
    """Means over queries, in 0..1."""

    hit_rate: float
    ndcg: float
    mrr: float
    queries: int

    def as_metrics(self, prefix: str = "") -> dict[str, float]:
        """For a manifest or a report."""
        return {
            f"{prefix}hr@{AT}": self.hit_rate,
            f"{prefix}ndcg@{AT}": self.ndcg,
            f"{prefix}mrr@{AT}": self.mrr,
        }


def accuracy(ranks: NDArray[np.int64]) -> Accuracy:
    """HR, NDCG and MRR at 10 of int64 ranks `[queries]`, 0 for the first place."""
    hit = ranks < AT
    return Accuracy(
        hit_rate=float(hit.mean()) if len(ranks) else 0.0,
        ndcg=float(np.where(hit, 1.0 / np.log2(ranks + 2.0), 0.0).mean()) if len(ranks) else 0.0,
        mrr=float(np.where(hit, 1.0 / (ranks + 1.0), 0.0).mean()) if len(ranks) else 0.0,
        queries=len(ranks),
    )


def ranks(score: Score, queries: Queries, *, length: int, batch: int = 256) -> NDArray[np.int64]:
    """Rank int64 `[queries]` of each target among the items its user has not seen.

    The target itself stays a candidate where it was seen before. Ties count against the model.
    """
    found = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), batch):
        histories = queries.histories[start : start + batch]
        targets = queries.targets[start : start + batch]
        # One size of tensor: JAX compiles once.
        tensor = np.zeros((batch, length), dtype=np.int64)
        tensor[: len(histories)] = padded(histories, length)
        table = np.array(score(tensor)[: len(histories)])
        rows = np.arange(len(histories))
        own = table[rows, targets - 1].copy()
        for row, history in enumerate(histories):
            table[row, history - 1] = -np.inf
        table[rows, targets - 1] = -np.inf
        found[start : start + batch] = (table >= own[:, None]).sum(axis=1)
    return found


def bundle_score(bundle: Bundle) -> Score:
    """Scores through the very bundle that serves."""
    count = bundle.manifest.item_count

    def score(history: NDArray[np.int64]) -> NDArray[np.float32]:
        items, values = bundle.score(history, count)
        table = np.empty((len(history), count), dtype=np.float32)
        np.put_along_axis(table, items - 1, values, axis=1)
        return table

    return score


def popularity_score(train_items: NDArray[np.int64], item_count: int) -> Score:
    """The baseline: how often an item occurs in training, whoever asks."""
    counts = np.bincount(train_items, minlength=item_count + 1)[1:].astype(np.float32)
    return lambda history: np.tile(counts, (len(history), 1))
