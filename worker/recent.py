"""What the metrics were in the last minutes, for rates, latencies and small charts. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from worker.samples import Buckets

#: Seconds between two moments, and how many are kept: ten minutes.
INTERVAL_S = 2.0
KEPT = 301
#: Moments that one point of a chart spans.
STEP = 5


@dataclass(frozen=True, slots=True)
class Moment:
    """Sums since the worker's start, and gauges, at one time."""

    #: `time.monotonic()`.
    at: float
    events: float = 0.0
    dead_letters: float = 0.0
    lag: float = 0.0
    resident_bytes: float = 0.0
    #: `streamrec_cached_seconds`.
    cached: Buckets = field(default_factory=Buckets)
    #: `streamrec_event_seconds`.
    published: Buckets = field(default_factory=Buckets)
    #: `streamrec_stage_seconds` by stage.
    stages: Mapping[str, Buckets] = field(default_factory=dict)


class Recent:
    """The moments of the last ten minutes, oldest first. One thread adds, others read."""

    def __init__(self) -> None:
        self._moments: deque[Moment] = deque(maxlen=KEPT)

    def add(self, moment: Moment) -> None:
        """Note how things are now."""
        self._moments.append(moment)

    def span(self, seconds: float) -> tuple[Moment, Moment] | None:
        """The oldest moment of the last `seconds`, and the newest; None before there are two."""
        moments = list(self._moments)
        if len(moments) < 2:
            return None
        newest = moments[-1]
        oldest = next(one for one in moments if one.at >= newest.at - seconds)
        return (oldest, newest) if oldest is not newest else (moments[-2], newest)

    def chart(self, value: Callable[[Moment, Moment], float | None]) -> list[float | None]:
        """One value for each two moments that lie ten seconds apart, oldest first.

        Args:
            value: of a stretch of time, from its two ends; None where it has none.
        """
        moments = list(self._moments)
        return [value(before, after) for before, after in pairwise(moments[::-STEP][::-1])]


def rate(before: Moment, after: Moment) -> float:
    """Events a second between two moments."""
    seconds = after.at - before.at
    return (after.events - before.events) / seconds if seconds > 0.0 else 0.0
