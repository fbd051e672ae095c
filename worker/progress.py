"""How far each partition has been taken, and what Redis must therefore hold. No I/O.

Redis keeps, per partition, the offset before which all effects are in it; it is written after them.
So a Redis that comes back with an older number, or none, has lost effects: those from that number
on. A restart without its data, or a failover to a replica that lagged, is known by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from worker.cache import Partition, Position
from worker.events import Records


class Progress:
    """Positions of the partitions that a worker has. For one thread."""

    def __init__(self) -> None:
        #: What Redis must hold at least: what was written, or where reading began.
        self.expected: dict[Partition, int] = {}
        #: Next offset after all that was taken.
        self._reached: dict[Partition, int] = {}
        #: Partitions whose position in Redis is known to be `expected`.
        self._written: set[Partition] = set()

    def took(self, batches: Iterable[Records]) -> None:
        """`batches` are being worked on."""
        for records in batches:
            partition = records.topic, records.partition
            self.expected.setdefault(partition, records.offsets[0])
            self._reached[partition] = records.offsets[-1] + 1

    def positions(self) -> dict[Partition, Position]:
        """What to check, and to write with the effects of all that was taken."""
        return {
            partition: Position(expected, self._reached[partition])
            for partition, expected in self.expected.items()
        }

    def wrote(self) -> None:
        """Such positions are in Redis."""
        self.expected.update(self._reached)
        self._written.update(self._reached)

    def written(self, partition: Partition) -> bool:
        """Whether a position of `partition` was written since it was assigned."""
        return partition in self._written

    def adopt(self, found: Mapping[Partition, int]) -> None:
        """Expect no more than what Redis has."""
        self.expected.update(found)

    def go_back(self, found: Mapping[Partition, int]) -> dict[Partition, int]:
        """Expect what Redis has; returns from where each partition must be read again, for what
        was taken is not all in Redis."""
        self.adopt(found)
        self._reached = dict(self.expected)
        return dict(self.expected)

    def clear(self) -> None:
        """The partitions were taken away."""
        self.expected.clear()
        self._reached.clear()
        self._written.clear()
