"""How long a partition has been behind, and how long finished events have waited to be committed,
from looks at its offsets. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)


class PartitionAges(Generic[P]):
    """Times since something was last in order, per partition `P`; in seconds of any one clock."""

    def __init__(self) -> None:
        self._behind_since: dict[P, float] = {}
        #: The first finished position that is not committed, and when it was first seen so.
        self._uncommitted: dict[P, tuple[int, float]] = {}

    def keep(self, partitions: Collection[P]) -> None:
        """Forget all others: they were taken away."""
        for known in (self._behind_since, self._uncommitted):
            for partition in known.keys() - set(partitions):
                del known[partition]

    def behind_s(self, partition: P, lag: int, now: float) -> float:
        """Seconds since the first look at which `partition` was behind and has been since.

        Args:
            lag: events on the broker that are not finished.
        """
        if not lag:
            self._behind_since.pop(partition, None)
            return 0.0
        return now - self._behind_since.setdefault(partition, now)

    def uncommitted_s(self, partition: P, finished: int, committed: int, now: float) -> float:
        """Seconds since the oldest finished event that is not committed was seen to be finished.

        Under load something waits for the next commit at every look; what counts is that it does
        not wait long.

        Args:
            finished: next offset after the contiguous finished prefix.
            committed: next offset that the group would read.
        """
        position, since = self._uncommitted.get(partition, (finished, now))
        if committed >= position:
            position, since = finished, now
        if committed >= finished:
            self._uncommitted.pop(partition, None)
            return 0.0
        self._uncommitted[partition] = position, since
        return now - since
