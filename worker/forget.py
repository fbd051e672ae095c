"""Erasing a user: what a tombstone on the events topic does to what is kept of them. No I/O.

A tombstone is a record with the user's key and no value. It is taken in its place among the user's
events: what came before it goes, what comes after it counts. What is left for a while is an empty
history that knows the tombstone's place in the log, so that neither a repeat of earlier records nor
a late write of another worker brings anything back (docs/privacy.md).
"""

from __future__ import annotations

from worker.cache import UserKey
from worker.events import Surface, Tombstone
from worker.history import History


def keys_of(user_id: str) -> list[UserKey]:
    """Everything that is kept of a user by name: one key a surface."""
    return [UserKey(user_id, surface) for surface in Surface]


def erased(history: History, tombstone: Tombstone) -> History | None:
    """What is left of `history`: nothing but how far each partition was read.

    Returns:
        The empty history; also for a repeat of the newest record, whose effects may never have
        arrived. None where later records were applied: the tombstone was carried out before them.
    """
    topic, partition = tombstone.topic, tombstone.partition
    newest_ms = tombstone.record_time_ms
    last = history.last_applied(topic, partition)
    if last is not None:
        # As for events: in a topic made anew, offsets are lower and record times later.
        if newest_ms <= last[1] and (
            tombstone.offset < last[0] or (tombstone.offset == last[0] and history.items)
        ):
            return None
        newest_ms = max(newest_ms, last[1])
    others = (one for one in history.applied if one[:2] != (topic, partition))
    return History(
        history.length, applied=(*others, (topic, partition, tombstone.offset, newest_ms))
    )
