"""Metric samples by name and label, and quantiles of their histograms. No I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from prometheus_client import Metric


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram's state: observations at or below each bound, infinity last."""

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()

    @property
    def count(self) -> float:
        """All observations."""
        return self.counts[-1] if self.counts else 0.0

    def since(self, before: Buckets) -> Buckets:
        """What was observed after `before`, an earlier state of the same histogram."""
        if before.bounds != self.bounds:
            return self
        later = zip(self.counts, before.counts, strict=True)
        return Buckets(self.bounds, tuple(now - then for now, then in later))

    def quantile(self, share: float) -> float | None:
        """The value that `share` of all observations are at most, interpolated within its bucket
        as Prometheus does; None without observations."""
        if self.count <= 0.0:
            return None
        rank = share * self.count
        lower, below = 0.0, 0.0
        for upper, reached in zip(self.bounds, self.counts, strict=True):
            if reached >= rank and reached > below:
                if upper == float("inf"):
                    return lower
                return lower + (upper - lower) * (rank - below) / (reached - below)
            lower, below = upper, reached
        return lower


class Samples:
    """One reading of a registry, or of `/metrics` as text."""

    def __init__(self, samples: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
        self._series: defaultdict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        for name, labels, value in samples:
            self._series[name].append((labels, value))

    @classmethod
    def of(cls, families: Iterable[Metric]) -> Self:
        """From metric families."""
        return cls(
            (sample.name, sample.labels, float(sample.value))
            for family in families
            for sample in family.samples
        )

    def series(self, name: str, **labels: str) -> list[tuple[Mapping[str, str], float]]:
        """Labels and value of each series that has `labels`; counters by name without `_total`."""
        wanted = labels.items()
        return [
            (found, value)
            for full in (name, f"{name}_total")
            for found, value in self._series.get(full, ())
            if wanted <= found.items()
        ]

    def total(self, name: str, **labels: str) -> float:
        """Sum over all series that have `labels`."""
        return sum(value for _, value in self.series(name, **labels))

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Sums by the value of `label`."""
        sums: dict[str, float] = {}
        for found, value in self.series(name, **labels):
            sums[found[label]] = sums.get(found[label], 0.0) + value
        return sums

    def buckets(self, name: str, **labels: str) -> Buckets:
        """A histogram, summed over all its series that have `labels`."""
        sums: dict[float, float] = {}
        for found, value in self.series(f"{name}_bucket", **labels):
            bound = float(found["le"])
            sums[bound] = sums.get(bound, 0.0) + value
        ordered: Sequence[tuple[float, float]] = sorted(sums.items())
        return Buckets(tuple(bound for bound, _ in ordered), tuple(value for _, value in ordered))
