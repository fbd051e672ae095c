"""`make faults`: run the matrix, print it as it goes, write it down.

python -m tests.faults [--only NAME ...] [--mutations] [--list]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from tests.faults.book import Book
from tests.faults.cells import CELLS
from tests.faults.harness import Cell, Parts, Result, run_cell
from worker.local.kafka import KafkaBroker, KafkaCluster, kafka_missing

RESULTS = Path("build/faults.json")
PAGE = Path("docs/faults.md")


def main() -> int:
    """Returns 0 where every cell is green (or, with mutations, red)."""
    options = _parser().parse_args()
    chosen = [
        cell
        for cell in CELLS
        if not options.only or any(name in cell.name for name in options.only)
    ]
    if options.list:
        _say("\n".join(f"{cell.name:<24} {cell.fault}" for cell in chosen))
        return 0
    missing = kafka_missing()
    if missing is not None:
        _say(f"the matrix needs a real Kafka, and {missing} is missing")
        return 69
    book = Book.read(RESULTS)
    as_wanted = True
    with (
        nullcontext(options.keep)
        if options.keep
        else tempfile.TemporaryDirectory(prefix="streamrec-faults-")
    ) as folder:
        for result in _run(chosen, Path(folder), mutate=options.mutations):
            as_wanted = as_wanted and result.green != options.mutations
            book.add(result)
            book.write(RESULTS)
            _say(_line(result))
            for failure in result.failures()[:8]:
                _say(f"    {failure}")
    book.fill(PAGE, CELLS)
    return int(not as_wanted)


def _run(cells: Sequence[Cell], directory: Path, *, mutate: bool) -> Iterator[Result]:
    """Those on one broker first, then those on three."""
    alone = [cell for cell in cells if not cell.cluster]
    together = [cell for cell in cells if cell.cluster]
    if alone:
        with KafkaBroker(directory / "kafka") as broker:
            assert isinstance(broker, KafkaBroker)
            yield from _run_on(Parts(broker=broker), alone, directory, mutate=mutate)
    if together:
        with KafkaCluster(directory / "cluster") as cluster:
            yield from _run_on(Parts(cluster=cluster), together, directory, mutate=mutate)


def _run_on(
    parts: Parts, cells: Sequence[Cell], directory: Path, *, mutate: bool
) -> Iterator[Result]:
    for cell in cells:
        mutation = cell.mutation if mutate else None
        yield run_cell(cell, parts, directory / cell.name, mutation=mutation)


def _line(result: Result) -> str:
    verdict = result.verdict
    if verdict is None:
        return f"{result.cell:<24} no evidence"
    return (
        f"{result.cell:<24} {'green' if result.green else 'RED':<6} {verdict.events:>6} events"
        f" {verdict.dead_letters:>4} dead letters {verdict.repeats:>5} repeats"
        f" {verdict.lost:>4} lost  recovered after {_s(result.recovery_s)}, gap"
        f" {_s(result.commit_gap_s)}, took {result.took_s:.0f} s"
    )


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cells by part of name"
    )
    parser.add_argument("--mutations", action="store_true", help="break the worker in each cell")
    parser.add_argument("--keep", metavar="DIRECTORY", help="run there, and leave all logs")
    parser.add_argument("--list", action="store_true", help="list the cells")
    return parser


if __name__ == "__main__":
    sys.exit(main())
