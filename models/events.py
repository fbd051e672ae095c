"""Events as columns, whatever source they come from (models/sources.py reads them)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from worker.errors import StreamrecError
from worker.events import EventType, Reason

log = logging.getLogger(__name__)

#: Event types by the code that `EventLog` keeps them under.
TYPES: tuple[str, ...] = tuple(kind.value for kind in EventType)
#: Code by event type.
TYPE_CODES: dict[str, int] = {kind: code for code, kind in enumerate(TYPES)}
_HIDE = TYPE_CODES[EventType.HIDE]


class SourceError(StreamrecError):
    """Events cannot be read from a source."""

    exit_code = 66


@dataclass(frozen=True)
class Events:
    """Events of one surface in time order (source order on ties).

    Ids are fixed-width unicode: a column takes 4 bytes times its longest id times the events.
    """

    #: User ids, str `[events]`.
    users: NDArray[np.str_]
    #: Item ids, str `[events]`.
    items: NDArray[np.str_]
    #: `event_type` of docs/events.md, never `hide`; str `[events]`.
    types: NDArray[np.str_]
    #: Epoch milliseconds, int64 `[events]`.
    timestamps_ms: NDArray[np.int64]
    #: Newest text by item id; also of items without an event left.
    texts: dict[str, str]
    #: For people: "MovieLens 1M", or the path or address as it was given.
    name: str
    #: sha256 of the bytes read: what the data was, wherever it lies.
    sha256: str

    def __len__(self) -> int:
        return len(self.timestamps_ms)

    def only(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Events:
        """Some of the events, by mask or by rising places. Texts stay."""
        return replace(
            self,
            users=self.users[kept],
            items=self.items[kept],
            types=self.types[kept],
            timestamps_ms=self.timestamps_ms[kept],
        )


def at_least(events: Events, minimum: int) -> Events:
    """`events` without those of items that occur fewer than `minimum` times. Texts stay.

    Raises:
        SourceError: none is left.
    """
    _, inverse, counts = np.unique(events.items, return_inverse=True, return_counts=True)
    kept = counts[inverse] >= minimum
    if not kept.any():
        raise SourceError(
            f"no item of {events.name} has {minimum} events or more: lower the minimum item count"
        )
    return events.only(kept)


def merged(events: Events) -> Events:
    """`events` without those that repeat their user's event before, such as a like after a view:
    one step of a history, as the worker keeps it."""
    order = np.argsort(events.users, kind="stable")
    users, items = events.users[order], events.items[order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    kept = np.sort(order[fresh])
    return events.only(kept)


class BadRecords:
    """What becomes of records that break the contract: an error, or a count.

    Args:
        skip: count and skip them.
    """

    def __init__(self, *, skip: bool) -> None:
        self._skip = skip
        self._counts: Counter[Reason] = Counter()
        self._first = ""

    def reject(self, where: str, reason: Reason, detail: str) -> None:
        """The record at `where` breaks the contract.

        Raises:
            SourceError: unless bad records are skipped.
        """
        if not self._skip:
            raise SourceError(
                f"{where}: {reason.value}: {detail}; correct the record (docs/events.md), or leave"
                " such records out with --skip-bad"
            )
        if not self._counts:
            self._first = f"{where}: {reason.value}: {detail}"
        self._counts[reason] += 1

    @property
    def count(self) -> int:
        """How many were skipped."""
        return self._counts.total()

    def warn(self, name: str) -> None:
        """Log what was skipped, if anything was."""
        if self._counts:
            reasons = ", ".join(f"{r.value} {n}" for r, n in sorted(self._counts.items()))
            log.warning(
                "skipped %d bad records of %s (%s); the first: %s",
                self.count, name, reasons, self._first,
            )  # fmt: skip


class Vocabulary:
    """Numbers ids in the order in which they are first seen, so that each is held once."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._codes)

    def codes(self, ids: Iterable[str]) -> NDArray[np.int32]:
        """The number of each of `ids`, int32 `[ids]`."""
        known = self._codes
        return np.fromiter((known.setdefault(one, len(known)) for one in ids), dtype=np.int32)

    def names(self) -> NDArray[np.str_]:
        """Id by number, str `[ids]`.

        Raises:
            SourceError: an id ends in a NUL character, which such an array cannot hold.
        """
        for one in self._codes:
            if one.endswith("\0"):
                raise SourceError(f"the id {one!r} ends in a NUL character: rename it")
        return np.array(list(self._codes), dtype=np.str_)


