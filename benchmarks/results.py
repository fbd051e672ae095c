"""From runs to `bench-results.json`, medians, ratios and tables. Pure, but for reading and writing.

The file holds every run as it was measured; medians, ranges and ratios are derived when shown, so
that nothing in a table can differ from what was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.errors import BenchmarkError
from benchmarks.measure import Run
from benchmarks.peers import CASES, OUR_INTAKE, OURS, Level
from models.files import write_json

#: Above this, something else than the benchmark used the machine, or the stage was the limit.
FOREIGN_LIMIT, REST_LIMIT = 0.05, 0.95


@dataclass(frozen=True)
class Spread:
    """Median and range over rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        known = list(values)
        return cls(statistics.median(known), min(known), max(known))

    def shown(self, form: str = ",.0f") -> str:
        """As in tables."""
        if self.least == self.most:
            return format(self.median, form)
        return f"{self.median:{form}} ({self.least:{form}} to {self.most:{form}})"


@dataclass(frozen=True)
class Round:
    """All systems, in turn."""

    runs: list[Run]


@dataclass
class Results:
    """One invocation."""

    #: RFC 3339.
    started_at: str
    machine: dict[str, Any]
    broker: str
    workload: dict[str, Any]
    model: str
    options: dict[str, Any]
    rounds: list[Round] = field(default_factory=list)
    #: Why a case is missing, by case.
    missing: dict[str, str] = field(default_factory=dict)
    #: What could not be measured, and why.
    failures: list[str] = field(default_factory=list)

    def of(self, case: str) -> list[Run]:
        """Runs of a case, round by round."""
        return [run for round_ in self.rounds for run in round_.runs if run.case == case]

    def cases(self) -> list[str]:
        """Cases that have runs, in the order in which they are declared."""
        return [name for name in CASES if self.of(name)]

    def spread(self, case: str, value: Callable[[Run], float]) -> Spread:
        """Median and range of a value of a case."""
        return Spread.of(map(value, self.of(case)))

    def ratio(
        self, ours: str, others: Sequence[str], value: Callable[[Run], float]
    ) -> Spread | None:
        """`value` of `ours` over the least of `others`, compared within each round."""
        found = []
        for round_ in self.rounds:
            rates = {run.case: value(run) for run in round_.runs}
            if rates.keys() >= {ours, *others}:
                found.append(rates[ours] / min(rates[other] for other in others))
        return Spread.of(found) if found else None


def save(path: Path, section: str, value: object) -> None:
    """Put `value` into the file as `section`, leaving other sections as they are."""
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            known = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise BenchmarkError(f"{path} is no results file ({error}); move it away") from None
    write_json(path, {**known, section: value})


def load(path: Path, section: str, kind: Any) -> Any:
    """Read a section.

    Raises:
        BenchmarkError: there is none yet, or another release wrote it.
    """
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
        return msgspec.json.decode(known[section], type=kind)
    except (OSError, KeyError):
        raise BenchmarkError(f"{path} has no {section!r} yet; run `make bench` first") from None
    except msgspec.MsgspecError as error:
        raise BenchmarkError(f"{path}: {error}; run `make bench` again") from None


def summary(results: Results) -> list[list[str]]:
    """Rows of the ratios that are wanted; the first is the head."""
    wanted = [
        ("intake: ours / stock Faust, empty agent", ">= 10", OUR_INTAKE, ["faust-empty"]),
        (
            "whole path: ours / slower of raw aiokafka and raw scoring",
            ">= 0.8",
            OURS,
            ["aiokafka-raw", "score-raw"],
        ),
    ]
    wanted += [
        (f"whole path: ours / {CASES[name].about}", "", OURS, [name])
        for name in results.cases()
        if CASES[name].level == "whole" and name != OURS
    ]
    rows = [["ratio", "goal", "events/s", "events per CPU second"]]
    for what, goal, ours, others in wanted:
        by_rate = results.ratio(ours, others, lambda run: run.full.rate)
        by_cpu = results.ratio(ours, others, lambda run: 1e6 / run.full.cpu_s_per_million())
        if by_rate is not None and by_cpu is not None:
            rows.append([what, goal, by_rate.shown(".2f"), by_cpu.shown(".2f")])
    return rows


