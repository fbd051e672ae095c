"""How good each variant's answers are, and where they differ from the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.dataset import Split
from models.evaluate import AT, Ranked
from models.report.buckets import Bucket, history_buckets, percentiles, popularity_buckets
from models.report.statistics import Bootstrap, Estimate, estimate, gini, relative

Samples = NDArray[np.float64]


class Judge:
    """Judges answers to the test queries of one split.

    Args:
        split: in the reference's numbering.
        item_count: the reference's.
        reference: what the reference answered.
    """

    def __init__(self, split: Split, item_count: int, reference: Ranked, *, seed: int) -> None:
        test = split.test
        users = test.users if test.users is not None else np.arange(len(test))
        self._bootstrap = Bootstrap(users, seed=seed)
        self._reference = reference
        self._counts = popularity(split, item_count)
        self._percentiles = percentiles(self._counts)
        self._buckets = {
            "popularity": popularity_buckets(self._counts, test.targets),
            "history": history_buckets(test),
        }
        self._reference_ndcg = _ndcg(reference.ranks)

    def accuracy(self, ranks: NDArray[np.int64]) -> dict[str, Any]:
        """HR, NDCG and MRR at 10 with their intervals, and the paired change of NDCG."""
        hit = ranks < AT
        ndcg = self._bootstrap.means(_ndcg(ranks))
        theirs = self._bootstrap.means(self._reference_ndcg)
        return {
            "accuracy": {
                f"hr@{AT}": _dict(estimate(self._bootstrap.means(hit.astype(np.float64)))),
                f"ndcg@{AT}": _dict(estimate(ndcg)),
                f"mrr@{AT}": _dict(
                    estimate(self._bootstrap.means(np.where(hit, 1.0 / (ranks + 1.0), 0.0)))
                ),
            },
            "change": {
                "absolute": _dict(estimate(ndcg - theirs)),
                "relative": _dict(estimate(relative(ndcg, theirs))),
            },
        }

    def lists(self, answers: Ranked) -> dict[str, float]:
        """What the lists are like, whatever the targets."""
        top = answers.top
        shown = top[top > 0] - 1
        times = np.bincount(shown, minlength=len(self._counts))
        return {
            f"overlap@{AT}": _overlap(top, self._reference.top),
            f"coverage@{AT}": float((times > 0).mean()),
            "popularity_percentile": float(self._percentiles[shown].mean()) if len(shown) else 0.0,
            "gini": gini(times),
        }

    def buckets(self, ranks: NDArray[np.int64]) -> dict[str, list[dict[str, Any]]]:
        """NDCG@10 by popularity of the target and by length of the history, with its change."""
        return {
            kind: [self._bucket(bucket, ranks) for bucket in buckets if bucket.members.any()]
            for kind, buckets in self._buckets.items()
        }

    def _bucket(self, bucket: Bucket, ranks: NDArray[np.int64]) -> dict[str, Any]:
        ndcg = self._bootstrap.means(_ndcg(ranks), bucket.members)
        theirs = self._bootstrap.means(self._reference_ndcg, bucket.members)
        found: dict[str, Any] = {
            "label": bucket.label,
            "queries": int(bucket.members.sum()),
            f"ndcg@{AT}": _dict(estimate(ndcg)),
            "change": _dict(estimate(relative(ndcg, theirs))),
            "change_absolute": _dict(estimate(ndcg - theirs)),
        }
        return found | ({"item_count": bucket.items} if bucket.items is not None else {})


def popularity(split: Split, item_count: int) -> NDArray[np.int64]:
    """Training interactions of each item, int64 `[items]`."""
    train: Sequence[NDArray[np.int64]] = split.train
    items = np.concatenate([*train, np.empty(0, dtype=np.int64)])
    return np.bincount(items, minlength=item_count + 1)[1:].astype(np.int64)


def _overlap(one: NDArray[np.int64], two: NDArray[np.int64]) -> float:
    """Mean share of the ten places of `one` `[queries, 10]` whose item is also in `two`'s list."""
    found = 0
    for start in range(0, len(one), 4096):
        part = slice(start, start + 4096)
        same = one[part, :, None] == two[part, None, :]
        found += int((same.any(axis=2) & (one[part] > 0)).sum())
    return found / max(one.size, 1)


def _ndcg(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.where(ranks < AT, 1.0 / np.log2(ranks + 2.0), 0.0)
    return found


def _dict(found: Estimate | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)
