"""Every cell of the matrix, in the order of the table."""

from __future__ import annotations

from tests.faults import kafka_cells, redis_cells, stream_cells, worker_cells

CELLS = (*worker_cells.CELLS, *kafka_cells.CELLS, *redis_cells.CELLS, *stream_cells.CELLS)
