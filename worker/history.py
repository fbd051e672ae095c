"""What a user recently did on one surface: a bounded, idempotent, time-ordered record. No I/O.

Item ids are kept, never model indexes, since a model swap may renumber items. What is derived for
one bundle (`Window`) is a cache beside them, made anew whenever it does not fit.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from worker.errors import HistoryFormatError
from worker.events import DELIBERATE_TYPES, Event, EventType, Surface
from worker.quality import UserRecord
from worker.versions import Applied, Int64, mark

Outcome = Literal["applied", "duplicate", "late"]

#: Layout of the stored form. Format 1 is still read; a reader refuses what it does not know.
FORMAT = 2
#: Followed users that are kept beyond the history, newest first to stay.
MAX_FOLLOWED = 5_000
#: Bytes of the hash of one event id.
ID_BYTES = 8
#: An item in a window that the model does not know, or none.
_UNKNOWN = bytes(4)
#: More than the longest history takes: 10,000 items, as many hidden ones and `MAX_FOLLOWED`, of
#: four bytes a character, with times and event ids.
MAX_STORED_BYTES = 32 << 20


class StoredHistory(msgspec.Struct, array_like=True, gc=False):
    """A history as Redis holds it (MessagePack array, see docs/design.md)."""

    format: int
    items: tuple[str, ...]
    #: Little-endian int64 epoch milliseconds, one per item.
    timestamps: bytes
    hidden: tuple[str, ...]
    #: Hashes of event ids, `ID_BYTES` each, oldest first.
    event_ids: bytes
    applied: tuple[Applied, ...]
    followed: list[str] = []
    #: Left out by releases that did not judge what they served.
    record: UserRecord | None = None
    #: Of `applied`, as `versions.WRITE` compares it; must stay the last field. Left out by
    #: releases that wrote without comparing.
    mark: bytes = b""


class Shown(msgspec.Struct, frozen=True, gc=False):
    """A list as a user was served it, or would have been by another version."""

    version: str
    items: tuple[str, ...]


class StoredHistory1(msgspec.Struct, array_like=True, gc=False):
    """Format 1: numbers one by one."""

    format: int
    items: list[str]
    timestamps: list[int]
    hidden: list[str]
    event_ids: list[int]
    #: topic -> partition -> [last applied offset, its record time in ms].
    applied: dict[str, dict[int, tuple[Int64, Int64]]]
    followed: list[str] = []

    def upgraded(self) -> StoredHistory:
        """The same in today's format."""
        return StoredHistory(
            FORMAT,
            tuple(self.items),
            array("q", self.timestamps).tobytes(),
            tuple(self.hidden),
            b"".join(number.to_bytes(ID_BYTES, "big") for number in self.event_ids),
            tuple(
                (topic, partition, *last)
                for topic, partitions in self.applied.items()
                for partition, last in partitions.items()
            ),
            self.followed,
        )


class _Head(msgspec.Struct, array_like=True):
    format: int


_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE = msgspec.msgpack.Decoder(StoredHistory).decode
_DECODE_1 = msgspec.msgpack.Decoder(StoredHistory1).decode
_DECODE_HEAD = msgspec.msgpack.Decoder(_Head).decode


