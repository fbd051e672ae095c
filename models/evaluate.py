"""Full-ranking evaluation: every item of the catalogue is a candidate, seen items are filtered.

Sampled metrics rank models inconsistently (Krichene & Rendle, KDD 2020), so none are offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.dataset import Queries, padded
from worker.bundle import Bundle

#: int64 histories `[batch, length]` -> float32 scores `[batch, item_count]` of items 1...
Score = Callable[[NDArray[np.int64]], NDArray[np.float32]]

AT = 10
#: Scores that one batch may hold.
_MAX_SCORES = 1 << 25


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


@dataclass(frozen=True)
class Ranked:
    """What a model answered to each query.

    `ranks`: int64 `[queries]`, of the target among the unseen items, 0 for the first place;
    `top`: int64 `[queries, 10]`, the best unseen items, 0 past the end of a shorter list.
    """

    ranks: NDArray[np.int64]
    top: NDArray[np.int64]


def ranks(score: Score, queries: Queries, *, length: int, batch: int = 256) -> NDArray[np.int64]:
    """Rank int64 `[queries]` of each target among the items its user has not seen.

    The target itself stays a candidate where it was seen before. Ties count against the model.
    """
    found = [ranks for ranks, _ in _answers(score, queries, length, batch)]
    return np.concatenate([*found, np.empty(0, dtype=np.int64)])


def ranked(score: Score, queries: Queries, *, length: int, batch: int = 256) -> Ranked:
    """Ranks, as `ranks` gives them, and the ten best unseen items, in one pass."""
    found, best = [np.empty(0, dtype=np.int64)], [np.empty((0, AT), dtype=np.int64)]
    for own, table in _answers(score, queries, length, batch):
        found.append(own)
        best.append(_top(table))
    return Ranked(np.concatenate(found), np.concatenate(best))


def bundle_ranked(
    bundle: Bundle,
    queries: Queries,
    item_ids: Sequence[str],
    *,
    length: int | None = None,
    batch: int = 256,
) -> Ranked:
    """`ranked` of a bundle that may number its items otherwise than the queries do.

    Args:
        queries: in the numbering of `item_ids`.
        item_ids: the item of index i is `item_ids[i - 1]`.
        length: items of a history to read, `max_length` by default; a recurrent bundle takes more.

    Returns:
        Lists in the numbering of `item_ids`, 0 for items that it lacks. A target that the bundle
        does not know, or that no known item precedes, counts as not found.
    """
    length = length or bundle.manifest.max_length
    # Half a gigabyte of scores and indexes at most.
    batch = max(1, min(batch, _MAX_SCORES // bundle.manifest.item_count))
    if tuple(item_ids) == bundle.items:
        return ranked(bundle_score(bundle), queries, length=length, batch=batch)
    there = translation(item_ids, bundle)
    back = np.zeros(len(bundle.items) + 1, dtype=np.int64)
    back[there] = np.arange(len(there))
    back[0] = 0
    known = translated(queries.histories, there)
    empty = np.array([not len(history) for history in known], dtype=bool)
    targets = np.where(empty, 0, there[queries.targets])
    barred = there[queries.barred] if queries.barred is not None else None
    found = ranked(
        bundle_score(bundle),
        Queries(known, targets, queries.users, barred),
        length=length,
        batch=batch,
    )
    return Ranked(found.ranks, np.where(empty[:, None], 0, back[found.top]))


def translation(item_ids: Sequence[str], bundle: Bundle) -> NDArray[np.int64]:
    """int64 `[1 + items]`: the bundle's index by index in `item_ids`, 0 for what it lacks."""
    return np.array([0, *(bundle.index.get(item, 0) for item in item_ids)], dtype=np.int64)


def translated(
    histories: Sequence[NDArray[np.int64]], there: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Histories in another numbering, less the items that it lacks; `there` is a `translation`."""
    return [moved[moved > 0] for moved in (there[history] for history in histories)]


def _answers(
    score: Score, queries: Queries, length: int, batch: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """By batch: ranks int64 `[batch]`, and scores `[batch, item_count]`, -inf for seen items."""
    batch = min(batch, len(queries))
    for start in range(0, len(queries), max(batch, 1)):
        histories = queries.histories[start : start + batch]
        targets = queries.targets[start : start + batch]
        # One size of tensor: JAX compiles once. Repeated rows do not move the ranges that
        # dynamically quantized models take from the batch.
        tensor = np.empty((batch, length), dtype=np.int64)
        tensor[: len(histories)] = padded(histories, length)
        tensor[len(histories) :] = tensor[len(histories) - 1]
        table = np.array(score(tensor)[: len(histories)])
        rows = np.arange(len(histories))
        own = np.where(targets > 0, table[rows, targets - 1], -np.inf)
        seen = np.repeat(rows, [len(history) for history in histories])
        table[seen, np.concatenate(histories) - 1] = -np.inf
        if queries.barred is not None:
            barred = queries.barred[start : start + batch]
            table[rows[barred > 0], barred[barred > 0] - 1] = -np.inf
        others = table.copy()
        others[rows, targets - 1] = -np.inf
        # So written, what is not a number counts against the model too. A target without a score
        # is not found, however few items there are.
        before = (~(others < own[:, None])).sum(axis=1)
        yield before + AT * np.isneginf(own), table


def _top(table: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 `[batch, 10]`: indexes of the best finite scores, 0 where there are fewer."""
    count = min(AT, table.shape[1])
    best = np.argpartition(-table, count - 1, axis=1)[:, :count]
    values = np.take_along_axis(table, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    best = np.take_along_axis(best, order, axis=1)
    found = np.isfinite(np.take_along_axis(values, order, axis=1))
    top = np.zeros((len(table), AT), dtype=np.int64)
    top[:, :count] = np.where(found, best + 1, 0)
    return top


def bundle_accuracy(bundle: Bundle, queries: Queries) -> Accuracy:
    """Accuracy of a bundle that numbers its items as the queries do."""
    found = ranks(bundle_score(bundle), queries, length=bundle.manifest.max_length)
    return accuracy(found)


def bundle_score(bundle: Bundle) -> Score:
    """Scores through the very bundle that serves; -inf for items that it gives no score.

    Graphs with approximate retrieval return no more than `max_k` candidates.
    """
    count, k = bundle.manifest.item_count, bundle.manifest.most

    def score(history: NDArray[np.int64]) -> NDArray[np.float32]:
        items, values = bundle.score(history, k)
        table = np.full((len(history), count), -np.inf, dtype=np.float32)
        np.put_along_axis(table, items - 1, values, axis=1)
        return table

    return score
