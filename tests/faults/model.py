"""What a log of events amounts to: histories, last events and popularity, reckoned from the log in
partition order by the plainest code that says it. No I/O.

It shares nothing with the worker but the names of fields, and knows no redelivery: each record of
the log counts once. `tests/unit/test_fault_checker.py` holds it against `worker.history`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log2
from typing import Any, NamedTuple

_DELIBERATE = {"like", "comment", "share", "follow"}
_SURFACES = ("posts", "friends", "ads")
_WEIGHTS = {"view": 1, "click": 1, "like": 2, "comment": 3, "share": 4, "follow": 4, "hide": 0}


class Place(NamedTuple):
    """Where a record lies."""

    partition: int
    offset: int


NOWHERE = Place(-1, -1)


class User(NamedTuple):
    """One user on one surface."""

    user_id: str
    surface: str


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A record of the events topic."""

    place: Place
    #: That of the plan, from a header.
    number: int
    key: bytes | None
    value: bytes | None


@dataclass
class Expected:
    """What is to be known of one user: items with times, oldest first, and what they hid."""

    entries: list[tuple[str, int]] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    #: The last record of theirs.
    last: Place = NOWHERE
    #: All of them, in order.
    places: list[Place] = field(default_factory=list)
    #: Whether the last record was a tombstone.
    erased: bool = False
    _ids: list[str] = field(default_factory=list)

    def take(self, event: dict[str, Any], place: Place, length: int) -> None:
        """Take one event in."""
        self.last = place
        self.places.append(place)
        self.erased = False
        event_id = event.get("event_id")
        if event_id is not None:
            if event_id in self._ids:
                return
            self._ids = [*self._ids, event_id][-length:]
        item, kind, at_ms = event["item_id"], event["event_type"], event["timestamp"]
        if kind == "hide":
            self.entries = [entry for entry in self.entries if entry[0] != item]
            self.hidden = [*(one for one in self.hidden if one != item), item][-length:]
            return
        if kind in _DELIBERATE:
            self.hidden = [one for one in self.hidden if one != item]
        earlier = [entry for entry in self.entries if entry[1] <= at_ms]
        later = self.entries[len(earlier) :]
        if earlier and earlier[-1][0] == item:
            # Twice in a row is once, at the later time.
            self.entries = [*earlier[:-1], (item, at_ms), *later]
        elif earlier or len(later) < length:
            self.entries = [*earlier, (item, at_ms), *later][-length:]

    def erase(self, place: Place) -> None:
        """Forget all but the place."""
        self.last = place
        self.erased = True
        self.entries, self.hidden, self._ids = [], [], []


@dataclass
class Outcome:
    """What a whole log amounts to."""

    users: dict[User, Expected] = field(default_factory=dict)
    #: By surface and partition: weight of each item, as base-2 logarithm.
    popularity: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    #: Tombstones: who, and where.
    erased: list[tuple[str, Place]] = field(default_factory=list)


def outcome(records: Iterable[LogRecord], *, length: int, half_life_ms: float) -> Outcome:
    """What good `records`, in the order of their offsets, amount to."""
    made = Outcome()
    times: dict[tuple[str, int], dict[str, list[tuple[int, int]]]] = {}
    for record in records:
        if record.value is None:
            user_id = (record.key or b"").decode()
            made.erased.append((user_id, record.place))
            for surface in _SURFACES:
                made.users.setdefault(User(user_id, surface), Expected()).erase(record.place)
            continue
        event = json.loads(record.value)
        user = User(event["user_id"], event["surface"])
        made.users.setdefault(user, Expected()).take(event, record.place, length)
        weight = _WEIGHTS[event["event_type"]]
        if weight:
            table = times.setdefault((user.surface, record.place.partition), {})
            table.setdefault(event["item_id"], []).append((weight, event["timestamp"]))
    for place, table in times.items():
        made.popularity[place] = {
            item: _decayed(counted, half_life_ms) for item, counted in table.items()
        }
    return made


def _decayed(counted: list[tuple[int, int]], half_life_ms: float) -> float:
    """log2 of the sum of weight * 2^(time / half-life)."""
    first = min(at_ms for _, at_ms in counted)
    total = sum(weight * 2.0 ** ((at_ms - first) / half_life_ms) for weight, at_ms in counted)
    return log2(total) + first / half_life_ms
