"""The short form of the fault matrix: the cells that matter most. All of it: `make faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cells import CELLS
from tests.faults.harness import Cell, Parts, run_cell
from worker.local.kafka import KafkaBroker


@pytest.mark.kafka
@pytest.mark.parametrize("cell", [one for one in CELLS if one.short], ids=lambda cell: cell.name)
def test_nothing_is_lost_nor_done_twice(cell: Cell, tmp_path: Path, kafka: KafkaBroker) -> None:
    result = run_cell(cell, Parts(broker=kafka), tmp_path)
    assert result.failures() == []
