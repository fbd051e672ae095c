"""The parts of the benchmarks that compute: schedule, quantiles, ratios, accounts, pages."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.capacity import UTILISATION, need
from benchmarks.cases.common import Progress
from benchmarks.errors import BenchmarkError
from benchmarks.measure import FullSpeed, Run, Steady
from benchmarks.pages import fill
from benchmarks.profiling import own_shares
from benchmarks.results import (
    Results,
    Round,
    Spread,
    as_markdown,
    load,
    report,
    save,
    summary,
    warnings,
)
from benchmarks.schedule import Latency, Pace, latency, quantile
from benchmarks.soak import Accounts, Sample, SoakResults, slope_per_hour, verdicts
from benchmarks.system import Usage, split_cpus
from benchmarks.workloads import WorkloadSpec, expected_items, workload


def usage(foreign: float = 0.0, rest: float = 0.3, cpu_s: float = 2.0) -> Usage:
    parts = {"sut": cpu_s, "broker": 0.5, "redis": 0.25, "harness": 0.1}
    return Usage(2.0, parts, 1.0, rest, foreign)


def run(case: str, rate: float, **changes: float) -> Run:
    events = int(2 * rate)
    made = Latency(100, int(changes.get("unanswered", 0)), 1.0, 2.0, 3.0, 4.0, 5.0)
    steady = Steady(0.5, rate / 2, 100, made, usage(), (0.1, 0.2))
    return Run(
        case,
        FullSpeed(events, 2.0, usage(changes.get("foreign", 0.0))),
        (steady,),
        50_000_000,
        60_000_000,
        events,
        int(changes.get("done", events)),
    )


def results(*rounds: list[Run]) -> Results:
    return Results(
        "2026-01-01T00:00:00+00:00", {}, "tansu", {}, "posts@v", {}, list(map(Round, rounds))
    )


# -- the schedule


def test_latency_counts_from_when_an_event_was_due_so_that_a_stall_is_felt_by_all_it_delayed() -> (
    None
):
    pace = Pace(rate=100.0, count=100, probe_every=2, first_probe=0)
    due = pace.probe_due_s()
    # Nothing is served for the whole second, then everything at once.
    found = latency(due, dict.fromkeys(due, 1.0))
    assert found.p50 == pytest.approx(500.0, abs=20.0)
    assert found.max == pytest.approx(990.0)


@given(st.floats(0.5, 50_000), st.integers(2, 5000), st.integers(2, 50), st.floats(-1.0, 100.0))
def test_an_event_is_due_once_its_time_has_come_and_not_before(
    rate: float, count: int, every: int, seconds: float
) -> None:
    pace = Pace(rate, count, every, 0)
    due = pace.due_by(seconds)
    assert 0 <= due <= count
    if due > 0:
        assert pace.due_s(due - 1) <= seconds + 1e-9 / rate
    if due < count:
        assert pace.due_s(due) > seconds - 1e-9


@given(st.integers(2, 500), st.integers(2, 20), st.integers(0, 1000))
def test_every_probe_is_sent_once_and_due_when_the_schedule_says(
    count: int, every: int, first: int
) -> None:
    pace = Pace(10.0, count, every, first)
    sent = {
        probe: pace.due_s(event)
        for event in range(count)
        if (probe := pace.probe_of(event)) is not None
    }
    assert sent == pace.probe_due_s()
    assert list(sent) == list(range(first, first + pace.probes))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_a_measured_value_that_the_share_does_not_exceed(
    values: list[float], share: float
) -> None:
    ordered = sorted(values)
    found = quantile(ordered, share)
    assert found in ordered
    assert sum(value <= found for value in ordered) >= share * len(ordered) - 1e-6


def test_the_99th_percentile_of_a_hundred_values_is_the_99th() -> None:
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0


def test_unanswered_probes_are_counted_and_are_in_no_quantile() -> None:
    found = latency({1: 0.0, 2: 0.0, 3: 0.0}, {1: 0.010, 2: 0.020})
    assert (found.probes, found.unanswered, found.max) == (3, 1, pytest.approx(20.0))
    assert math.isinf(latency({1: 0.0}, {}).p50)


# -- the machine


def test_the_system_under_test_gets_the_first_half_of_the_cpus() -> None:
    assert split_cpus([0, 1]).sut == (0,)
    assert split_cpus([0, 1]).rest == (1,)
    assert split_cpus(range(8)).sut == (0, 1, 2, 3)
    assert split_cpus([5]).sut == split_cpus([5]).rest == (5,)


@pytest.mark.parametrize("sut", [[0, 1], [7], []])
def test_a_division_of_cpus_that_cannot_be_is_refused(sut: list[int]) -> None:
    with pytest.raises(BenchmarkError):
        split_cpus([0, 1], sut)


def test_progress_is_seen_by_who_has_the_file_open(tmp_path: Path) -> None:
    case, harness = Progress(tmp_path / "progress"), Progress(tmp_path / "progress")
    case.advance(3)
    at = harness.read()[1]
    case.advance(0)
    assert harness.read() == (3, at)
    case.advance(2)
    assert harness.read()[0] == 5


# -- results


def test_ratios_are_taken_within_a_round_and_only_then_summed_up() -> None:
    # The machine was twice as slow in the second round, for both.
    found = results(
        [run("ours", 1000.0), run("plain-one", 100.0)],
        [run("ours", 500.0), run("plain-one", 50.0)],
    )
    assert found.ratio("ours", ["plain-one"], lambda r: r.full.rate) == Spread(10.0, 10.0, 10.0)


def test_the_goal_is_measured_against_the_slower_of_reading_and_scoring() -> None:
    found = results([run("ours", 90.0), run("aiokafka-raw", 1000.0), run("score-raw", 100.0)])
    rows = {row[0]: row for row in summary(found)}
    assert rows["whole path: ours / slower of raw aiokafka and raw scoring"][2] == "0.90"


def test_a_ratio_without_one_of_its_cases_is_not_shown() -> None:
    assert len(summary(results([run("ours", 90.0), run("score-raw", 100.0)]))) == 1


def test_a_reader_is_told_of_noise_losses_and_failures() -> None:
    found = results([run("ours", 10.0, foreign=0.5, unanswered=3, done=7)])
    found.failures.append("round 1, quix: ended")
    told = "\n".join(warnings(found))
    for words in ("quix: ended", "0.50", "3 probes", "20 events sent, 7 counted"):
        assert words in told
    assert "Mind:" in report(found)
    assert not warnings(results([run("ours", 10.0)]))


def test_results_outlive_a_round_trip_and_other_sections_stay(tmp_path: Path) -> None:
    path = tmp_path / "bench-results.json"
    found = results([run("ours", 10.0)])
    save(path, "other", {"a": 1})
    save(path, "compare", found)
    assert load(path, "compare", Results) == found
    assert load(path, "other", dict) == {"a": 1}
    with pytest.raises(BenchmarkError, match="no 'soak' yet"):
        load(path, "soak", SoakResults)


def test_a_cluster_is_sized_from_the_medians() -> None:
    found = results([run("ours", 1000.0)])
    needed = need(found, 1e6)
    assert needed.pods == math.ceil(1e6 / (1000.0 * UTILISATION))
    # 2 s of processor time for 2,000 events is 1 ms an event.
    assert needed.worker_cpus == pytest.approx(1000 / UTILISATION)
    assert needed.redis_shards == math.ceil(125 / UTILISATION)


def test_pages_are_filled_between_their_marks_only_and_twice_gives_the_same() -> None:
    page = "before\n<!-- bench:whole -->\nold\n<!-- /bench -->\nafter\n"
    table = as_markdown([["a", "b"], ["1", "2"]])
    assert table == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    filled = fill(page, {"whole": lambda: table})
    assert filled == f"before\n<!-- bench:whole -->\n{table}\n<!-- /bench -->\nafter\n"
    assert fill(filled, {"whole": lambda: table}) == filled
    with pytest.raises(BenchmarkError, match="no block 'whole'"):
        fill(page, {})


def test_own_shares_come_from_the_innermost_frame_of_threads_that_do_not_wait() -> None:
    folded = ["main;f;g 3", "main;f 1", "main;Condition.wait (threading.py:1) 96"]
    assert own_shares(folded) == [("g", 0.75), ("f", 0.25)]


# -- workloads


SPEC = WorkloadSpec("social", tuple(f"item-{n}" for n in range(50)), users=200, probes=5, history=9)


def test_a_workload_is_the_same_wherever_it_is_drawn() -> None:
    first, second = (list(itertools.islice(workload(SPEC).draws(), 500)) for _ in range(2))
    assert first == second
    assert dict(workload(SPEC).histories()) == dict(workload(SPEC).histories())


def test_consecutive_events_are_mostly_of_different_users() -> None:
    users = [user for user, _ in itertools.islice(workload(SPEC).draws(), 2000)]
    assert sum(a == b for a, b in itertools.pairwise(users)) < 100


def test_users_and_probes_bring_histories_of_items_that_the_model_knows() -> None:
    known = dict(workload(SPEC).histories())
    assert len(known) == SPEC.users + SPEC.probes
    assert "probe-4" in known
    assert all(1 <= item <= 50 for history in known.values() for item in history)
    assert len(dict(workload(SPEC).histories(users=10))) == 10 + SPEC.probes


def test_a_history_ends_with_what_was_sent_last_and_repeats_in_a_row_are_one() -> None:
    assert expected_items(["a", "b"], ["b", "c", "c", "a"], 3) == ["b", "c", "a"]


# -- soak


def soaked(samples: list[Sample], **accounts: int) -> SoakResults:
    known = dict.fromkeys(Accounts.__dataclass_fields__, 0) | {"produced": 10, "applied": 10}
    return SoakResults(
        "", {}, "tansu", "posts@v", 100.0, 0.7, 70.0, 1.0, samples,
        Latency(1, 0, 1.0, 1.0, 1.0, 1.0, 1.0), Accounts(**known | accounts),
    )  # fmt: skip


def samples(rss_per_s: float = 0.0, lag_per_s: float = 0.0) -> list[Sample]:
    return [
        Sample(t, int(1e8 + rss_per_s * t), int(1e8 + rss_per_s * t), int(lag_per_s * t), t, 0.0)
        for t in range(0, 1200, 10)
    ]


def test_a_flat_soak_in_which_all_events_are_found_again_is_good() -> None:
    assert all(good for good, _ in verdicts(soaked(samples())))


@pytest.mark.parametrize(
    "bad",
    [
        soaked(samples(rss_per_s=10_000)),
        soaked(samples(lag_per_s=1)),
        soaked(samples(), applied=9),
        soaked(samples(), uncommitted=1),
        soaked(samples(), histories_wrong=1),
        soaked(samples(), unanswered_probes=1),
        soaked(samples(), failed=1),
    ],
)
def test_growing_memory_growing_lag_and_missing_events_are_told(bad: SoakResults) -> None:
    assert not all(good for good, _ in verdicts(bad))


def test_a_slope_is_of_the_second_half_and_no_outlier_changes_it() -> None:
    grown = samples(rss_per_s=1000)
    grown[-2] = Sample(grown[-2].at_s, int(9e9), 0, 0, 0, 0.0)
    assert slope_per_hour(grown, lambda s: s.rss) == pytest.approx(3_600_000, rel=0.01)
    with pytest.raises(BenchmarkError, match="too few"):
        slope_per_hour(grown[:2], lambda s: s.rss)
