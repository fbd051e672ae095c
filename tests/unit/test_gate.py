"""The gate waits until it knows; then it promotes what is not worse, and rolls back what is."""

from dataclasses import replace
from math import log
from time import perf_counter

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.aa import Scenario, Size, gate_end, main, simulate, tallies, trial
from worker.errors import SettingsError
from worker.gate import Evidence, GateSettings, Verdict, decide, difference
from worker.quality import Tally, UserRecord
from worker.sequences import MeanTally, log_evidence_above

SETTINGS = GateSettings()
#: The canary is as fast as the stable version.
FAST = MeanTally(100, 0.0, 4.0)
SIZE = Size(users=400, events=6_000, batch=100)


def arm(users: int, *, events: int = 10, hits: int, other: int | None = None) -> Tally:
    """Users alike, each hit at the first place; a third of them one time more, a third less."""
    tally = Tally()
    for at in range(users):
        own = max(0, hits + at % 3 - 1)
        pairs = 0 if other is None else events
        theirs = 0 if other is None else max(0, other + at % 3 - 1)
        after = UserRecord(1, events, pairs, own, float(own), theirs, float(theirs))
        tally.replace(UserRecord(1), after)
    return tally


def evidence(stable: Tally, canary: Tally) -> Evidence:
    return Evidence(stable, canary, FAST, scorings=100)


def answer(known: Evidence, settings: GateSettings = SETTINGS) -> tuple[str, Verdict]:
    decision = decide(known, settings)
    return decision.action, decision.reason


def test_without_evidence_it_waits() -> None:
    assert answer(Evidence()) == ("wait", Verdict.TOO_LITTLE)


def test_few_users_decide_nothing_however_much_they_do() -> None:
    known = evidence(arm(9, events=40, hits=20), arm(9, events=40, hits=1))
    assert answer(known) == ("wait", Verdict.TOO_LITTLE)


def test_a_canary_that_is_not_worse_is_promoted() -> None:
    assert answer(evidence(arm(3_000, hits=3), arm(3_000, hits=3))) == (
        "promote",
        Verdict.NOT_WORSE,
    )


def test_a_canary_that_nobody_wants_is_rolled_back() -> None:
    nobody = Tally(users=300, events=3_000, events_events=30_000)
    assert answer(evidence(arm(300, hits=3), nobody)) == ("rollback", Verdict.QUALITY)


def test_without_any_hit_on_either_side_it_waits() -> None:
    nobody = Tally(users=300, events=3_000, events_events=30_000)
    assert answer(evidence(nobody, nobody)) == ("wait", Verdict.UNCERTAIN)


def test_a_canary_that_errs_is_rolled_back_whatever_its_quality() -> None:
    good = evidence(arm(3_000, hits=3), arm(3_000, hits=3))
    assert answer(replace(good, errors=10)) == ("rollback", Verdict.ERRORS)
    assert answer(Evidence(scorings=2, errors=2)) == ("rollback", Verdict.ERRORS)


def test_the_chance_of_a_false_alarm_is_shared_by_three_tests() -> None:
    for scorings in range(3, 200):
        action, _ = answer(Evidence(scorings=scorings, errors=3))
        enough = log_evidence_above(3, scorings, SETTINGS.max_error_rate) >= log(3 / 0.05)
        assert (action == "rollback") == enough


def test_one_error_among_many_scorings_is_no_reason() -> None:
    good = evidence(arm(3_000, hits=3), arm(3_000, hits=3))
    assert answer(replace(good, errors=1)) == ("promote", Verdict.NOT_WORSE)


def test_more_errors_than_accepted_hold_a_promotion_back() -> None:
    good = evidence(arm(3_000, hits=3), arm(3_000, hits=3))
    assert answer(replace(good, errors=2)) == ("wait", Verdict.UNHEALTHY)


def test_a_slow_canary_is_rolled_back_whatever_its_quality() -> None:
    good = evidence(arm(3_000, hits=3), arm(3_000, hits=3))
    slow = MeanTally(100, 100 * log(3.0), 100 * log(3.0) ** 2 + 4.0)
    assert answer(replace(good, latency=slow)) == ("rollback", Verdict.LATENCY)


def test_a_canary_is_not_promoted_before_its_latency_is_known() -> None:
    good = evidence(arm(3_000, hits=3), arm(3_000, hits=3))
    for latency in (MeanTally(), MeanTally(29, 0.0, 1.0), MeanTally(40, 40 * log(1.9), 400.0)):
        assert answer(replace(good, latency=latency)) == ("wait", Verdict.UNHEALTHY)


def test_few_slow_scorings_are_no_reason() -> None:
    slow = MeanTally(29, 29 * log(9.0), 29 * log(9.0) ** 2 + 0.1)
    assert answer(Evidence(latency=slow)) == ("wait", Verdict.TOO_LITTLE)


def test_a_trial_that_stays_undecided_ends_with_the_incumbent() -> None:
    known = evidence(arm(60, hits=3), arm(60, hits=3))
    assert answer(known) == ("wait", Verdict.UNCERTAIN)
    assert answer(known, GateSettings(max_events=known.events)) == (
        "rollback",
        Verdict.UNDECIDED,
    )


def test_pairs_show_what_two_groups_cannot() -> None:
    apart = evidence(arm(150, hits=3), arm(150, hits=3))
    paired = evidence(arm(150, hits=3, other=3), arm(150, hits=3, other=3))
    assert not apart.paired
    assert paired.paired
    assert answer(apart) == ("wait", Verdict.UNCERTAIN)
    assert answer(paired) == ("promote", Verdict.NOT_WORSE)


