"""k-means in numpy, for codebooks (pq.py) and for cells of bounded size (cells.py).

scikit-learn's has no bound on a cluster's size; and this one is a product, an argmin and a mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

#: Distances held at once: 64 MiB.
_BLOCK = 1 << 24


def kmeans(
    points: Floats,
    count: int,
    *,
    weights: Floats | None = None,
    start: Floats | None = None,
    iterations: int = 10,
    seed: int = 0,
) -> Floats:
    """Centroids float32 `[count, width]` of points `[n, width]` (Lloyd, 1982).

    Args:
        weights: float32 `[n]`, how much each point counts; alike without.
        start: centroids to begin with; points drawn at random without.
    """
    rng = np.random.default_rng(seed)
    if weights is None:
        weights = np.ones(len(points), dtype=np.float32)
    if start is None:
        drawn = rng.permutation(len(points))
        start = points[drawn[np.arange(count) % len(points)]]
    centroids = start.copy()
    for _ in range(iterations):
        label = nearest(points, centroids)
        centroids = means(points, label, count, weights=weights, otherwise=centroids)
        # A centroid that lost all its points starts again as a random one.
        empty = np.flatnonzero(np.bincount(label, minlength=count) == 0)
        if len(points) > count:
            centroids[empty] = points[rng.choice(len(points), len(empty), replace=False)]
    return centroids


def nearest(points: Floats, centroids: Floats, allowed: NDArray[np.bool_] | None = None) -> Ints:
    """int64 `[n]`: the centroid at the least Euclidean distance, of those `allowed` `[count]`."""
    penalty = 0.5 * (centroids**2).sum(axis=1)
    if allowed is not None:
        penalty = np.where(allowed, penalty, np.inf)
    label = np.empty(len(points), dtype=np.int64)
    step = max(1, _BLOCK // len(centroids))
    for begin in range(0, len(points), step):
        products = points[begin : begin + step] @ centroids.T
        label[begin : begin + step] = (products - penalty).argmax(axis=1)
    return label


def means(points: Floats, label: Ints, count: int, *, weights: Floats, otherwise: Floats) -> Floats:
    """Weighted means float32 `[count, width]` by label; `otherwise` where a label has no weight."""
    total = np.bincount(label, weights=weights, minlength=count)
    sums = np.stack(
        [np.bincount(label, weights=weights * axis, minlength=count) for axis in points.T], axis=1
    )
    known = total[:, None] > 0
    return np.where(known, sums / np.where(known, total[:, None], 1.0), otherwise).astype(
        np.float32
    )


def bounded(points: Floats, centroids: Floats, capacity: int) -> Ints:
    """As `nearest`, with at most `capacity` points to a centroid; int64 `[n]`.

    Where too many points want a centroid, the nearest stay and the others try the nearest of those
    with room, in rounds.

    Raises:
        ValueError: there is not enough room.
    """
    if capacity * len(centroids) < len(points):
        raise ValueError(f"{len(centroids)} cells of {capacity} cannot hold {len(points)} points")
    label = np.full(len(points), -1, dtype=np.int64)
    room = np.full(len(centroids), capacity, dtype=np.int64)
    waiting = np.arange(len(points))
    while len(waiting):
        wanted = nearest(points[waiting], centroids, room > 0)
        distance = ((points[waiting] - centroids[wanted]) ** 2).sum(axis=1)
        order = np.lexsort((distance, wanted))
        wanted, waiting = wanted[order], waiting[order]
        # Place of each point in the queue of its centroid.
        starts = np.searchsorted(wanted, np.arange(len(centroids)))
        stays = np.arange(len(wanted)) - starts[wanted] < room[wanted]
        label[waiting[stays]] = wanted[stays]
        room -= np.bincount(wanted[stays], minlength=len(centroids))
        waiting = waiting[~stays]
    return label