class EventLog:
    """Gathers events of one surface, in source order, as numbers of 17 bytes each."""

    def __init__(self) -> None:
        self.users = Vocabulary()
        self.items = Vocabulary()
        #: Events that were read and are of other surfaces.
        self.elsewhere = 0
        self._parts: list[
            tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int8], NDArray[np.int64]]
        ] = []
        self._texts: dict[str, tuple[int, str]] = {}
        #: Events gathered so far; and how many there were when a user was forgotten.
        self._count = 0
        self._forgotten: dict[int, int] = {}

    def extend(
        self,
        users: NDArray[np.int32],
        items: NDArray[np.int32],
        types: NDArray[np.int8],
        timestamps_ms: NDArray[np.int64],
    ) -> None:
        """Add events; users and items as numbers of the vocabularies, types of `TYPES`."""
        self._parts.append((users, items, types, timestamps_ms))
        self._count += len(users)

    def forget(self, user: int) -> None:
        """Leave out what was added of a user so far."""
        self._forgotten[user] = self._count

    def note_text(self, item: str, timestamp_ms: int, text: str) -> None:
        """`item` had this text at a time; the newest counts, of equally new ones the last."""
        held = self._texts.get(item)
        if held is None or timestamp_ms >= held[0]:
            self._texts[item] = (timestamp_ms, text)

    def events(self, *, name: str, sha256: str, limit: int | None = None) -> Events:
        """The events in time order, hidden ones taken out, of those the first `limit`.

        A `hide` takes out the user's earlier events with the item, as in the worker's history.

        Raises:
            SourceError: none is left.
        """
        users, items, types, times = (
            np.concatenate([part[column] for part in self._parts] or [np.empty(0, dtype=np.int64)])
            for column in range(4)
        )
        order = np.argsort(times, kind="stable")
        order = order[~self._before_tombstone(users)[order]]
        pairs = users[order].astype(np.int64) * max(len(self.items), 1) + items[order]
        order = order[_shown(pairs, types[order] == _HIDE)][:limit]
        if not len(order):
            raise SourceError(self._why_empty(name, len(times)))
        return Events(
            users=self.users.names()[users[order]],
            items=self.items.names()[items[order]],
            types=np.array(TYPES)[types[order]],
            timestamps_ms=times[order].astype(np.int64),
            texts={item: text for item, (_, text) in self._texts.items()},
            name=name,
            sha256=sha256,
        )

    def _before_tombstone(self, users: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which events were added before their user was forgotten, bool `[events]`."""
        known_until = np.zeros(len(self.users), dtype=np.int64)
        known_until[list(self._forgotten)] = list(self._forgotten.values())
        found: NDArray[np.bool_] = np.arange(len(users)) < known_until[users]
        return found

    def _why_empty(self, name: str, count: int) -> str:
        if count:
            return (
                f"every event of {name} is hidden, forgotten or cut off by the limit: give more"
                " events"
            )
        if self.elsewhere:
            return (
                f"{name} holds {self.elsewhere} events, all of other surfaces: give the surface"
                " that they are of"
            )
        return f"{name} holds no events: give a source with some"


def _shown(pairs: NDArray[np.int64], hides: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which events remain, bool `[events]`: none up to the last hide of its user and item.

    Both arguments `[events]`, in time order; `pairs` stands for user and item.
    """
    places = np.flatnonzero(hides)[::-1]
    if not len(places):
        return np.ones(len(pairs), dtype=bool)
    hidden, last = np.unique(pairs[places], return_index=True)
    found = np.minimum(np.searchsorted(hidden, pairs), len(hidden) - 1)
    taken_out: NDArray[np.bool_] = (hidden[found] == pairs) & (
        np.arange(len(pairs)) <= places[last][found]
    )
    return ~taken_out
