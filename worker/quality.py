"""Did users want what they were served? Ranks of their next events in the list before. No I/O.

Users are the unit that is independent of the others; events of one user are not. So a tally holds,
beside plain sums, sums of products of per-user sums, from which the variance over users follows
(ratio estimator, linearised: Deng, Knoblich and Lu, KDD 2018). All of it is additive: partitions
are tallied apart and merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from math import sqrt
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from worker.events import EventType
from worker.sequences import Interval, MeanTally, half_width

#: What says that the user wanted the item. A hide says the opposite. A view says little: whatever
#: is displayed gets some, and in the replayed MovieLens ratings it stands for three stars or less.
POSITIVE_TYPES: frozenset[EventType] = frozenset(
    {EventType.LIKE, EventType.COMMENT, EventType.SHARE, EventType.FOLLOW, EventType.CLICK}
)
#: Events of one user that count in one trial: no user, or robot, decides it alone.
MAX_USER_EVENTS = 50
#: Differences that the bounds are tuned to find, as a share of the figure itself.
EFFECT = 0.2

Arm = Literal["canary", "stable"]


def rank_of(item: str, served: Sequence[str]) -> int | None:
    """Place of `item` in the list, from 1; None where it is not in it."""
    try:
        return served.index(item) + 1
    except ValueError:
        return None


def bucket(user_id: str, salt: str) -> float:
    """Where the user falls in [0, 1), evenly and alike in every worker.

    The first 53 bits of BLAKE2b (8 bytes, keyed by nothing) over salt, a zero byte, user id, in
    UTF-8. A trial's salt is its surface and period, so that each trial draws its users anew.
    """
    data = f"{salt}\0{user_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def arm_of(user_id: str, salt: str, share: float) -> Arm | None:
    """The group of a trial with `share` in 0..1 of users: canary, an equal one of stable, neither.

    Above one half the groups cannot be equal: all others are the stable one.
    """
    place = bucket(user_id, salt)
    if place < share:
        return "canary"
    return "stable" if place < 2.0 * share else None


class UserRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one user did in one trial; kept beside the history."""

    #: Names the tally that it is counted in; in another one it counts for nothing.
    tally: int
    events: int = 0
    #: Events for which both versions' lists were known.
    pairs: int = 0
    #: Events whose item was in the user's own arm's list, and sum of 1 / rank.
    hits: int = 0
    gain: float = 0.0
    #: The same in the other version's list.
    other_hits: int = 0
    other_gain: float = 0.0

    def noted(
        self, item: str, served: Sequence[str], other: Sequence[str] | None = None
    ) -> UserRecord:
        """The record after a positive event; itself after `MAX_USER_EVENTS`.

        Args:
            item: what the user acted upon.
            served: the list of the user's arm as it stood before the event.
            other: the other version's list of the same moment, where one was made.
        """
        if self.events >= MAX_USER_EVENTS:
            return self
        rank = rank_of(item, served)
        other_rank = None if other is None else rank_of(item, other)
        return UserRecord(
            self.tally,
            self.events + 1,
            self.pairs + (other is not None),
            self.hits + (rank is not None),
            self.gain + (1.0 / rank if rank else 0.0),
            self.other_hits + (other_rank is not None),
            self.other_gain + (1.0 / other_rank if other_rank else 0.0),
        )


def record_in(record: UserRecord | None, tally: int) -> UserRecord:
    """`record` where it is counted in this tally, else an empty one."""
    return record if record is not None and record.tally == tally else UserRecord(tally)


