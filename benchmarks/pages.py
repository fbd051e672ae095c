"""Puts measured figures into pages, between `<!-- bench:NAME -->` and `<!-- /bench -->`.

So no figure in a page is typed by hand, and each can be traced to bench-results.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.capacity import capacity_table
from benchmarks.errors import BenchmarkError
from benchmarks.results import (
    Results,
    as_markdown,
    latency_table,
    load,
    shares_of,
    summary,
    throughput_table,
    warnings,
)
from benchmarks.scale import ScaleResults, scale_table
from benchmarks.soak import SoakResults, soak_report
from benchmarks.swaps import SwapMemoryResults, SwapResults, load_report, memory_report
from benchmarks.trials import Outcome, trials_table
from models.files import write_whole

_PLACE = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def blocks(path: Path) -> Mapping[str, Callable[[], str]]:
    """What can stand in a page, by name; read from the results only when asked for."""

    def compared(make: Callable[[Results], str]) -> Callable[[], str]:
        return lambda: make(load(path, "compare", Results))

    return {
        "machine": compared(_machine),
        "intake": compared(lambda found: as_markdown(throughput_table(found, "intake"))),
        "scoring": compared(lambda found: as_markdown(throughput_table(found, "scoring"))),
        "whole": compared(lambda found: as_markdown(throughput_table(found, "whole"))),
        "latency": compared(_latency),
        "ratios": compared(lambda found: as_markdown(summary(found))),
        "warnings": compared(_warnings),
        "capacity": compared(lambda found: as_markdown(capacity_table(found))),
        "scale": lambda: as_markdown(scale_table(load(path, "scale", ScaleResults))),
        "soak": lambda: _quoted(soak_report(load(path, "soak", SoakResults))),
        "swaps": lambda: _quoted(load_report(load(path, "swaps", SwapResults))),
        "swap-memory": lambda: _quoted(memory_report(load(path, "swap-memory", SwapMemoryResults))),
        "trials": lambda: as_markdown(trials_table(load(path, "trials", list[Outcome]))),
    }


def fill(text: str, known: Mapping[str, Callable[[], str]]) -> str:
    """`text` with every place filled.

    Raises:
        BenchmarkError: a place has an unknown name, or its figures were not measured yet.
    """

    def filled(place: re.Match[str]) -> str:
        if place.group(2) not in known:
            raise BenchmarkError(
                f"no block {place.group(2)!r}; there are {', '.join(sorted(known))}"
            )
        return f"{place.group(1)}{known[place.group(2)]()}\n{place.group(3)}"

    return _PLACE.sub(filled, text)


def fill_file(page: Path, results: Path) -> bool:
    """Fill a page in place; says whether it changed."""
    before = page.read_text(encoding="utf-8")
    after = fill(before, blocks(results))
    if after != before:
        write_whole(page, after.encode())
    return after != before


def _machine(results: Results) -> str:
    about = results.machine
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    cpus = about["cpus"]
    return (
        f"{about['cpu']} ({', '.join(about['flags'])}), {about['cores']} CPUs, {about['system']};"
        f" system under test on CPU {_list(cpus['sut'])}, all else on {_list(cpus['rest'])}."
        f" Broker {results.broker}; model {results.model}; {results.workload['kind']},"
        f" {results.workload['users']:,} users, histories of {results.workload['history']};"
        f" {len(results.rounds)} rounds, {results.started_at}. {versions}."
    )


def _quoted(report: str) -> str:
    return f"```\n{report}\n```"


def _list(cpus: list[int]) -> str:
    return ",".join(map(str, cpus))


def _latency(results: Results) -> str:
    parts = []
    for share in shares_of(results):
        at = "one rate for all" if share is None else f"{share:.0%} of each one's full speed"
        parts.append(f"At {at}:\n\n{as_markdown(latency_table(results, share))}")
    return "\n\n".join(parts)


def _warnings(results: Results) -> str:
    return "\n".join(f"- {line}" for line in warnings(results)) or "Nothing."
