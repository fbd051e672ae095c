"""Which offset may be committed: the contiguous finished prefix of each partition. No I/O.

Faust 0.15.3 commits past an event that is still in flight (faust-streaming/faust#606). Here a
partition's position is the start of its first unfinished range, whatever finished behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)


@dataclass(slots=True, eq=False)
class Span:
    """Offsets `[first, next)` of one partition, delivered together."""

    first: int
    next: int
    events: int
    finished: bool = False


class OffsetTracker(Generic[P]):
    """Spans in delivery order per partition `P`, and the prefix of them that is finished.

    `begin` must be called in delivery order. Offsets that the log skips (compaction, transaction
    markers) belong to the span after them, so that they never hold a commit back.
    """

    def __init__(self) -> None:
        self._spans: dict[P, deque[Span]] = {}
        self._position: dict[P, int] = {}
        self._committed: dict[P, int] = {}
        #: Events begun and not yet finished, over all partitions.
        self.in_flight = 0

    def begin(self, partition: P, first: int, next_: int, events: int) -> Span:
        """Note that `[first, next_)` was delivered.

        Raises:
            ValueError: the span is empty or starts before the one delivered last, which would
                break the order of events.
        """
        spans = self._spans.setdefault(partition, deque())
        after = spans[-1].next if spans else self._position.get(partition, first)
        if next_ <= first or first < after:
            raise ValueError(f"offsets [{first}, {next_}) of {partition} after {after}")
        span = Span(first, next_, events)
        spans.append(span)
        if partition not in self._position:
            # Where reading began is what the group had committed, or the start of the log.
            self._position[partition] = self._committed[partition] = first
        self.in_flight += events
        return span

    def finish(self, partition: P, span: Span) -> bool:
        """Note that all effects of `span` are durable. False if it is not (or no longer) ours."""
        spans = self._spans.get(partition)
        if spans is None or span.finished or span not in spans:
            return False
        span.finished = True
        self.in_flight -= span.events
        while spans and spans[0].finished:
            self._position[partition] = spans.popleft().next
        return True

    def committable(self) -> dict[P, int]:
        """Next offset to read per partition, for those that moved since the last commit.

        A span that skips offsets at its head (a gap) leaves the position before the gap until it
        is finished, which is safe: the gap holds no event.
        """
        return {
            partition: position
            for partition, position in self._position.items()
            if self._committed[partition] < position
        }

    def committed(self, offsets: dict[P, int]) -> None:
        """Note that the broker accepted `offsets`."""
        for partition, offset in offsets.items():
            if partition in self._position:
                self._committed[partition] = max(offset, self._committed[partition])

    def positions(self) -> dict[P, int]:
        """Start of the first unfinished offset per partition."""
        return dict(self._position)

    def committed_positions(self) -> dict[P, int]:
        """Next offset that the group would read, per partition."""
        return dict(self._committed)

    def unfinished(self) -> list[P]:
        """Partitions with a span in flight."""
        return [partition for partition, spans in self._spans.items() if spans]

    def rewind(self, partition: P) -> None:
        """Drop what is known of `partition`: it is read again from an earlier offset, and committed
        from there on."""
        for span in self._spans.pop(partition, ()):
            if not span.finished:
                self.in_flight -= span.events
        self._position.pop(partition, None)
        self._committed.pop(partition, None)

    def forget(self) -> None:
        """Drop everything: the partitions were taken away; what is in flight is read again."""
        self._spans.clear()
        self._position.clear()
        self._committed.clear()
        self.in_flight = 0