class Tally(msgspec.Struct, array_like=True, gc=False):
    """Sums over the users of one arm, of one partition or of all.

    With n events of a user, h hits, g gain, and H, G those of the other version's list.
    """

    users: int = 0
    events: int = 0
    pairs: int = 0
    hits: int = 0
    gain: float = 0.0
    other_hits: int = 0
    other_gain: float = 0.0
    #: n^2, h^2, hn.
    events_events: int = 0
    hits_hits: int = 0
    hits_events: int = 0
    #: g^2, gn, G^2, Gn, gG.
    gain_gain: float = 0.0
    gain_events: float = 0.0
    other_other: float = 0.0
    other_events: float = 0.0
    gain_other: float = 0.0

    def replace(self, before: UserRecord, after: UserRecord) -> None:
        """Count one user's record anew: `before` is what was counted of the user so far."""
        if after is before:
            return
        for sign, one in ((-1, before), (1, after)):
            if not one.events:
                continue
            self.users += sign
            self.events += sign * one.events
            self.pairs += sign * one.pairs
            self.hits += sign * one.hits
            self.gain += sign * one.gain
            self.other_hits += sign * one.other_hits
            self.other_gain += sign * one.other_gain
            self.events_events += sign * one.events * one.events
            self.hits_hits += sign * one.hits * one.hits
            self.hits_events += sign * one.hits * one.events
            self.gain_gain += sign * one.gain * one.gain
            self.gain_events += sign * one.gain * one.events
            self.other_other += sign * one.other_gain * one.other_gain
            self.other_events += sign * one.other_gain * one.events
            self.gain_other += sign * one.gain * one.other_gain

    def merged(self, other: Tally) -> Tally:
        """The sums over both; the two must have no user in common."""
        mine, theirs = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return Tally(*(left + right for left, right in zip(mine, theirs, strict=True)))

    def swapped(self) -> Tally:
        """The same with the two versions' gains exchanged; of hits, only their number."""
        return Tally(
            users=self.users,
            events=self.events,
            pairs=self.pairs,
            hits=self.other_hits,
            gain=self.other_gain,
            other_hits=self.hits,
            other_gain=self.gain,
            events_events=self.events_events,
            gain_gain=self.other_other,
            gain_events=self.other_events,
            other_other=self.gain_gain,
            other_events=self.gain_events,
            gain_other=self.gain_other,
        )

    @property
    def hit_rate(self) -> float:
        """Share of events whose item was in the list; 0 where there was none."""
        return self.hits / self.events if self.events else 0.0

    @property
    def mrr(self) -> float:
        """Mean of 1 / rank over events, 0 for an item not in the list."""
        return self.gain / self.events if self.events else 0.0

    def hit_rate_interval(self, alpha: float) -> Interval:
        """Of `hit_rate`; at all times at once, each side with `alpha`."""
        return self._interval(self.hits, self.hits_hits, self.hits_events, alpha)

    def mrr_interval(self, alpha: float) -> Interval:
        """Of `mrr`; at all times at once, each side with `alpha`."""
        return self._interval(self.gain, self.gain_gain, self.gain_events, alpha)

    def _interval(self, total: float, squares: float, products: float, alpha: float) -> Interval:
        if self.users < 2 or total <= 0.0:
            return Interval(total / max(self.events, 1), 0.0, 1.0)
        mean = total / self.events
        spread = residual_squares(self, total, squares, products)
        # As in `gate.difference`: one more user who gained nothing, or much.
        size = squares / total
        half = half_width(
            (spread + size * size) / self.events**2, effect=EFFECT * mean, alpha=alpha
        )
        margin = half + size / self.events
        return Interval(mean, max(0.0, mean - margin), min(1.0, mean + margin))


def residual_squares(tally: Tally, total: float, squares: float, products: float) -> float:
    """Sum over users of (x - n sum(x) / sum(n))^2, for n events and a sum x of a user.

    Args:
        total: sum of x over users.
        squares: of x^2.
        products: of xn.

    Returns:
        The sum, with the factor users / (users - 1) of a small sample; needs two users.
    """
    mean = total / tally.events
    raw = squares - 2.0 * mean * products + mean * mean * tally.events_events
    return max(0.0, raw) * tally.users / (tally.users - 1)


class Coverage:
    """Which items of one version's catalogue were served: one byte an item, one bit stored."""

    def __init__(self, item_count: int) -> None:
        self._served = bytearray(item_count)

    def note(self, indexes: Iterable[int]) -> None:
        """Count served items by model index, from 1; others (cold items) are passed over."""
        served = self._served
        for index in indexes:
            if 0 < index <= len(served):
                served[index - 1] = 1

    @property
    def share(self) -> float:
        """Of the catalogue, in 0..1."""
        return sum(self._served) / len(self._served) if self._served else 0.0

    def to_bytes(self) -> bytes:
        """One bit an item."""
        return np.packbits(self._flags()).tobytes()

    def merge(self, data: bytes) -> None:
        """Take in what `to_bytes` gave elsewhere; twice is once.

        Raises:
            ValueError: it is of a catalogue of another size.
        """
        if len(data) != (len(self._served) + 7) // 8:
            raise ValueError(f"coverage of another catalogue than {len(self._served)} items")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=len(self._served))
        self._served = bytearray((self._flags() | bits).tobytes())

    def _flags(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._served, np.uint8)


def overlap(left: Collection[str], right: Collection[str]) -> float:
    """Share of items that two lists have in common, of the longer one; 1 where both are empty."""
    longest = max(len(left), len(right))
    return len(set(left) & set(right)) / longest if longest else 1.0


def drift(before: MeanTally, after: MeanTally) -> float:
    """How far scores moved, in standard deviations: the standardised mean difference.

    Cohen's d with the mean of both variances (Cohen 1988, chapter 2): .2 is little, .8 much. Only
    versions of one recipe score on one scale.
    """
    spread = sqrt((before.variance + after.variance) / 2.0)
    return (after.mean - before.mean) / spread if spread > 0.0 else 0.0
