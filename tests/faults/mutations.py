"""Code broken on purpose: each mutation turns the cells that name it red, or the matrix proves
nothing. Applied inside a worker process by `injected.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.faults.injected import replace


@dataclass(frozen=True)
class Mutation:
    """A defect that somebody could have written."""

    what: str
    apply: Callable[[], None]


def _commit_at_start() -> None:
    def start(function: Any) -> Any:
        def run(batch: Any) -> bool:
            ours: bool = function(batch)
            if ours:
                batch.finish()
            return ours

        return run

    replace("worker.intake:RecordBatch.start", start)


def _forget_offsets() -> None:
    def advance(function: Any) -> Any:
        def run(history: Any, event: Any) -> bool:
            function(history, event)
            return True

        return run

    replace("worker.history:History._advance", advance)


MUTATIONS = {
    "commit_at_start": Mutation("offsets are finished before their effects", _commit_at_start),
    "forget_offsets": Mutation("a history takes a record again", _forget_offsets),
}