def test_an_event_without_its_pair_makes_the_groups_be_compared() -> None:
    known = evidence(arm(150, hits=3, other=3), arm(150, hits=3, other=3))
    known.canary.replace(UserRecord(1), UserRecord(1, events=1))
    assert not known.paired


def test_pairs_do_not_favour_the_version_that_was_shown() -> None:
    # Whatever is shown gets twice the clicks; both groups together say that the two are equal.
    shown = arm(2_000, hits=4, other=2)
    both = difference(evidence(shown, shown), max_loss=0.0, alpha=0.01)
    assert both.estimate == pytest.approx(0.0)


@pytest.mark.parametrize("max_loss", [0.05, 0.1, 0.2])
def test_hits_in_common_do_not_show_that_none_will_be_lost(max_loss: float) -> None:
    # A canary that loses `max_loss` of hits at random has the first n in common this often:
    settings, tally, hits = GateSettings(max_loss=max_loss), Tally(), 0
    while hits < 30 or answer(evidence(tally, Tally(users=10)), settings)[0] == "wait":
        hits += 1
        tally.replace(UserRecord(1), UserRecord(1, 10, 10, 1, 1.0, 1, 1.0))
    assert (1.0 - max_loss) ** hits <= settings.alpha / 3
    assert hits < 150


def test_the_figures_say_what_was_found() -> None:
    known = evidence(arm(300, hits=3), arm(300, hits=2))
    figures = decide(known, SETTINGS).figures
    assert figures["stable_mrr"] == pytest.approx(0.3)
    assert figures["canary_hit_rate"] == pytest.approx(0.2)
    assert figures["excess"] == pytest.approx(0.2 - 0.95 * 0.3)
    assert figures["excess_low"] < figures["excess"] < figures["excess_high"]
    assert figures["latency_ratio"] == pytest.approx(1.0)
    assert figures["events"] == 6_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0.0},
        {"max_loss": 1.0},
        {"max_latency_ratio": 0.5},
        {"max_error_rate": 0.0},
        {"min_users": 1},
        {"min_events": 0},
        {"min_latencies": 1},
        {"max_events": 50},
    ],
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        GateSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("paired", [False, True])
def test_looked_at_after_every_batch_an_equal_canary_is_seldom_rolled_back(paired: bool) -> None:
    strict = Scenario("A/A", paired=paired, max_loss=0.0, sessions=True)
    ends = [trial(strict, SIZE, seed) for seed in range(150)]
    gate = sum(pair[0].action == "rollback" for pair in ends) / len(ends)
    textbook = sum(pair[1].action == "rollback" for pair in ends) / len(ends)
    assert gate <= 0.05
    assert textbook > 0.15


def test_looked_at_after_every_batch_an_unacceptable_canary_is_seldom_promoted() -> None:
    # The lists are the same but for a few users who lose everything: the variance shows it last.
    cliff = Scenario("limit", loss=0.05, paired=True, kind="cliff")
    ends = [trial(cliff, SIZE, seed) for seed in range(150)]
    assert sum(gate.action == "promote" for gate, _ in ends) / len(ends) <= 0.05
    assert sum(textbook.action == "promote" for _, textbook in ends) / len(ends) > 0.4


def test_a_much_worse_canary_is_rolled_back_soon() -> None:
    ends = [
        gate_end(
            simulate(Scenario("bad", loss=1.0, paired=True), SIZE, np.random.default_rng(seed)),
            SETTINGS,
        )
        for seed in range(20)
    ]
    assert [one.action for one in ends] == ["rollback"] * 20
    assert np.median([one.events for one in ends]) <= 1_000


@pytest.mark.parametrize("paired", [False, True])
def test_the_simulated_tallies_are_those_that_records_make(paired: bool) -> None:
    rng = np.random.default_rng(1)
    users = rng.integers(0, 20, 300)
    # Ranks in lists of four, 4 for no hit.
    ranks = rng.integers(0, 5, (2, 300))
    own, other = np.where(ranks < 4, 1.0 / (ranks + 1.0), 0.0)
    chosen, at = users < 12, np.array([99, 299])
    simulated = tallies(users, own, other, at=at, paired=paired, chosen=chosen)
    tally, records, seen = Tally(), {}, []
    for event, user in enumerate(users.tolist()):
        if chosen[event]:
            lists = [[*"abcd"[:rank], "wanted"] if rank < 4 else [] for rank in ranks[:, event]]
            before = records.get(user, UserRecord(1))
            records[user] = after = before.noted("wanted", lists[0], lists[1] if paired else None)
            tally.replace(before, after)
        if event in at:
            seen.append(msgspec.structs.astuple(tally))
    for one, expected in zip(simulated, seen, strict=True):
        assert msgspec.structs.astuple(one) == pytest.approx(expected)


def test_a_decision_takes_well_under_a_millisecond() -> None:
    known = evidence(arm(150, hits=3, other=3), arm(150, hits=3, other=3))
    times = []
    for _ in range(50):
        started = perf_counter()
        decide(known, SETTINGS)
        times.append(perf_counter() - started)
    assert min(times) < 0.0005


def test_the_simulation_prints_a_line_for_each_case() -> None:
    result = CliRunner().invoke(
        main,
        ["--runs", "2", "--users", "50", "--events", "1000", "--processes", "1"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert result.output.count("| yes |") == result.output.count("| no |") >= 10
    assert "limit of latency" in result.output