class History(msgspec.Struct, gc=False, eq=False):
    """The last `length` items of one user on one surface, oldest first.

    An event is applied once:

    - a redelivered record is known by its offset: a partition's offsets only grow, so one at or
      below the last applied is a repeat. (A topic made anew starts again at 0 with later record
      times; those are not taken for repeats.)
    - a producer's own repeat, at another offset, is known by `event_id`, among the last `length`
      ids.

    Tuples and bytes throughout: Python's garbage collector does not look at those, and a worker
    holds so many histories that its full collections would stop it for a tenth of a second.
    """

    length: int
    items: tuple[str, ...] = ()
    timestamps: array[int] = msgspec.field(default_factory=lambda: array("q"))
    #: Items that the user asked not to see, oldest first, at most `length`.
    hidden: tuple[str, ...] = ()
    #: Hashes of event ids, `ID_BYTES` each, oldest first.
    event_ids: bytes = b""
    #: On the surface friends, whom the user follows: a dict for its order, oldest first. They
    #: outlast `items`, since nobody wants those recommended whom they follow.
    followed: dict[str, None] = {}
    applied: tuple[Applied, ...] = ()
    #: Items put at the end since `window` was made; None where anything else changed.
    appended: int | None = None
    #: Model indexes of the last `length` items, int32, 0 where the model does not know one or
    #: the history is shorter; valid for models of the catalogue `window_of`.
    window: bytes = b""
    window_of: str = ""
    #: State of the recurrent model `carry_of` after `window`, float32; None where it must be made
    #: anew.
    carry: bytes | None = None
    carry_of: str = ""
    #: What the user did with what was served, in one trial.
    record: UserRecord | None = None
    #: The list that Redis holds, and the one that the other version of a trial made beside it;
    #: None where they are not known. Not stored.
    served: Shown | None = None
    beside: Shown | None = None

    def apply(self, event: Event, item: str | None = None) -> Outcome:
        """Take `event` in. `late` is older than all of a full history and changes nothing.

        Args:
            item: the event's item id, as a string that all histories share: one for each time that
                an item was seen would be most of a worker's memory, and in no processor's cache.
        """
        if not self._advance(event):
            return "duplicate"
        if event.event_id is not None and not self._note_id(event.event_id):
            return "duplicate"
        if item is None:
            item = event.item_id
        if event.event_type is EventType.HIDE:
            self._hide(item)
            return "applied"
        if self.hidden and event.event_type in DELIBERATE_TYPES:
            self.hidden = _without(self.hidden, item)
        if event.surface is Surface.FRIENDS and event.event_type is EventType.FOLLOW:
            self._follow(item)
        return self._insert(item, event.timestamp_ms)

    def last_applied(self, topic: str, partition: int) -> tuple[int, int] | None:
        """Offset and record time (ms) of the last record of a partition; None where none was."""
        for one in self.applied:
            if one[1] == partition and one[0] == topic:
                return one[2:]
        return None

    def _advance(self, event: Event) -> bool:
        """Note the event's record; False where it was taken before."""
        topic, partition, newest_ms = event.topic, event.partition, event.record_time_ms
        last = self.last_applied(topic, partition)
        if last is not None:
            if event.offset <= last[0] and newest_ms <= last[1]:
                return False
            newest_ms = max(newest_ms, last[1])
        reached = (topic, partition, event.offset, newest_ms)
        if len(self.applied) <= 1 and (last is not None or not self.applied):
            self.applied = (reached,)
        else:
            others = (one for one in self.applied if one[:2] != (topic, partition))
            self.applied = (*others, reached)
        return True

    def _note_id(self, event_id: str) -> bool:
        """Remember an id; False where it is known."""
        ids, digest = self.event_ids, event_hash(event_id)
        at = ids.find(digest)
        while at >= 0:
            if at % ID_BYTES == 0:
                return False
            at = ids.find(digest, at + 1)
        self.event_ids = (ids + digest)[-ID_BYTES * self.length :]
        return True

    def _follow(self, item: str) -> None:
        self.followed.pop(item, None)
        self.followed[item] = None
        if len(self.followed) > MAX_FOLLOWED:
            del self.followed[next(iter(self.followed))]

    def _hide(self, item: str) -> None:
        self.followed.pop(item, None)
        if item in self.items:
            kept = [at for at, known in enumerate(self.items) if known != item]
            self.items = tuple(self.items[at] for at in kept)
            self.timestamps = array("q", [self.timestamps[at] for at in kept])
            self.appended = None
        self.hidden = (*_without(self.hidden, item), item)[-self.length :]

    def _insert(self, item: str, timestamp_ms: int) -> Outcome:
        items, timestamps = self.items, self.timestamps
        count = len(items)
        # Events mostly come in order, so the place is nearly always the end.
        place = (
            count
            if not count or timestamps[-1] <= timestamp_ms
            else bisect_right(timestamps, timestamp_ms)
        )
        if place > 0 and items[place - 1] == item:
            # View, then like, of one post is one interest, not two.
            timestamps[place - 1] = timestamp_ms
            return "applied"
        if place == 0 and count >= self.length:
            return "late"
        if place < count:
            self.appended = None
        elif self.appended is not None:
            self.appended += 1
        first = 1 if count >= self.length else 0
        self.items = (*items[first:place], item, *items[place:])
        timestamps.insert(place, timestamp_ms)
        if first:
            del timestamps[0]
        return "applied"

    def refresh_window(
        self, index: Mapping[str, int], names: Sequence[str], catalogue: str, version: str
    ) -> list[int] | None:
        """Bring `window` up to date for the model `version`, whose items are `names`, which `index`
        numbers from 1.

        Versions of one `catalogue` number their items alike, so that a swap from one to the other
        leaves windows as they are: to make those of all users anew costs every user's next event.

        Where it is made anew, ids that the model knows become its own strings (`apply` says why).

        Returns:
            Model indexes of the items that came since the last time, without those that the model
            does not know; None where the window was made anew, so that `carry` no longer fits.
        """
        fresh = self.appended
        self.appended = 0
        if self.carry_of != version:
            self.carry = None
            self.carry_of = version
        if self.window_of != catalogue or fresh is None or fresh >= self.length:
            self.carry = None
            self.window_of = catalogue
            known = np.zeros(self.length, dtype=np.int32)
            if self.items:
                found = [index.get(item, 0) for item in self.items]
                known[-len(self.items) :] = found
                pairs = zip(found, self.items, strict=True)
                self.items = tuple([names[at - 1] if at else item for at, item in pairs])
            self.window = known.tobytes()
            return None
        if fresh == 0:
            return []
        new = [index.get(item, 0) for item in self.items[-fresh:]]
        self.window = self.window[4 * fresh :] + array("i", new).tobytes()
        return [at for at in new if at]

    def unshared(self) -> int:
        """Items whose ids are strings of this history alone."""
        if self.window and _UNKNOWN not in self.window:
            return 0
        known = int(np.count_nonzero(np.frombuffer(self.window, dtype=np.int32)))
        # Items may have gone since the window was made.
        return max(0, len(self.items) - known)

    def to_bytes(self) -> bytes:
        """The stored form."""
        return _ENCODE(
            StoredHistory(
                FORMAT,
                self.items,
                self.timestamps.tobytes(),
                self.hidden,
                self.event_ids,
                self.applied,
                list(self.followed),
                self.record,
                mark(self.applied),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> History:
        """Read the stored form, cut to `length`.

        Raises:
            ValueError: the data is damaged.
            HistoryFormatError: it was written by another release, and must not be overwritten.
        """
        stored = _read(data)
        timestamps = array("q")
        if len(stored.timestamps) != len(stored.items) * timestamps.itemsize:
            raise ValueError("stored history whose items and timestamps differ in number")
        if len(stored.event_ids) % ID_BYTES:
            raise ValueError("stored history whose event ids are cut")
        timestamps.frombytes(stored.timestamps)
        history = cls(length)
        history.items = stored.items[-length:]
        history.timestamps = timestamps[-length:]
        history.hidden = stored.hidden[-length:]
        history.event_ids = stored.event_ids[-ID_BYTES * length :]
        history.applied = stored.applied
        history.followed = dict.fromkeys(stored.followed)
        history.record = stored.record
        return history


def _read(data: bytes) -> StoredHistory:
    if len(data) > MAX_STORED_BYTES:
        raise ValueError(f"a stored history of {len(data)} bytes, more than any that is written")
    try:
        version = _DECODE_HEAD(data).format
        if version == FORMAT:
            return _DECODE(data)
        if version == 1:
            return _DECODE_1(data).upgraded()
    except (msgspec.MsgspecError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a stored history: {error}") from error
    raise HistoryFormatError(
        f"stored history of format {version}; this worker reads 1 and {FORMAT}: run the release"
        " that wrote it"
    )


def _without(items: tuple[str, ...], item: str) -> tuple[str, ...]:
    return tuple(one for one in items if one != item) if item in items else items


def event_hash(event_id: str) -> bytes:
    """A 63-bit hash of an event id: a history keeps it instead of ids of any length."""
    digest = hashlib.blake2b(event_id.encode("utf-8"), digest_size=ID_BYTES).digest()
    # Shifted as in format 1, whose ids are thus still known.
    return (int.from_bytes(digest, "big") >> 1).to_bytes(ID_BYTES, "big")
