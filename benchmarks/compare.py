"""`make bench`: all systems in turn, round after round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from benchmarks.errors import BenchmarkError
from benchmarks.measure import Effort, Setup, measure, warm_up
from benchmarks.peers import Case, NotInstallableError, python_of
from benchmarks.results import Results, Round
from benchmarks.stage import Stage
from benchmarks.system import describe


def compare(
    cases: Sequence[Case],
    setup: Setup,
    stage: Stage,
    effort: Effort,
    rounds: int,
    *,
    progress: Callable[[str], None],
    keep: Callable[[Results], None],
) -> Results:
    """Measure `cases` in `rounds`; calls `keep` after each round with all that there is.

    Each round begins with another case, so that none always has the same neighbour in time.
    """
    results = Results(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe(stage.cpus, stage.broker_name),
        broker=stage.broker_name,
        workload=_described(setup),
        model=f"{setup.bundle.parent.name}@{setup.bundle.name}",
        options={**asdict(effort), "rounds": rounds, "partitions": setup.partitions},
    )
    present = []
    for case in cases:
        try:
            python_of(case)
            present.append(case)
        except NotInstallableError as error:
            results.missing[case.name] = str(error)
            progress(f"{case.name}: not installable: {error}")
    progress("warming up the broker")
    warm_up(setup, stage, progress)
    started = time.monotonic()
    for number in range(rounds):
        shift = number * len(present) // rounds
        runs = []
        for case in [*present[shift:], *present[:shift]]:
            passed = time.monotonic() - started
            progress(f"[{passed:4.0f} s] round {number + 1} of {rounds}: {case.name}")
            try:
                runs.append(measure(case, setup, stage, effort, progress))
            except BenchmarkError as error:
                # The others are worth measuring still; the report names what is missing.
                results.failures.append(f"round {number + 1}, {case.name}: {error}")
                progress(f"failed: {error}")
        results.rounds.append(Round(runs))
        keep(results)
    return results


def _described(setup: Setup) -> dict[str, object]:
    spec = asdict(setup.spec)
    del spec["items"]
    return {**spec, "catalogue": len(setup.spec.items), "flags": setup.flags}
