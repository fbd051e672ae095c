"""What a user recently did on one surface: a bounded, idempotent, time-ordered record. No I/O.

Item ids are kept, never model indexes, since a model swap may renumber items.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import msgspec

from worker.errors import HistoryFormatError
from worker.events import DELIBERATE_TYPES, Event, EventType, Surface

Outcome = Literal["applied", "duplicate", "late"]

#: Layout of the stored form; a reader refuses what it does not know.
FORMAT = 1
#: Followed users that are kept beyond the history, newest first to stay.
MAX_FOLLOWED = 5_000


class StoredHistory(msgspec.Struct, array_like=True, gc=False):
    """A history as Redis holds it (MessagePack array, see docs/design.md)."""

    format: int
    items: list[str]
    timestamps: list[int]
    hidden: list[str]
    event_ids: list[int]
    #: topic -> partition -> [last applied offset, its record time in ms].
    applied: dict[str, dict[int, tuple[int, int]]]
    #: Last, and empty where a release before it wrote: those read and write the rest.
    followed: list[str] = []


_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE = msgspec.msgpack.Decoder(StoredHistory).decode


class History:
    """The last `length` items of one user on one surface, oldest first.

    An event is applied once:

    - a redelivered record is known by its offset: a partition's offsets only grow, so one at or
      below the last applied is a repeat. (A topic made anew starts again at 0 with later record
      times; those are not taken for repeats.)
    - a producer's own repeat, at another offset, is known by `event_id`, among the last
      `4 * length` ids.
    """

    __slots__ = ("applied", "event_ids", "followed", "hidden", "items", "length", "timestamps")

    def __init__(self, length: int) -> None:
        self.length = length
        self.items: list[str] = []
        self.timestamps: list[int] = []
        #: Items that the user asked not to see, oldest first, at most `length`.
        self.hidden: list[str] = []
        self.event_ids: list[int] = []
        #: On the surface friends, whom the user follows: a dict for its order, oldest first. They
        #: outlast `items`, since nobody wants those recommended whom they follow.
        self.followed: dict[str, None] = {}
        self.applied: dict[str, dict[int, tuple[int, int]]] = {}

    def apply(self, event: Event) -> Outcome:
        """Take `event` in. `late` is older than all of a full history and changes nothing."""
        record = event.record
        partitions = self.applied.setdefault(record.topic, {})
        last = partitions.get(record.partition)
        if last is not None and record.offset <= last[0] and record.timestamp_ms <= last[1]:
            return "duplicate"
        newest_ms = record.timestamp_ms if last is None else max(last[1], record.timestamp_ms)
        partitions[record.partition] = (record.offset, newest_ms)
        if event.event_id is not None:
            identity = event_hash(event.event_id)
            if identity in self.event_ids:
                return "duplicate"
            self.event_ids.append(identity)
            del self.event_ids[: -4 * self.length]
        if event.event_type is EventType.HIDE:
            self._hide(event.item_id)
            return "applied"
        if event.event_type in DELIBERATE_TYPES and event.item_id in self.hidden:
            self.hidden.remove(event.item_id)
        if event.event_type is EventType.FOLLOW and event.surface is Surface.FRIENDS:
            self._follow(event.item_id)
        return self._insert(event.item_id, event.timestamp_ms)

    def _follow(self, item: str) -> None:
        self.followed.pop(item, None)
        self.followed[item] = None
        if len(self.followed) > MAX_FOLLOWED:
            del self.followed[next(iter(self.followed))]

    def _hide(self, item: str) -> None:
        self.followed.pop(item, None)
        if item in self.items:
            kept = [
                (known, at)
                for known, at in zip(self.items, self.timestamps, strict=True)
                if known != item
            ]
            self.items = [known for known, _ in kept]
            self.timestamps = [at for _, at in kept]
        if item in self.hidden:
            self.hidden.remove(item)
        self.hidden.append(item)
        del self.hidden[: -self.length]

    def _insert(self, item: str, timestamp_ms: int) -> Outcome:
        items, timestamps = self.items, self.timestamps
        # Events mostly come in order, so the place is nearly always the end.
        place = (
            len(items)
            if not timestamps or timestamps[-1] <= timestamp_ms
            else bisect_right(timestamps, timestamp_ms)
        )
        if place > 0 and items[place - 1] == item:
            # View, then like, of one post is one interest, not two.
            timestamps[place - 1] = timestamp_ms
            return "applied"
        if place == 0 and len(items) >= self.length:
            return "late"
        items.insert(place, item)
        timestamps.insert(place, timestamp_ms)
        if len(items) > self.length:
            del items[0]
            del timestamps[0]
        return "applied"

    def to_bytes(self) -> bytes:
        """The stored form."""
        return _ENCODE(
            StoredHistory(
                FORMAT,
                self.items,
                self.timestamps,
                self.hidden,
                self.event_ids,
                self.applied,
                list(self.followed),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> History:
        """Read the stored form, cut to `length`.

        Raises:
            ValueError: the data is damaged.
            HistoryFormatError: it was written by another release, and must not be overwritten.
        """
        try:
            stored = _DECODE(data)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a stored history: {error}") from error
        if stored.format != FORMAT:
            raise HistoryFormatError(
                f"stored history of format {stored.format}; this worker reads {FORMAT}: run the"
                " release that wrote it"
            )
        if len(stored.items) != len(stored.timestamps):
            raise ValueError("stored history whose items and timestamps differ in number")
        history = cls(length)
        history.items = stored.items[-length:]
        history.timestamps = stored.timestamps[-length:]
        history.hidden = stored.hidden[-length:]
        history.event_ids = stored.event_ids[-4 * length :]
        history.applied = stored.applied
        history.followed = dict.fromkeys(stored.followed)
        return history


def event_hash(event_id: str) -> int:
    """A 63-bit hash of an event id: a history keeps it instead of ids of any length."""
    digest = hashlib.blake2b(event_id.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def known_indexes(items: Sequence[str], index: dict[str, int], length: int) -> list[int]:
    """Model indexes of the last `length` of `items` that the model knows, oldest first."""
    known = [index[item] for item in items if item in index]
    return known[-length:]
