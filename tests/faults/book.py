"""Keeps results: `build/faults.json`, and the tables in docs/faults.md that are made of it.

A run of some cells replaces those and leaves the others.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.harness import Cell, Result
from tests.faults.mutations import MUTATIONS

_PLACE = re.compile(r"(<!-- faults:(\w+) -->\n).*?(<!-- /faults -->)", re.DOTALL)


@dataclass
class Book:
    """All results so far, by cell."""

    plain: dict[str, dict[str, Any]] = field(default_factory=dict)
    mutated: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Book:
        """What `path` holds; nothing where there is no such file."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def add(self, result: Result) -> None:
        """Note a result in the place of an earlier one of the same cell."""
        rows = self.plain if result.mutation is None else self.mutated
        rows[result.cell] = _row(result)

    def write(self, path: Path) -> None:
        """Write all down."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def fill(self, page: Path, cells: Sequence[Cell]) -> None:
        """Put the tables into a page, between `<!-- faults:NAME -->` and `<!-- /faults -->`."""
        made = {"cells": self._cells, "mutations": self._mutations, "machine": self._machine}
        text = _PLACE.sub(
            lambda place: f"{place[1]}{made[place[2]](cells)}\n{place[3]}", page.read_text()
        )
        page.write_text(text)

    def _cells(self, cells: Sequence[Cell]) -> str:
        lines = [
            "| cell | what happens | events | dead letters | repeats | lost | recovered after"
            " | longest gap |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for cell in cells:
            row = self.plain.get(cell.name)
            if row is None:
                lines.append(f"| {cell.name} | {cell.fault} | not run | | | | | |")
                continue
            lost = f"{row['lost']}" if row["green"] else f"{row['lost']} (**red**)"
            lines.append(
                f"| {cell.name} | {cell.fault} | {row['events']:,} | {row['dead_letters']:,}"
                f" | {row['repeats']:,} | {lost} | {_s(row['recovery_s'])}"
                f" | {_s(row['commit_gap_s'])} |"
            )
        return "\n".join(lines)

    def _mutations(self, cells: Sequence[Cell]) -> str:
        lines = ["| cell | broken on purpose | found |", "|---|---|---|"]
        for cell in cells:
            row = self.mutated.get(cell.name)
            what = MUTATIONS[cell.mutation].what
            found = "not run" if row is None else "**nothing**" if row["green"] else row["found"]
            lines.append(f"| {cell.name} | {what} | {found} |")
        return "\n".join(lines)

    def _machine(self, cells: Sequence[Cell]) -> str:
        rows = [self.plain[cell.name] for cell in cells if cell.name in self.plain]
        if not rows:
            return "Not run yet."
        loads = [row["machine"]["load"] for row in rows]
        machines = Counter(
            f"{row['machine']['cpu']}, {row['machine']['cpus']} CPUs, {row['machine']['system']}"
            for row in rows
        )
        days = sorted({row["at"][:10] for row in rows})
        when = " to ".join(dict.fromkeys((days[0], days[-1])))
        return (
            f"{'; '.join(machines)}; {when}; load average {min(loads):.1f} to {max(loads):.1f} at"
            " the ends of cells."
        )


def _row(result: Result) -> dict[str, Any]:
    verdict = result.verdict
    return {
        "mutation": result.mutation,
        "green": result.green,
        **({} if verdict is None else asdict(verdict) | {"violations": None}),
        "fault_s": result.fault_s,
        "recovery_s": result.recovery_s,
        "commit_gap_s": result.commit_gap_s,
        "took_s": result.took_s,
        "failures": result.failures()[:20],
        "found": _found(result),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu(),
            "cpus": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.release()}",
            "load": os.getloadavg()[0],
        },
    }


def _found(result: Result) -> str:
    """What a red cell was red by, in a line."""
    kinds: Counter[str] = Counter()
    for violation in result.verdict.violations if result.verdict else ():
        kinds[violation.kind] += violation.count
    found = [f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.most_common(3)]
    problems = [one.splitlines()[0] for one in result.problems]
    return "; ".join([*found, *problems[:1]]).replace("|", "\\|")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"
