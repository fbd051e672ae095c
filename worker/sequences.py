"""Tests that may be looked at after every event: bounds that hold at all times at once. No I/O.

A test that is meant for one look at the end is wrong far more often than it says when it is looked
at until it answers. These bounds are boundaries that a process crosses *ever* with probability at
most `alpha`, so that stopping at the first answer costs nothing.

- A mean: Robbins' normal mixture (Ann. Math. Statist. 41, 1970), one-sided, in the asymptotic form
  of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and
  asymptotic confidence sequences" (Ann. Statist. 52(6), 2024). The always-valid p-values of Johari,
  Koomen, Pekelis and Walsh (Oper. Res. 70(3), 2022) use the same mixture.
- A rate: a mixture of likelihood ratios, exact at every size by Ville's inequality (1939).
"""

from __future__ import annotations

from math import exp, inf, log, log1p, sqrt
from typing import NamedTuple

import msgspec


class Interval(NamedTuple):
    """An estimate, and bounds each of which is wrong at any time with probability `alpha`."""

    estimate: float
    low: float
    high: float


def half_width(variance: float, *, effect: float, alpha: float) -> float:
    """How far an estimate may be off to one side, at all times at once.

    With the Brownian motion S that S_t = (estimate - truth) / variance tends to, of variance
    V = 1 / variance, and drifts mixed over a half-normal of scale rho: S stays below
    sqrt(2 (V + 1 / rho^2) log(1 + sqrt(V rho^2 + 1) / (2 alpha))), by Phi(x) >= 1 - exp(-x^2 / 2)
    in the mixture.

    Args:
        variance: of the estimate as it stands, squared units of the estimate.
        effect: rho, the size of the differences looked for, in units of the estimate. It decides
            when the bound is tight, never whether it holds; a factor of five costs a tenth.
        alpha: chance of ever being wrong to this side.

    Returns:
        Units of the estimate; infinite where `effect` is 0.
    """
    if variance <= 0.0:
        return 0.0
    if effect <= 0.0:
        return inf
    ratio = effect * effect / variance
    return sqrt(2.0 * variance * (1.0 + 1.0 / ratio) * log1p(sqrt(1.0 + ratio) / (2.0 * alpha)))


class MeanTally(msgspec.Struct, array_like=True, gc=False):
    """Mergeable sums of one value per independent unit."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.count += 1
        self.total += value
        self.squares += value * value

    def merged(self, other: MeanTally) -> MeanTally:
        """The sums over both."""
        return MeanTally(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    @property
    def mean(self) -> float:
        """0 where nothing was counted."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """Of one value, unbiased; 0 below two values."""
        if self.count < 2:
            return 0.0
        return max(0.0, self.squares - self.total * self.mean) / (self.count - 1)

    def interval(self, *, effect: float, alpha: float) -> Interval:
        """Of the mean, where values are independent and of finite variance; all reals below two."""
        if self.count < 2:
            return Interval(self.mean, -inf, inf)
        half = half_width(self.variance / self.count, effect=effect, alpha=alpha)
        return Interval(self.mean, self.mean - half, self.mean + half)


def log_evidence_above(failures: int, trials: int, limit: float) -> float:
    """Natural log of the evidence that failures are likelier than `limit`.

    An even mixture of likelihood ratios of the rates 2 `limit`, 4 `limit`, ... and halfway to 1
    against `limit`. As long as each trial, whatever came before it, fails with probability at most
    `limit`, it is a non-negative supermartingale that starts at 1: it exceeds 1 / alpha ever with
    probability at most alpha. Neither independence nor a steady rate is needed.

    Args:
        failures: of `trials`, in 0..trials.
        limit: the accepted rate, in (0, 1).
    """
    rates = [0.5 * (1.0 + limit)]
    rate = 2.0 * limit
    while rate < rates[0]:
        rates.append(rate)
        rate *= 2.0
    passes = trials - failures
    logs = [
        failures * log(rate / limit) + passes * log((1.0 - rate) / (1.0 - limit)) for rate in rates
    ]
    top = max(logs)
    return top + log(sum(exp(one - top) for one in logs) / len(logs))
