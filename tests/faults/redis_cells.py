"""Cells about Redis: away, emptied, full, slow, failed over."""

from __future__ import annotations

from tests.faults.harness import Cell

CELLS: tuple[Cell, ...] = ()
