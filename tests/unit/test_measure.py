"""How costs are measured: side by side, and honestly named."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from models.measure import (
    P99_RUNS,
    MeasureError,
    Ratio,
    _fresh,
    _latency,
    candidates,
    latencies,
)
from worker.bundle import Bundle


class Recorder:
    """Stands in for a bundle; notes what it is asked."""

    def __init__(self, most: int = 100) -> None:
        self.manifest = SimpleNamespace(max_length=4, most=most)
        self.asked: list[tuple[bytes, int]] = []

    def score(self, history: Any, k: int) -> None:
        self.asked.append((history.tobytes(), k))


def test_a_ratio_is_taken_round_by_round() -> None:
    # The second round was slow for both: the ratio is the same.
    assert Ratio.of([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == Ratio(2.0, 2.0, 3.0)


def test_every_bundle_is_asked_about_the_same_histories_in_each_round() -> None:
    one, two = Recorder(), Recorder()
    histories = [np.array([n, n + 1]) for n in range(1, 30)]
    latencies(
        [cast(Bundle, one), cast(Bundle, two)], [histories, histories], batches=(2, 3), rounds=2,
        runs=3,
    )  # fmt: skip
    assert set(one.asked) == set(two.asked)


def test_ratios_are_of_processor_time_and_percentiles_of_elapsed_time() -> None:
    elapsed_and_cpu = np.array([[50.0, 2.0], [10.0, 2.0], [30.0, 2.0]])
    reference = np.array([[1.0, 1.0]])
    found = _latency([elapsed_and_cpu], [reference])
    assert found.ratio == Ratio(2.0, 2.0, 2.0)
    assert (found.cpu_ms, found.p50_ms, found.runs) == (2.0, 30.0, 3)


def test_there_is_no_99th_percentile_of_too_few_runs() -> None:
    runs = np.ones((P99_RUNS, 2))
    assert _latency([runs[1:]], [runs]).p99_ms is None
    assert _latency([runs], [runs]).p99_ms == 1.0


def test_no_more_candidates_are_asked_for_than_a_bundle_gives() -> None:
    assert candidates(cast(Bundle, Recorder())) == 60
    assert candidates(cast(Bundle, Recorder(most=40))) == 40


def test_a_process_that_cannot_measure_says_what_failed(tmp_path: Path) -> None:
    np.save(tmp_path / "histories.npy", np.ones((1, 4), dtype=np.int64))
    with pytest.raises(MeasureError, match=r"missing.*is not a directory"):
        _fresh(tmp_path / "missing", tmp_path / "histories.npy")
