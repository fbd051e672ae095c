"""How the worker's cost grows: with the catalogue, with histories, with users, with partitions and
workers. One thing is changed at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bundles import synthetic_bundle
from benchmarks.errors import BenchmarkError
from benchmarks.measure import Effort, Run, Setup, measure, warm_up
from benchmarks.peers import CASES, OURS
from benchmarks.results import Spread, as_text
from benchmarks.stage import Stage
from benchmarks.system import describe
from benchmarks.workloads import WorkloadSpec

_CATALOGUE, _HISTORY, _USERS = 10_000, 50, 10_000
_PROBES = 5_000


@dataclass(frozen=True)
class Axes:
    """The values that are tried."""

    catalogues: Sequence[int] = (10_000, 100_000, 1_000_000)
    histories: Sequence[int] = (10, 50, 200)
    users: Sequence[int] = (10_000, 1_000_000)
    #: Partitions and workers.
    groups: Sequence[tuple[int, int]] = ((1, 1), (4, 1), (16, 1), (4, 2), (16, 4))
    #: Users with a history beforehand, the busiest; a million would only fill Redis.
    known_users: int = 200_000


@dataclass(frozen=True)
class Point:
    """One setting of one axis, with its runs."""

    axis: str
    label: str
    runs: list[Run]


@dataclass
class ScaleResults:
    """One invocation."""

    started_at: str
    machine: dict[str, Any]
    broker: str
    known_users: int
    points: list[Point] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def of(self, axis: str) -> list[Point]:
        """Points of one axis."""
        return [point for point in self.points if point.axis == axis]


def settings(axes: Axes) -> Iterator[tuple[str, str, Callable[[], Setup]]]:
    """Axis, label and how to get the setup of each point; bundles are made when asked for."""
    for count in axes.catalogues:
        yield "catalogue", f"{count:,}", lambda n=count: _setup(catalogue=n)
    for length in axes.histories:
        yield "history", str(length), lambda n=length: _setup(history=n)
    for users in axes.users:
        yield (
            "users",
            f"{users:,}",
            lambda n=users: replace(_setup(users=n), known_users=min(n, axes.known_users)),
        )
    for partitions, workers in axes.groups:
        label = f"{partitions} partitions, {workers} worker{'s' if workers > 1 else ''}"
        yield (
            "group",
            label,
            lambda p=partitions, w=workers: replace(_setup(), partitions=p, workers=w),
        )


def _setup(*, catalogue: int = _CATALOGUE, history: int = _HISTORY, users: int = _USERS) -> Setup:
    bundle: Path = synthetic_bundle(catalogue, history)
    items = tuple((bundle / "items.txt").read_text(encoding="utf-8").splitlines())
    spec = WorkloadSpec("social", items, users=users, history=history, probes=_PROBES)
    return Setup(spec, bundle)


def measure_scale(
    axes: Axes,
    stage: Stage,
    effort: Effort,
    rounds: int,
    *,
    progress: Callable[[str], None],
    keep: Callable[[ScaleResults], None],
) -> ScaleResults:
    """Measure all points; calls `keep` after each with all that there is."""
    results = ScaleResults(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe(stage.cpus, stage.broker_name),
        broker=stage.broker_name,
        known_users=axes.known_users,
    )
    warm = False
    for axis, label, make in settings(axes):
        progress(f"{axis}: {label}")
        setup = make()
        if not warm:
            warm_up(setup, stage, progress)
            warm = True
        try:
            runs = [measure(CASES[OURS], setup, stage, effort, progress) for _ in range(rounds)]
        except BenchmarkError as error:
            results.failures.append(f"{axis} {label}: {error}")
            progress(f"failed: {error}")
            continue
        results.points.append(Point(axis, label, runs))
        keep(results)
    return results


def scale_table(results: ScaleResults) -> list[list[str]]:
    """Rows; the first is the head."""
    rows = [["", "", "events/s", "CPU s per million", "p50 ms at half load", "p99", "PSS, MB"]]
    for point in results.points:
        halves = [run.steady[0].latency for run in point.runs if run.steady]
        rows.append(
            [
                point.axis,
                point.label,
                Spread.of(run.full.rate for run in point.runs).shown(),
                Spread.of(run.full.cpu_s_per_million() for run in point.runs).shown(".3g"),
                Spread.of(half.p50 for half in halves).shown(".1f") if halves else "",
                Spread.of(half.p99 for half in halves).shown(".1f") if halves else "",
                Spread.of(run.peak_pss / 1e6 for run in point.runs).shown(),
            ]
        )
    return rows


def scale_report(results: ScaleResults) -> str:
    """Everything, for a terminal."""
    lines = [as_text(scale_table(results)), *results.failures]
    lines.append(
        f"All workers share CPU {results.machine['cpus']['sut']}; at most"
        f" {results.known_users:,} users have a history beforehand."
    )
    return "\n".join(lines)
