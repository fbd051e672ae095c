"""NDCG of re-ranked groups, with ties taken fairly, and how sure a difference is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

AT = 10


def ndcg_by_group(
    scores: NDArray[np.float64], labels: NDArray[np.float64], groups: NDArray[np.int64]
) -> NDArray[np.float64]:
    """float64 `[groups with a positive label]`: NDCG@10 of rows ordered by score within a group.

    Rows with equal scores share the mean gain of their places (McSherry & Najork, ECIR 2008):
    compressed trees tie often, and the order of the file must not decide. Gain is the label.
    """
    names, group = np.unique(groups, return_inverse=True)
    order = np.lexsort((-scores, group))
    group, score, gain = group[order], scores[order], labels[order]
    starts = np.searchsorted(group, np.arange(len(names)))
    tied = np.concatenate([[True], (np.diff(group) != 0) | (np.diff(score) != 0)]).cumsum() - 1
    shared = np.bincount(tied, weights=gain) / np.bincount(tied)
    reached = _dcg(shared[tied], group, starts)
    best = np.lexsort((-labels, groups))
    ideal = _dcg(labels[best], group, starts)
    positive = ideal > 0
    return np.asarray(reached[positive] / ideal[positive])


def bootstrap_interval(
    differences: NDArray[np.float64], *, rounds: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of paired differences `[groups]`, by resampling groups."""
    rng = np.random.default_rng(seed)
    count = len(differences)
    means = [differences[rng.integers(0, count, count)].mean() for _ in range(rounds)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _dcg(
    gain: NDArray[np.float64], group: NDArray[np.int64], starts: NDArray[np.int64]
) -> NDArray[np.float64]:
    place = np.arange(len(gain)) - starts[group]
    weight = np.where(place < AT, 1.0 / np.log2(place + 2.0), 0.0)
    return np.bincount(group, weights=gain * weight, minlength=len(starts)).astype(np.float64)
