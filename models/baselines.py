"""Strong, cheap baselines: what a neural model has to beat. Counts and one matrix inversion.

Each is fitted to int64 train sequences of model indexes (from 1), oldest first, and gives a `Score`
(models/evaluate.py). `recency` weighs the history that is asked about: the item `n` places before
the last counts `recency**n`; 1.0 takes the history as a set. That choice matters more than the
model. MovieLens 1M, items with 5 ratings or more, leave-one-out, full ranking, parameters chosen on
validation, HR@10 / NDCG@10 on test:

    popularity          0.037 / 0.018
    item_knn            0.086 / 0.043, with recency 0.7: 0.173 / 0.096
    ease                0.109 / 0.054, with recency 0.8: 0.232 / 0.129
    sequential_rules    0.278 / 0.162, with its defaults: 0.277 / 0.161

Histories longer than the `length` given to `models.evaluate.ranks` are cut there; with a recency
of 0.9 the last 50 items hold 99 % of the weight, with 1.0 give the longest history's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray

from models.evaluate import Score
from worker.errors import StreamrecError

#: EASE holds two dense float32 matrices of items by items: 3.2 GB at this many.
EASE_MOST_ITEMS = 20_000
#: Similarities computed at once by item_knn.
_BLOCK = 4_000_000

Sequences = Sequence[NDArray[np.int64]]


class BaselineError(StreamrecError):
    """A baseline cannot be fitted to these data, or not with these parameters."""

    exit_code = 65


def popularity_score(train_items: NDArray[np.int64], item_count: int) -> Score:
    """How often an item occurs in training, whoever asks."""
    counts = np.bincount(train_items, minlength=item_count + 1)[1:].astype(np.float32)
    return lambda history: np.tile(counts, (len(history), 1))


def ease(train_sequences: Sequences, item_count: int, *, l2: float, recency: float = 1.0) -> Score:
    """EASE: the linear item-to-item model with a zero diagonal, in closed form (Steck,
    "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019).

    Args:
        l2: weight of the squared-norm penalty; hundreds to thousands.

    Raises:
        BaselineError: there are too many items, or a parameter is out of range.
    """
    _check(l2 > 0.0, f"l2 is {l2}: give a number above 0")
    _check(
        item_count <= EASE_MOST_ITEMS,
        f"EASE inverts a dense matrix of {item_count} x {item_count} items (at most"
        f" {EASE_MOST_ITEMS}): use item_knn or sequential_rules",
    )
    seen = _matrix(train_sequences, item_count)
    gram = (seen.T @ seen).toarray()
    diagonal = np.diag_indices(item_count)
    gram[diagonal] += l2
    inverse = scipy.linalg.inv(gram, overwrite_a=True, check_finite=False)
    weights = inverse / -inverse[diagonal]
    weights[diagonal] = 0.0
    return _linear(weights.astype(np.float32), recency)


def item_knn(
    train_sequences: Sequences,
    item_count: int,
    *,
    neighbours: int,
    shrink: float,
    recency: float = 1.0,
) -> Score:
    """Each item's most similar `neighbours`, by the cosine of who saw them, shrunk where few did:
    `both / (sqrt(n_i * n_j) + shrink)` (Dacrema et al., "A Troubling Analysis", TOIS 2021).

    Works at 100,000 items and more: only the neighbours are kept.

    Raises:
        BaselineError: a parameter is out of range.
    """
    _check(neighbours >= 1, f"neighbours is {neighbours}: give 1 or more")
    _check(shrink >= 0.0, f"shrink is {shrink}: give 0 or more")
    seen = _matrix(train_sequences, item_count)
    by_item = seen.T.tocsr()
    norms = np.sqrt(np.diff(by_item.indptr)).astype(np.float32)
    step = max(1, _BLOCK // item_count)
    targets: list[NDArray[Any]] = [np.empty(0, dtype=np.int64)]
    sources: list[NDArray[Any]] = [np.empty(0, dtype=np.int64)]
    values: list[NDArray[Any]] = [np.empty(0, dtype=np.float32)]
    for start in range(0, item_count, step):
        both = (by_item[start : start + step] @ seen).tocsr()
        for row, (first, end) in enumerate(pairwise(both.indptr.tolist())):
            if first == end:
                continue
            target, others = start + row, both.indices[first:end]
            similar = both.data[first:end] / (norms[target] * norms[others] + shrink)
            similar[others == target] = 0.0
            kept = np.argpartition(-similar, min(neighbours, len(similar)) - 1)[:neighbours]
            kept = kept[similar[kept] > 0.0]
            targets.append(np.full(len(kept), target))
            sources.append(others[kept])
            values.append(similar[kept])
    weights = sp.csr_array(
        (np.concatenate(values), (np.concatenate(sources), np.concatenate(targets))),
        shape=(item_count, item_count),
    )
    return _linear(weights, recency)


def sequential_rules(
    train_sequences: Sequences,
    item_count: int,
    *,
    steps: int = 20,
    recency: float = 0.8,
    penalty: float = 0.3,
    shrink: float = 10.0,
) -> Score:
    """How often an item came within `steps` after another, nearer ones counting more (`recency` a
    step): first-order transitions smoothed over time, known as sequential rules (Ludewig & Jannach,
    "Evaluation of Session-based Recommendation Algorithms", UMUAI 2018).

    The count is divided by `n_first**(1 - penalty) * n_next**penalty + shrink`: a penalty of 0
    makes it a conditional probability, 0.5 a cosine.

    Raises:
        BaselineError: a parameter is out of range.
    """
    _check(steps >= 1, f"steps is {steps}: give 1 or more")
    _check(0.0 <= penalty <= 1.0, f"penalty is {penalty}: give 0 to 1")
    _check(shrink >= 0.0, f"shrink is {shrink}: give 0 or more")
    counts = sp.csr_array((item_count, item_count), dtype=np.float32)
    for gap in range(1, steps + 1):
        long_enough = [sequence for sequence in train_sequences if len(sequence) > gap]
        if not long_enough:
            break
        first = np.concatenate([sequence[:-gap] for sequence in long_enough]) - 1
        after = np.concatenate([sequence[gap:] for sequence in long_enough]) - 1
        found = np.full(len(first), recency ** (gap - 1), dtype=np.float32)
        other = first != after
        counts += sp.csr_array((found[other], (first[other], after[other])), shape=counts.shape)
    left, right = counts.sum(axis=1), counts.sum(axis=0)
    pairs = counts.tocoo()
    scale = left[pairs.row] ** (1.0 - penalty) * right[pairs.col] ** penalty + shrink
    weights = sp.csr_array((pairs.data / scale, (pairs.row, pairs.col)), shape=counts.shape)
    return _linear(weights.astype(np.float32), recency)


def _linear(weights: Any, recency: float) -> Score:
    """Scores by what each item of the history adds; `weights` `[items, items]`, dense or sparse."""
    _check(0.0 < recency <= 1.0, f"recency is {recency}: give a number above 0, at most 1")

    def score(history: NDArray[np.int64]) -> NDArray[np.float32]:
        found = _matrix(history, weights.shape[0], recency) @ weights
        dense = found.toarray() if sp.issparse(found) else found
        return np.asarray(dense, dtype=np.float32)

    return score


def _matrix(
    sequences: Sequence[NDArray[np.int64]] | NDArray[np.int64],
    item_count: int,
    recency: float = 1.0,
) -> Any:
    """Sparse float32 `[sequences, items]`: the weight of an item's last place in each sequence.

    Index 0 is padding and counts for nothing.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    items = np.concatenate([*sequences, np.empty(0, dtype=np.int64)])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    ages = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(items))
    real = items > 0
    keys = rows[real] * item_count + items[real] - 1
    # Of an item's repeats the last counts: unique() keeps the first it sees.
    _, last = np.unique(keys[::-1], return_index=True)
    last = len(keys) - 1 - last
    weights = np.float32(recency) ** ages[real][last].astype(np.float32)
    return sp.csr_array(
        (weights, (rows[real][last], items[real][last] - 1)), shape=(len(lengths), item_count)
    )


def _check(right: bool, message: str) -> None:
    if not right:
        raise BaselineError(message)
