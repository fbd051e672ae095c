"""What waits for Redis while it does not answer: effects not yet written, events not yet taken.

No I/O. Users whose histories are in memory go on: their lists are published, and what belongs in
Redis is held back as the latest state of each user. All others are **parked** with every later
event of theirs, so that each user's order is kept. Nothing here is committed, so a crash costs
nothing but reading it again; `max_in_flight_events` bounds how much that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from worker.cache import PartitionKey, UserKey
from worker.events import EventBatch, Surface
from worker.forget import keys_of


class Held:
    """What a worker holds back. For one thread."""

    def __init__(self) -> None:
        #: What went on, in order: taken once more for users of whom Redis has something newer.
        self.taken: list[EventBatch] = []
        #: Users whose histories are to be written; those in `emptied` were erased.
        self.touched: dict[UserKey, None] = {}
        self.emptied: set[UserKey] = set()
        #: The latest list of each of `touched` that has one; empty where the stored one must go.
        self.lists: dict[UserKey, bytes] = {}
        self.cold_items: dict[Surface, dict[str, str]] = {}
        self.parked: list[EventBatch] = []
        self._parked_users: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.taken or self.parked)

    def split(
        self,
        parts: Sequence[EventBatch],
        cached: Callable[[UserKey], bool],
        known: Callable[[PartitionKey], bool],
    ) -> list[EventBatch]:
        """Park what cannot go on; returns what can, in order.

        Args:
            parts: as `EventBatch.cut` makes them.
            cached: whether a history is in memory.
            known: whether the popularity table of a place is.
        """
        going = []
        for part in parts:
            records, parked = part.records, self._parked_users
            for event in part.events:
                place = PartitionKey(event.surface, records.topic, records.partition)
                if not (cached(UserKey(event.user_id, event.surface)) and known(place)):
                    parked.add(event.user_id)
            for tombstone in part.tombstones:
                if not all(map(cached, keys_of(tombstone.user_id))):
                    parked.add(tombstone.user_id)
            stays = _of_users(part, parked, inside=True)
            goes = _of_users(part, parked, inside=False)
            if stays.events or stays.tombstones:
                self.parked.append(stays)
            if goes.events or goes.tombstones:
                going.append(goes)
        return going

    def hold(
        self,
        taken: Sequence[EventBatch],
        touched: Iterable[UserKey],
        emptied: Set[UserKey],
        lists: Mapping[UserKey, bytes],
        cold_items: Mapping[Surface, Mapping[str, str]],
    ) -> None:
        """Hold back the effects of `taken`."""
        self.taken += taken
        for key in emptied:
            self.touched.pop(key, None)
            self.lists.pop(key, None)
        self.emptied |= emptied
        for key in touched:
            self.touched[key] = None
            if key in self.emptied:
                self.emptied.discard(key)
                # Where no list follows, there shall be none.
                self.lists[key] = b""
        self.lists |= lists
        for surface, texts in cold_items.items():
            self.cold_items.setdefault(surface, {}).update(texts)

    def unpark(self) -> list[EventBatch]:
        """What was parked, in order; it is no longer."""
        parked, self.parked = self.parked, []
        self._parked_users.clear()
        return parked

    def written(self) -> None:
        """The effects are in Redis."""
        self.taken.clear()
        self.touched.clear()
        self.emptied.clear()
        self.lists.clear()
        self.cold_items.clear()

    def clear(self) -> None:
        """Let go of everything: it is read again."""
        self.written()
        self.unpark()


def _of_users(part: EventBatch, users: Set[str], *, inside: bool) -> EventBatch:
    return EventBatch(
        part.records,
        [one for one in part.events if (one.user_id in users) is inside],
        [one for one in part.tombstones if (one.user_id in users) is inside],
    )
