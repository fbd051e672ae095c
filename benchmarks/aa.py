"""How often the gate is wrong, and how soon it is right: `python -m benchmarks.aa`
(docs/quality.md).

Simulated trials are looked at after every batch. In an A/A trial both versions are equally good;
at the limit the canary loses just what is still accepted. Beside the gate stands the textbook
z-test, of the same difference at the same level, looked at as often.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import log, sqrt
from multiprocessing import get_context
from statistics import NormalDist
from typing import Literal

import click
import numpy as np
from numpy.typing import NDArray

from worker.gate import Action, Decision, Evidence, GateSettings, decide
from worker.quality import MAX_USER_EVENTS, Tally
from worker.sequences import MeanTally

Floats = NDArray[np.float64]

LIST_LENGTH = 10
#: Pareto exponent of users' activity: the busiest hundredth does a quarter of all.
ACTIVITY = 1.2


@dataclass(frozen=True)
class Scenario:
    """How simulated users meet two versions."""

    name: str
    #: Relative loss of quality by the canary; below 0 it is better.
    loss: float = 0.0
    paired: bool = False
    max_loss: float = 0.05
    #: `spread`: everybody loses evenly, by version and user differently. `cliff`: lists are the
    #: same, but for a share `loss` of users, who never get a hit any more.
    kind: Literal["spread", "cliff"] = "spread"
    #: Users come one after the other, as in MovieLens; else all are there from the beginning.
    sessions: bool = False
    #: Mean probability of a hit; users' own are Beta distributed.
    hit_rate: float = 0.12
    #: Hits that the two versions' lists have in common, of those that they could have.
    in_common: float = 0.6
    #: Standard deviation of the Gamma factor by which one version suits a user better.
    taste: float = 0.3


@dataclass(frozen=True)
class Size:
    """Of one trial."""

    users: int = 2_000
    events: int = 30_000
    batch: int = 100


@dataclass(frozen=True)
class Ended:
    """How one trial ended by one test; `wait` where its events did not suffice."""

    action: Action
    events: int


@dataclass(frozen=True)
class Looks:
    """What is known at each look: both arms' tallies, and events' sums for the textbook."""

    stable: list[Tally]
    canary: list[Tally]
    #: Float64 `[looks, 3 * groups]`: events, sum and sum of squares of an event's value.
    naive: Floats


def actors(rng: np.random.Generator, size: Size, sessions: bool) -> NDArray[np.int64]:
    """Who acts, int64 `[events]`."""
    weights = rng.pareto(ACTIVITY, size.users) + 1.0
    users = rng.choice(size.users, size.events, p=weights / weights.sum())
    return np.sort(users) if sessions else users


def running(values: Floats, order: NDArray[np.int64], starts: NDArray[np.bool_]) -> Floats:
    """Each user's sum of `values` `[events]` up to and with each event."""
    ordered = values[order]
    total = np.cumsum(ordered)
    before = np.where(starts, total - ordered, 0.0)
    sums = np.empty_like(total)
    sums[order] = total - np.maximum.accumulate(before)
    return sums


def tallies(
    users: NDArray[np.int64],
    own: Floats,
    other: Floats,
    *,
    at: NDArray[np.int64],
    paired: bool,
    chosen: NDArray[np.bool_],
) -> list[Tally]:
    """What `UserRecord` and `Tally` would hold of the users of one arm, all at once.

    Args:
        users: int64 `[events]`, at most `MAX_USER_EVENTS` of each.
        own: 1 / rank in the own arm's list `[events]`, 0 for no hit; `other` in the other's.
        at: the events after which to look.
        chosen: whether an event's user is of this arm `[events]`.
    """
    order = np.argsort(users, kind="stable")
    starts = np.diff(users[order], prepend=-1) != 0
    one = np.ones(len(users))
    hit, other_hit = own > 0, other > 0
    n, h, g, o = (running(values, order, starts) for values in (one, hit * 1.0, own, other))
    n0, h0, g0, o0 = n - one, h - hit, g - own, o - other
    # What each event adds to each field, in the order of the fields.
    counts = [n == 1, one, one * paired, hit, own, other_hit * paired, other * paired]
    products = [n * n - n0 * n0, h * h - h0 * h0, h * n - h0 * n0, g * g - g0 * g0, g * n - g0 * n0]
    crossed = [(o * o - o0 * o0), (o * n - o0 * n0), (g * o - g0 * o0)]
    added = np.stack([*counts, *products, *(values * paired for values in crossed)])
    rows = np.cumsum(added * chosen, axis=1)[:, at].T
    return [Tally(*row) for row in rows.tolist()]


