"""What users did with the lists that each version served, tallied per partition. No I/O.

Each positive event is first looked up in the list that the user was served before it, then learned
from (test, then learn: Gama, Sebastiao and Rodrigues, Machine Learning 90, 2013). Tallies belong to
a partition of the events topic, as its users do, and move with it. Redis holds them whole, written
with the histories and after them: a repeated event is known by its user's history, and not counted
twice; a crash in between loses the counts of one micro-batch.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from math import log as ln
from typing import get_args

import msgspec
from prometheus_client import Counter

from worker.arms import Arm, Judged
from worker.cache import PartitionKey
from worker.events import Event
from worker.gate import Evidence
from worker.history import History
from worker.lists import Compared
from worker.metrics import Metrics
from worker.quality import POSITIVE_TYPES, Tally, rank_of, record_in
from worker.sequences import MeanTally
from worker.versions import mark

log = logging.getLogger(__name__)

_ARMS: tuple[Arm, ...] = get_args(Arm)


class PartitionTally(msgspec.Struct, kw_only=True):
    """What the users of one partition did on one surface, in one trial."""

    #: The trial, or, between trials, the release: the revision that it began with.
    period: int
    #: Tells this tally from those before: where one was lost, or overwritten by a worker that had
    #: not heard of the trial yet, its users are counted anew, and whole.
    number: int = msgspec.field(default_factory=lambda: random.getrandbits(53))
    #: Users served the canary, as many served the stable version, and all others; `shadow` are
    #: those for whom a shadow made lists that nobody saw.
    canary: Tally = msgspec.field(default_factory=Tally)
    stable: Tally = msgspec.field(default_factory=Tally)
    others: Tally = msgspec.field(default_factory=Tally)
    shadow: Tally = msgspec.field(default_factory=Tally)
    #: ln(seconds of the other version / seconds of the stable one) on the same inputs.
    latency: MeanTally = msgspec.field(default_factory=MeanTally)
    #: Calls of the other version, and those that failed.
    scorings: int = 0
    errors: int = 0
    #: Of the last record that is counted, as `versions.WRITE` compares it; must stay the last
    #: field. Left out by releases that wrote without comparing.
    mark: bytes = b""

    def name(self, arm: Arm) -> int:
        """Names the tally of one side in its users' records: a user changes sides within a trial
        where a worker loads the canary late."""
        return self.number * len(_ARMS) + _ARMS.index(arm)

    def merged(self, other: PartitionTally) -> PartitionTally:
        """The sums over both."""
        return PartitionTally(
            period=self.period,
            canary=self.canary.merged(other.canary),
            stable=self.stable.merged(other.stable),
            others=self.others.merged(other.others),
            shadow=self.shadow.merged(other.shadow),
            latency=self.latency.merged(other.latency),
            scorings=self.scorings + other.scorings,
            errors=self.errors + other.errors,
        )

    def evidence(self) -> Evidence:
        """What the gate decides a canary's trial by."""
        return Evidence(self.stable, self.canary, self.latency, self.scorings, self.errors)


_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE = msgspec.msgpack.Decoder(PartitionTally).decode


def decode_tally(data: bytes | None, period: int) -> PartitionTally:
    """A stored tally where it is one of this trial, else an empty one."""
    if data is not None:
        try:
            stored = _DECODE(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            # Figures of a trial are not worth stopping the stream for.
            log.error("tally_damaged error=%s", error)
        else:
            if stored.period == period:
                return stored
    return PartitionTally(period=period)


def merged(tallies: Iterable[PartitionTally], period: int) -> PartitionTally:
    """The sums over all partitions."""
    total = PartitionTally(period=period)
    for one in tallies:
        total = total.merged(one)
    return total


class Trials:
    """The tallies of a worker's partitions. For one thread.

    Args:
        read: the stored tally of a partition; None where there is none.
    """

    def __init__(self, read: Callable[[PartitionKey], bytes | None], metrics: Metrics) -> None:
        self._read = read
        self._metrics = metrics
        self._tallies: dict[PartitionKey, PartitionTally] = {}
        self._changed: set[PartitionKey] = set()
        #: By surface and version: looking labels up takes longer than counting.
        self._counters: dict[tuple[str, str], list[Counter]] = {}
        self._generation = metrics.versions.generation

    def wants(self, event: Event, history: History) -> bool:
        """Whether `event`, not yet applied, says what the list was worth.

        Only what the user had not met before: lists do not hold items that the user has seen, has
        hidden or follows (`ranking.not_shown`).
        """
        item = event.item_id
        return (
            event.event_type in POSITIVE_TYPES
            and history.served is not None
            and item not in history.items
            and item not in history.hidden
            and item not in history.followed
        )

    def count(self, event: Event, history: History) -> None:
        """Look the item of an applied event up in what its user was served; metrics only."""
        served = history.served
        assert served is not None
        labels = event.surface.value, served.version
        metrics = self._metrics
        if self._generation != metrics.versions.generation:
            self._counters.clear()
            self._generation = metrics.versions.generation
        counters = self._counters.get(labels)
        if counters is None:
            exported = labels[0], metrics.versions.label(*labels)
            families = metrics.judged, metrics.hits, metrics.reciprocal_ranks
            counters = self._counters[labels] = [one.labels(*exported) for one in families]
        judged, hits, reciprocal_ranks = counters
        judged.inc()
        rank = rank_of(event.item_id, served.items)
        if rank is not None:
            hits.inc()
            reciprocal_ranks.inc(1.0 / rank)

    def note(
        self, place: PartitionKey, event: Event, history: History, period: int, judged: Judged
    ) -> None:
        """Count what an applied event says of the versions of a trial."""
        side, own, other = judged
        tally = self._tally(place, period)
        before = record_in(history.record, tally.name(side))
        after = before.noted(event.item_id, own.items, None if other is None else other.items)
        getattr(tally, side).replace(before, after)
        history.record = after
        self._changed.add(place)

    def compared(self, place: PartitionKey, period: int, compared: Compared) -> None:
        """Count how both versions did on the same users of a micro-batch."""
        tally = self._tally(place, period)
        # By the call: what breaks one list of a call mostly breaks all of them.
        tally.scorings += 1
        tally.errors += compared.failed
        if compared.seconds > 0.0 and compared.stable_s > 0.0:
            tally.latency.add(ln(compared.seconds / compared.stable_s))
        self._changed.add(place)

    def changes(self, reached: Mapping[PartitionKey, tuple[int, int]]) -> dict[PartitionKey, bytes]:
        """Stored form of the tallies that changed since `written`.

        Args:
            reached: offset and record time (ms) of the last event counted, per place.
        """
        for place in self._changed:
            own = reached.get(place)
            if own is not None:
                self._tallies[place].mark = mark([(place.topic, place.partition, *own)])
        return {place: _ENCODE(self._tallies[place]) for place in self._changed}

    def written(self) -> None:
        """`changes` are in Redis."""
        self._changed.clear()

    def drop(self, places: Iterable[PartitionKey]) -> None:
        """Read these again: Redis has something newer."""
        for place in places:
            self._tallies.pop(place, None)
            self._changed.discard(place)

    def clear(self) -> None:
        """The partitions were taken away."""
        self._tallies.clear()
        self._changed.clear()

    def _tally(self, place: PartitionKey, period: int) -> PartitionTally:
        tally = self._tallies.get(place)
        if tally is None:
            tally = self._tallies[place] = decode_tally(self._read(place), period)
        elif tally.period != period:
            tally = self._tallies[place] = PartitionTally(period=period)
        return tally
