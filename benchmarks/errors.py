"""What can go wrong with a measurement."""

from __future__ import annotations

from worker.errors import StreamrecError


class BenchmarkError(StreamrecError):
    """A measurement could not be made; the message says why."""