def warnings(results: Results) -> list[str]:
    """What a reader must know before believing the figures."""
    found = list(results.failures)
    foreign: list[tuple[float, str]] = []
    limited: list[str] = []
    timings = 0
    for number, round_ in enumerate(results.rounds, start=1):
        for run in round_.runs:
            place = f"round {number}, {run.case}"
            usages = {f"{place}, full speed": run.full.usage} | {
                f"{place}, {steady.rate:,.0f}/s": steady.usage for steady in run.steady
            }
            timings += len(usages)
            foreign += [
                (usage.foreign, name)
                for name, usage in usages.items()
                if usage.foreign > FOREIGN_LIMIT
            ]
            if CASES[run.case].level != "scoring":
                limited += [n for n, usage in usages.items() if usage.rest_busy > REST_LIMIT]
            if run.done != run.sent:
                found.append(f"{place}: {run.sent:,} events sent, {run.done:,} counted")
            lost = sum(steady.latency.unanswered for steady in run.steady)
            if lost:
                found.append(f"{place}: {lost} probes were never served")
    if foreign:
        most, where = max(foreign)
        found.append(
            f"other processes used more than {FOREIGN_LIMIT} CPUs in {len(foreign)} of {timings}"
            f" timings, at most {most:.2f} ({where}): measure again on a quiet machine"
        )
    if limited:
        found.append(
            f"broker, Redis and generator had no processor to spare in {len(limited)} of"
            f" {timings} timings, where the system may have waited for them: {limited[0]}"
            f"{', ...' if len(limited) > 1 else ''}"
        )
    return found


def throughput_table(results: Results, level: Level) -> list[list[str]]:
    """Rows of full speed; the first is the head."""
    rows = [["system", "events/s", "CPU s per million events", "peak memory, MB (PSS)"]]
    rows += [
        [
            CASES[name].about,
            results.spread(name, lambda run: run.full.rate).shown(),
            results.spread(name, lambda run: run.full.cpu_s_per_million()).shown(".3g"),
            results.spread(name, lambda run: run.peak_pss / 1e6).shown(),
        ]
        for name in results.cases()
        if CASES[name].level == level
    ]
    rows += [
        [CASES[name].about, f"not installable: {why}", "", ""]
        for name, why in results.missing.items()
        if CASES[name].level == level
    ]
    return rows


def latency_table(results: Results, share: float | None) -> list[list[str]]:
    """Rows of latency at a share of each system's full speed (None: at the common rate)."""
    rows = [["system", "events/s", "p50 ms", "p90", "p99", "p99.9", "most", "probes"]]
    for name in results.cases():
        found = [
            steady for run in results.of(name) for steady in run.steady if steady.share == share
        ]
        if not found:
            continue
        made = [steady.latency for steady in found]
        quantiles = [
            Spread.of(getattr(one, field) for one in made).shown(".1f")
            for field in ("p50", "p90", "p99", "p999", "max")
        ]
        rows.append(
            [
                CASES[name].about,
                Spread.of(steady.rate for steady in found).shown(),
                *quantiles,
                f"{sum(one.probes for one in made):,}",
            ]
        )
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shares_of(results: Results) -> list[float | None]:
    """Loads that latency was measured at."""
    found = {
        steady.share for round_ in results.rounds for run in round_.runs for steady in run.steady
    }
    shares = sorted(share for share in found if share is not None)
    return [*shares, None] if None in found else [*shares]


def report(results: Results) -> str:
    """Everything, for a terminal."""
    parts = []
    titles: dict[Level, str] = {
        "intake": "Intake only (read and count)",
        "scoring": "Scoring only",
        "whole": "Whole path (Kafka -> history -> score -> Redis)",
    }
    for level, title in titles.items():
        rows = throughput_table(results, level)
        if len(rows) > 1:
            parts.append(f"{title}\n{as_text(rows)}")
    for share in shares_of(results):
        at = "at the common rate" if share is None else f"at {share:.0%} of each one's full speed"
        parts.append(f"Latency {at}\n{as_text(latency_table(results, share))}")
    ratios = summary(results)
    if len(ratios) > 1:
        parts.append(as_text(ratios))
    noted = warnings(results)
    if noted:
        parts.append("Mind:\n" + "\n".join(f"- {line}" for line in noted))
    return "\n\n".join(parts)
