"""Which queries belong together: by how popular their target is, and by how long the history is.

Compression often hits rare items first. They are few in any average, so they are shown apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.dataset import Queries

#: Shares of the training interactions that the head and the tail hold.
HEAD, TAIL = 0.2, 0.2
#: First length of each bucket of histories.
LENGTHS = (1, 10, 50, 200)


@dataclass(frozen=True)
class Bucket:
    """Some of the queries: `members` is bool `[queries]`; `items` how many items can be targets."""

    label: str
    members: NDArray[np.bool_]
    items: int | None = None


def popularity_buckets(counts: NDArray[np.int64], targets: NDArray[np.int64]) -> list[Bucket]:
    """Head, middle and tail by interaction mass, and items that training never saw.

    The head is the most popular items that together hold 20 % of training interactions, the tail
    the least popular ones that hold the last 20 %. By number of items, almost all queries would
    fall to the head, and the tail would have too few of them to say anything.

    Args:
        counts: int64 `[items]`, training interactions.
        targets: int64 `[queries]`, from 1.
    """
    order = np.argsort(-counts, kind="stable")
    mass = np.cumsum(counts[order]) / max(counts.sum(), 1)
    before = np.concatenate([[0.0], mass[:-1]])
    place = np.empty(len(counts), dtype=np.int64)
    place[order] = np.select([before < HEAD, before < 1.0 - TAIL], [0, 1], 2)
    place[counts == 0] = 3
    of_target = place[targets - 1]
    labels = ("head", "middle", "tail", "new")
    return [
        Bucket(label, of_target == number, int((place == number).sum()))
        for number, label in enumerate(labels)
    ]


def history_buckets(queries: Queries) -> list[Bucket]:
    """By the number of items in the history, all of them, not only those that the model reads."""
    lengths = np.array([len(history) for history in queries.histories], dtype=np.int64)
    ends = (*LENGTHS[1:], None)
    return [
        Bucket(
            f"{start}+" if end is None else f"{start}-{end - 1}",
            (lengths >= start) & (lengths < (end if end is not None else np.inf)),
        )
        for start, end in zip(LENGTHS, ends, strict=True)
    ]


def percentiles(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Popularity percentile float64 `[items]`, 0..1: share of items less popular, ties by half."""
    ordered = np.sort(counts)
    below = np.searchsorted(ordered, counts, "left")
    upto = np.searchsorted(ordered, counts, "right")
    found: NDArray[np.float64] = (below + upto) / (2 * len(counts))
    return found
