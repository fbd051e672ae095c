"""Bounds that may be looked at after every value are crossed as seldom as they promise."""

from math import exp, inf, log, pi, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.sequences import MeanTally, half_width, log_evidence_above

values = st.lists(st.floats(-100, 100), max_size=30)


def tallied(numbers: list[float]) -> MeanTally:
    tally = MeanTally()
    for number in numbers:
        tally.add(number)
    return tally


def ever_below(paths: np.ndarray, truth: float, alpha: float, *, first: int) -> float:
    """Share of paths whose upper bound ever falls below the truth."""
    counts = np.arange(1, paths.shape[1] + 1)
    wrong = 0
    for path in paths:
        total, squares = np.cumsum(path), np.cumsum(path * path)
        wrong += any(
            MeanTally(int(n), float(t), float(q)).interval(effect=0.2, alpha=alpha).high < truth
            for n, t, q in zip(counts[first:], total[first:], squares[first:], strict=True)
        )
    return wrong / len(paths)


def test_a_bound_is_wider_than_that_of_a_single_look() -> None:
    for variance in (1e-6, 1e-4, 1e-2):
        assert half_width(variance, effect=0.1, alpha=0.025) > 1.96 * sqrt(variance)


def test_a_bound_is_that_of_the_half_normal_mixture() -> None:
    # The mixture over drifts of scale rho, summed numerically, is at least 1 / alpha there.
    rho, alpha = 0.3, 0.01
    for variance in (0.001, 0.1, 10.0):
        total = half_width(variance, effect=rho, alpha=alpha) / variance
        drifts = np.linspace(0, 12 * rho, 200_001)
        exponent = drifts * total - drifts**2 / (2 * variance) - drifts**2 / (2 * rho**2)
        density = 2 / (rho * sqrt(2 * pi)) * np.exp(exponent)
        mixture = np.trapezoid(density, drifts)
        assert 1 / alpha <= mixture < 1.2 / alpha


def test_bounds_shrink_as_evidence_grows() -> None:
    widths = [half_width(1 / n, effect=0.2, alpha=0.05) for n in (10, 100, 1_000, 10_000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.05


def test_without_an_effect_to_look_for_nothing_is_bounded() -> None:
    assert half_width(1.0, effect=0.0, alpha=0.05) == inf


def test_one_value_says_nothing_about_the_mean() -> None:
    assert tallied([3.0]).interval(effect=0.2, alpha=0.05) == (3.0, -inf, inf)


@given(values, values)
def test_merged_tallies_are_the_tally_of_all(left: list[float], right: list[float]) -> None:
    merged, whole = tallied(left).merged(tallied(right)), tallied(left + right)
    assert merged.count == whole.count
    assert merged.total == pytest.approx(whole.total, abs=1e-9)
    assert merged.squares == pytest.approx(whole.squares, abs=1e-9)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_a_tally_has_the_mean_and_variance_of_its_values(numbers: list[float]) -> None:
    tally = tallied(numbers)
    assert tally.mean == pytest.approx(np.mean(numbers), abs=1e-9)
    assert tally.variance == pytest.approx(np.var(numbers, ddof=1), abs=1e-6)


def test_looked_at_after_every_value_a_bound_is_seldom_ever_wrong() -> None:
    rng = np.random.default_rng(1)
    normal = rng.normal(0.7, 1.0, (300, 400))
    # 5 % promised; 300 runs leave a standard error of 1.3 points.
    assert ever_below(normal, 0.7, 0.05, first=20) <= 0.08
    naive = np.cumsum(normal - 0.7, axis=1) / np.sqrt(np.arange(1, 401))
    assert (naive[:, 20:] < -1.645).any(axis=1).mean() > 0.2


def test_the_evidence_of_errors_is_one_before_any_trial() -> None:
    assert log_evidence_above(0, 0, 0.01) == pytest.approx(0.0)


@given(st.integers(0, 200), st.integers(0, 200), st.sampled_from([0.001, 0.01, 0.1, 0.4]))
def test_the_evidence_of_errors_is_a_fair_bet_at_the_limit(
    failures: int, passes: int, limit: float
) -> None:
    trials = failures + passes
    now = log_evidence_above(failures, trials, limit)
    lost = exp(log_evidence_above(failures, trials + 1, limit) - now)
    won = exp(log_evidence_above(failures + 1, trials + 1, limit) - now)
    assert limit * won + (1 - limit) * lost == pytest.approx(1.0)
    # Below the limit it only loses, whatever came before.
    assert won > lost


def test_two_failures_in_the_first_two_trials_are_enough_evidence() -> None:
    assert log_evidence_above(2, 2, 0.01) > log(3 / 0.05)


def test_no_failures_are_no_evidence() -> None:
    assert log_evidence_above(0, 10_000, 0.01) < 0.0


def test_a_rate_just_at_the_limit_seldom_ever_looks_worse() -> None:
    rng = np.random.default_rng(2)
    failures = np.cumsum(rng.random((400, 300)) < 0.01, axis=1)
    wrong = sum(
        any(log_evidence_above(int(k), n + 1, 0.01) > log(20) for n, k in enumerate(path))
        for path in failures
    )
    assert wrong / len(failures) <= 0.08