def simulate(scenario: Scenario, size: Size, rng: np.random.Generator) -> Looks:
    """One trial; users are in one arm or the other by chance."""
    users = actors(rng, size, scenario.sessions)
    order = np.argsort(users, kind="stable")
    starts = np.diff(users[order], prepend=-1) != 0
    users = users[running(np.ones(len(users)), order, starts) <= MAX_USER_EVENTS]
    stable, canary = gains(scenario, size.users, users, rng)
    in_canary = rng.random(size.users)[users] < 0.5
    at = np.arange(size.batch - 1, len(users), size.batch)
    arms = [
        tallies(users, own, other, at=at, paired=scenario.paired, chosen=chosen)
        for own, other, chosen in ((stable, canary, ~in_canary), (canary, stable, in_canary))
    ]
    accepted = (1.0 - scenario.max_loss) * stable
    groups: list[tuple[NDArray[np.bool_], Floats]] = (
        [(np.ones(len(users), np.bool_), canary - accepted)]
        if scenario.paired
        else [(in_canary, canary), (~in_canary, accepted)]
    )
    sums = [
        np.cumsum(values * chosen)[at]
        for chosen, value in groups
        for values in (np.ones(len(users)), value, value * value)
    ]
    return Looks(*arms, naive=np.stack(sums).T)


