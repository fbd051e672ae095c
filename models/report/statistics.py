"""Means with bootstrap intervals, and how evenly recommendations fall on the catalogue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
#: More users than this are put together at random, so that the weights fit into memory.
MAX_GROUPS = 20_000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, the 2.5th to 97.5th percentile over resamples."""

    value: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0.0 or self.high < 0.0


class Bootstrap:
    """Resamples users with all their queries, since one user's queries are not independent.

    Every figure uses the same resamples: differences of two models are paired.

    Args:
        groups: int64 `[queries]`, whose query each is.
    """

    def __init__(self, groups: NDArray[np.int64], *, seed: int = 0) -> None:
        _, inverse = np.unique(groups, return_inverse=True)
        count = int(inverse.max()) + 1
        rng = np.random.default_rng(seed)
        if count > MAX_GROUPS:
            inverse = rng.integers(0, MAX_GROUPS, count)[inverse]
            count = MAX_GROUPS
        self._groups, self._count = inverse, count
        # The first row is the data as it is.
        self._weights = np.ones((RESAMPLES + 1, count), dtype=np.float32)
        self._weights[1:] = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)

    def means(
        self, values: NDArray[np.float64], where: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float64]:
        """float64 `[1 + RESAMPLES]`: the mean of `values` `[queries]`, then that of each resample.

        Args:
            where: bool `[queries]`, the queries to average over. NaN where a resample has none.
        """
        counted = np.ones(len(values)) if where is None else where.astype(np.float64)
        sums = np.bincount(self._groups, values * counted, self._count)
        counts = np.bincount(self._groups, counted, self._count)
        with np.errstate(invalid="ignore"):
            found: NDArray[np.float64] = (self._weights @ sums) / (self._weights @ counts)
        return found


def estimate(samples: NDArray[np.float64]) -> Estimate | None:
    """Of what `Bootstrap.means` gave, or of a function of it; None where the data has no value."""
    if not np.isfinite(samples[0]):
        return None
    rest = samples[1:]
    low, high = np.percentile(rest[np.isfinite(rest)], [2.5, 97.5])
    return Estimate(float(samples[0]), float(low), float(high))


def relative(samples: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """`samples / reference - 1`, NaN where the reference is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(reference > 0, samples / reference - 1.0, np.nan)


def gini(counts: NDArray[np.int64]) -> float:
    """Gini coefficient of `counts` `[items]`: 0 where all are equal, near 1 where one has all."""
    total = counts.sum()
    if total == 0:
        return 0.0
    places = np.arange(1, len(counts) + 1)
    return float((2 * places - len(counts) - 1) @ np.sort(counts) / (len(counts) * total))
