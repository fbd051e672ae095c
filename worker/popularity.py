"""Time-decayed popularity per surface, learned from the stream: the fallback's candidates. No I/O.

Forward decay (Cormode et al., ICDE 2009): an event at time t weighs 2^(t / half-life), so that
weights need no touching as time passes. Weights are kept as their base-2 logarithm, which never
overflows. One table per surface and partition, each owned by the partition's worker, with the
offset up to which it has counted: a redelivered event is not counted twice.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from math import log2

from worker.events import Event, EventType

#: How much an act says, beside a view. Hide takes nothing back: it is one user's wish.
EVENT_WEIGHTS: Mapping[EventType, float] = {
    EventType.VIEW: 1.0,
    EventType.CLICK: 1.0,
    EventType.LIKE: 2.0,
    EventType.COMMENT: 3.0,
    EventType.SHARE: 4.0,
    EventType.FOLLOW: 4.0,
    EventType.HIDE: 0.0,
}


#: Half-lives from a batch's first event within which weights are summed as they are.
MAX_AGE = 500.0


class PopularityTable:
    """Log2 weights of at most `max_items` items, counted from one partition."""

    def __init__(self, *, half_life_ms: int, max_items: int) -> None:
        self._half_life_ms = half_life_ms
        self._max_items = max_items
        self.weights: dict[str, float] = {}
        #: Last offset counted and its record time in ms; -1 where none was.
        self.offset = -1
        self.record_time_ms = -1
        #: Items changed and removed since `clear_changes`.
        self.changed: set[str] = set()
        self.removed: set[str] = set()

    def add(self, events: Sequence[Event]) -> None:
        """Count events of one partition in offset order, but for those counted before."""
        counted = [
            event
            for event in events
            if event.offset > self.offset or event.record_time_ms > self.record_time_ms
        ]
        if not counted:
            return
        self.offset = counted[-1].offset
        self.record_time_ms = max(self.record_time_ms, *(one.record_time_ms for one in counted))
        # Sums of a batch are taken as weights at its first event; one logarithm an item suffices.
        half_life_ms, start_ms = self._half_life_ms, counted[0].timestamp_ms
        sums: dict[str, float] = {}
        for event in counted:
            weight = EVENT_WEIGHTS[event.event_type]
            if weight <= 0.0:
                continue
            age = (event.timestamp_ms - start_ms) / half_life_ms
            if abs(age) > MAX_AGE:
                self._add(event.item_id, log2(weight) + event.timestamp_ms / half_life_ms)
                continue
            item = event.item_id
            sums[item] = sums.get(item, 0.0) + weight * 2.0**age
        start = start_ms / half_life_ms
        for item, total in sums.items():
            self._add(item, log2(total) + start)
        if len(self.weights) > 2 * self._max_items:
            self._prune()

    def _add(self, item: str, amount: float) -> None:
        self.weights[item] = log2_add(self.weights.get(item), amount)
        self.changed.add(item)
        self.removed.discard(item)

    def _prune(self) -> None:
        kept = heapq.nlargest(self._max_items, self.weights.items(), key=lambda pair: pair[1])
        dropped = self.weights.keys() - {item for item, _ in kept}
        self.weights = dict(kept)
        self.changed -= dropped
        self.removed |= dropped

    def copy_changes(self) -> PopularityTable:
        """A snapshot to write, and a clean slate here: the two may then go on side by side."""
        snapshot = PopularityTable(half_life_ms=self._half_life_ms, max_items=self._max_items)
        snapshot.weights = {item: self.weights[item] for item in self.changed}
        snapshot.offset, snapshot.record_time_ms = self.offset, self.record_time_ms
        snapshot.changed, self.changed = self.changed, set()
        snapshot.removed, self.removed = self.removed, set()
        return snapshot

    def put_back(self, snapshot: PopularityTable) -> None:
        """`snapshot` was not written: its changes are still to be."""
        self.changed |= snapshot.changed & self.weights.keys()
        self.removed |= snapshot.removed - self.weights.keys()


def log2_add(left: float | None, right: float) -> float:
    """log2(2^left + 2^right) without overflow; None stands for a weight of zero."""
    if left is None:
        return right
    high, low = (left, right) if left >= right else (right, left)
    gap = high - low
    return high if gap > 60.0 else high + log2(1.0 + 2.0**-gap)


def most_popular(tables: Iterable[Mapping[str, float]], count: int) -> list[tuple[str, float]]:
    """The `count` heaviest items over all tables with their log2 weight, heaviest first.

    Ties go to the smaller item id, so that workers agree.
    """
    total: dict[str, float] = {}
    for table in tables:
        for item, weight in table.items():
            total[item] = log2_add(total.get(item), weight)
    return heapq.nsmallest(count, total.items(), key=lambda pair: (-pair[1], pair[0]))