def gains(
    scenario: Scenario, count: int, users: NDArray[np.int64], rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """1 / rank in the stable version's list and in the canary's, of each event, 0 for no hit."""
    chance = rng.beta(1.0, 1.0 / scenario.hit_rate - 1.0, count)[users]
    reciprocal = 1.0 / rng.integers(1, LIST_LENGTH + 1, (2, len(users)))
    drawn = rng.random((2, len(users)))
    if scenario.kind == "cliff":
        lost = rng.random(count)[users] < scenario.loss
        stable = np.where(drawn[0] < chance, reciprocal[0], 0.0)
        return stable, np.where(lost, 0.0, stable)
    taste = rng.gamma(scenario.taste**-2, scenario.taste**2, (2, count))[:, users]
    chances = chance * taste * np.array([[1.0], [1.0 - scenario.loss]])
    same = rng.random(len(users)) < scenario.in_common
    drawn[1], reciprocal[1] = (
        np.where(same, drawn[0], drawn[1]),
        np.where(same, reciprocal[0], reciprocal[1]),
    )
    stable, canary = np.where(drawn < chances, reciprocal, 0.0)
    return stable, canary


def evidence_of(stable: Tally, canary: Tally) -> Evidence:
    """With a canary that is as fast and sound as the stable version."""
    return Evidence(stable, canary, MeanTally(1000, 0.0, 40.0), scorings=1000)


def gate_end(looks: Looks, settings: GateSettings) -> Ended:
    """How the gate ends the trial."""
    for stable, canary in zip(looks.stable, looks.canary, strict=True):
        decision: Decision = decide(evidence_of(stable, canary), settings)
        if decision.action != "wait":
            return Ended(decision.action, int(stable.events + canary.events))
    return Ended("wait", 0)


def naive_end(looks: Looks, scenario: Scenario, settings: GateSettings, batch: int) -> Ended:
    """How the textbook's test ends it: events taken for independent, each look for the only one."""
    count, total, squares = (looks.naive[:, at::3] for at in range(3))
    count = np.maximum(count, 2.0)
    mean = total / count
    error = np.sqrt(np.maximum(0.0, squares / count - mean * mean) / count)
    if not scenario.paired:
        mean = mean * np.array([1.0, -1.0])
    score = mean.sum(axis=1) / np.maximum(np.sqrt((error**2).sum(axis=1)), 1e-12)
    limit = NormalDist().inv_cdf(1.0 - settings.alpha / 3)
    for look in range(-(-settings.min_events // batch) - 1, len(score)):
        if abs(score[look]) > limit:
            return Ended("promote" if score[look] > 0 else "rollback", (look + 1) * batch)
    return Ended("wait", 0)


def trial(scenario: Scenario, size: Size, seed: int) -> tuple[Ended, Ended]:
    """How the gate and the textbook end one trial."""
    settings = GateSettings(max_loss=scenario.max_loss)
    looks = simulate(scenario, size, np.random.default_rng(seed))
    return gate_end(looks, settings), naive_end(looks, scenario, settings, size.batch)


def health_trial(size: Size, seed: int) -> tuple[bool, bool]:
    """Whether a canary just at the limit of errors, and of latency, is ever rolled back for it."""
    rng = np.random.default_rng(seed)
    settings = GateSettings()
    looks = 1_000
    errors = np.cumsum(rng.random(looks) < settings.max_error_rate)
    # A heavy tail, and less of a trend than a noisy machine shows.
    ratios = log(settings.max_latency_ratio) + 0.3 * rng.standard_t(5, looks)
    totals, squares = np.cumsum(ratios), np.cumsum(ratios * ratios)
    by_errors = any(
        decide(Evidence(scorings=at + 1, errors=int(errors[at])), settings).action == "rollback"
        for at in range(looks)
    )
    by_latency = any(
        decide(
            Evidence(latency=MeanTally(at + 1, float(totals[at]), float(squares[at]))), settings
        ).action
        == "rollback"
        for at in range(looks)
    )
    return by_errors, by_latency


def scenarios() -> Iterator[Scenario]:
    """False alarms first, then power."""
    for paired in (False, True):
        same = Scenario("equal, no loss accepted", paired=paired, max_loss=0.0)
        limit = Scenario("5 % worse: at the limit", loss=0.05, paired=paired)
        yield same
        yield replace(same, name="the same, users one by one", sessions=True)
        yield replace(same, name="the same, hit rate 2 %", hit_rate=0.02)
        yield limit
        yield replace(limit, name="the same, users one by one", sessions=True)
        yield replace(limit, name="the same, 5 % of users lose all", kind="cliff")
        yield replace(limit, name="equal", loss=0.0)
        yield replace(limit, name="equal, lists nearly too", loss=0.0, in_common=0.95, taste=0.1)
        yield replace(limit, name="equal, 20 % loss accepted", loss=0.0, max_loss=0.2)
        for percent in (20, 50, 100):
            yield replace(limit, name=f"{percent} % worse", loss=percent / 100)
        yield replace(limit, name="20 % better", loss=-0.2)


HEAD = (
    "| | pairs | rolled back | promoted | events, median (90 %) | z-test: rolled back | promoted |"
)


def line(scenario: Scenario, ends: Sequence[tuple[Ended, Ended]]) -> str:
    """One row of the table."""

    def share(of: int, action: Action) -> str:
        return f"{100 * sum(pair[of].action == action for pair in ends) / len(ends):.1f} %"

    events = sorted(pair[0].events if pair[0].action != "wait" else 1 << 60 for pair in ends)

    def quantile(part: float) -> str:
        found = events[int(part * (len(events) - 1))]
        return "never" if found >= 1 << 60 else f"{found:,}"

    return (
        f"| {scenario.name} | {'yes' if scenario.paired else 'no'}"
        f" | {share(0, 'rollback')} | {share(0, 'promote')}"
        f" | {quantile(0.5)} ({quantile(0.9)})"
        f" | {share(1, 'rollback')} | {share(1, 'promote')} |"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--runs", default=400, show_default=True, type=click.IntRange(1))
@click.option("--users", default=Size.users, show_default=True, type=click.IntRange(20))
@click.option("--events", default=Size.events, show_default=True, type=click.IntRange(1_000))
@click.option("--batch", default=Size.batch, show_default=True, help="Events between two looks.")
@click.option("--seed", default=0, show_default=True)
@click.option("--processes", default=os.cpu_count(), show_default="all CPUs")
def main(runs: int, users: int, events: int, batch: int, seed: int, processes: int) -> None:
    """Simulate trials that are looked at after every batch; print who was wrong how often."""
    size = Size(users, events, batch)
    seeds = range(seed, seed + runs)
    click.echo(
        f"{runs} trials each of {users:,} users and {events:,} events, looked at every {batch};"
        f" standard error of a share below {50 / sqrt(runs):.1f} points\n"
    )
    click.echo(f"{HEAD}\n|---|---|---|---|---|---|---|")
    # Spawned: a process that has threads, as the tests' JAX, must not fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for scenario in scenarios():
            ends = list(pool.map(partial(trial, scenario, size), seeds, chunksize=10))
            click.echo(line(scenario, ends))
        health = list(pool.map(partial(health_trial, size), seeds, chunksize=10))
    for name, at in (("errors", 0), ("latency", 1)):
        wrong = 100 * sum(pair[at] for pair in health) / runs
        click.echo(f"\ncanary just at the limit of {name}, 1,000 looks: rolled back {wrong:.1f} %")


if __name__ == "__main__":
    main()
