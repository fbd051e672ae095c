"""The parts of the swap benchmark that compute: windows, the worker's log, peaks, verdicts."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.errors import BenchmarkError
from benchmarks.schedule import Latency
from benchmarks.soak import Accounts
from benchmarks.swaps import (
    Loaded,
    MemoryMark,
    Peak,
    Swap,
    SwapMemory,
    SwapMemoryResults,
    SwapResults,
    load_report,
    load_verdicts,
    memory_report,
    memory_verdicts,
    quiet_windows,
    swap_windows,
    switch_times,
    within,
)

# -- windows


def test_a_swap_lasts_from_its_release_until_a_second_after_the_switch() -> None:
    [(before, during)] = swap_windows([Swap("b", 10.0, 10.5)])
    assert during == (10.0, 11.5)
    assert before == (8.0, 9.5)  # what is due in the half second between may wait for the swap


def test_the_window_before_a_swap_holds_nothing_of_the_swap_before_it() -> None:
    _, (before, during) = swap_windows([Swap("b", 10.0, 10.5), Swap("a", 12.5, 13.0)])
    assert before == (11.5, 12.0)
    assert during == (12.5, 14.0)


def test_a_release_during_the_swap_before_is_no_measurement() -> None:
    with pytest.raises(BenchmarkError, match="--every"):
        swap_windows([Swap("b", 10.0, 12.0), Swap("a", 12.5, 13.0)])


@given(st.floats(0.1, 5.0), st.floats(0.0, 60.0))
def test_quiet_windows_lie_side_by_side_and_end_before_the_first_swap(
    length: float, until: float
) -> None:
    windows = quiet_windows(length, until)
    assert all(end - start == pytest.approx(length) for start, end in windows)
    assert all(end <= until + 1e-9 for _, end in windows)
    assert until - length * len(windows) < length + 1e-9


@given(st.lists(st.floats(0.0, 30.0), max_size=50))
def test_a_probe_counts_in_the_one_window_that_it_was_due_in(times: list[float]) -> None:
    due = dict(enumerate(times))
    parts = [within(due, [window]) for window in ((0.0, 10.0), (10.0, 20.0), (20.0, 31.0))]
    assert sum(map(len, parts)) == len(due)
    assert parts[0] | parts[1] | parts[2] == due
    assert within(due, [(0.0, 10.0), (20.0, 31.0)]) == parts[0] | parts[2]


# -- the worker's log


def test_the_log_tells_when_each_release_was_first_served() -> None:
    lines = [
        "a library prints this",
        '["no", "object"]',
        json.dumps({"time": "2026-01-01T00:00:01.000+00:00", "message": "started http=x"}),
        json.dumps(
            {
                "time": "2026-01-01T00:00:02.250+00:00",
                "message": "serving surface=posts revision=7 stable=v1",
            }
        ),
        json.dumps(
            {
                "time": "2026-01-01T00:00:09.000+00:00",
                "message": "serving surface=posts revision=7 stable=v1",
            }
        ),
    ]
    at = datetime(2026, 1, 1, 0, 0, 2, 250_000, tzinfo=UTC).timestamp()
    assert switch_times(lines) == {7: at}


# -- verdicts


def of_p99(value: float) -> Latency:
    return Latency(100, 0, 1.0, 2.0, value, value, value)


def loaded(before: float, during: float, quiet: float = 10.0) -> Loaded:
    return Loaded(
        share=0.5,
        rate=1000.0,
        swaps=[Swap("b", 10.0, 10.5)],
        quiet=[of_p99(9.0), of_p99(11.0)],
        before=[of_p99(before)],
        during=[of_p99(during)],
        all_quiet=of_p99(quiet),
        all_before=of_p99(before),
        all_during=of_p99(during),
        load_s=0.1,
        switch_ms=1.0,
        sut_busy=0.5,
        foreign_cpus=0.0,
    )


WHOLE = Accounts(10, 10, 0, 0, 0, 0, 0, 0, 50, 0)


def results(one: Loaded, accounts: Accounts = WHOLE) -> SwapResults:
    return SwapResults("", {}, "kafka", ["a", "b"], 10_000, 2000.0, [one], accounts)


def test_swaps_that_nobody_feels_and_that_lose_nothing_are_good() -> None:
    assert [good for good, _ in load_verdicts(results(loaded(10.0, 12.0)))] == [True, True]


def test_a_felt_swap_is_told_with_its_ratio_and_a_lost_event_with_its_count() -> None:
    bad = results(loaded(10.0, 12.1), replace(WHOLE, applied=9))
    assert [good for good, _ in load_verdicts(bad)] == [False, False]
    shown = load_report(bad)
    assert "1.21" in shown
    assert "lost 1," in shown


def test_swaps_that_only_look_small_beside_what_the_one_before_left_are_not_good() -> None:
    (good, words), _ = load_verdicts(results(loaded(30.0, 30.0, quiet=10.0)))
    assert not good
    assert "3.00 of that before the first" in words


def test_the_report_says_how_wide_windows_without_swaps_spread() -> None:
    assert "10.0 (9.0 to 11.0)" in load_report(results(loaded(10.0, 30.0)))


def memory(most: int = 112, last: int = 104) -> SwapMemoryResults:
    marks = [MemoryMark(at, 100, 90) for at in (0, 10, 25, 50, 75)]
    pair = SwapMemory(
        catalogue=1682,
        file_bytes={"a": 4, "b": 2},
        new_bytes={"a": 20, "b": 10},
        marks=[*marks, MemoryMark(100, last, 90)],
        peaks=[Peak("b", 100, most), Peak("a", 100, 120)],
    )
    return SwapMemoryResults("", {}, [pair])


def test_a_swap_may_take_a_fifth_more_than_its_new_model_and_many_may_not_creep() -> None:
    assert all(good for good, _ in memory_verdicts(memory()))
    assert [good for good, _ in memory_verdicts(memory(most=113))] == [False, True]
    assert [good for good, _ in memory_verdicts(memory(last=106))] == [True, False]


def test_growth_in_the_first_half_of_the_swaps_is_warming_up_and_no_creep() -> None:
    made = memory()
    pair = made.pairs[0]
    early = [*(MemoryMark(at, 50, 40) for at in (0, 10, 25)), *pair.marks[3:]]
    assert replace(pair, marks=early).creep == pytest.approx(pair.creep)


def test_the_peak_is_counted_in_models_of_the_kind_that_came() -> None:
    pair = memory().pairs[0]
    assert pair.in_new_models("b").most == pytest.approx(1.2)
    assert pair.in_new_models("a").most == pytest.approx(1.0)
    assert "100 swaps" in memory_report(memory())
