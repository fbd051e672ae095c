"""The events that a load sends: seeded, each known by its number alone. No I/O."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from tests.conftest import ITEMS
from tests.faults.model import User
from worker.events import Reason, Surface

#: Larger values are dead letters in every cell (`event_max_bytes`), so that small ones can be.
MAX_BYTES = 2048
#: Epoch milliseconds of the first event.
BASE_MS = 1_764_000_000_000
#: Ahead of any clock: the year 2096.
FUTURE_MS = 4_000_000_000_000
_TYPES = {
    "view": 60, "click": 15, "like": 10, "comment": 5, "share": 5, "follow": 2, "hide": 3,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """One record to be sent, and what the worker is to make of it."""

    number: int
    key: bytes | None
    value: bytes | None
    #: Why it is a dead letter; None where it is a good event.
    reason: Reason | None

    @property
    def users(self) -> list[User]:
        """Whom a good record is about; a tombstone is about its user on all surfaces."""
        if self.reason is not None:
            return []
        if self.value is None:
            return [User((self.key or b"").decode(), surface.value) for surface in Surface]
        body = json.loads(self.value)
        return [User(body["user_id"], body["surface"])]


@dataclass(frozen=True)
class Plan:
    """What a load consists of.

    Most items are one event's own, so that none can stand for another in a history; the others are
    those that the model knows. Half of the users have all their events at one time: their histories
    show in which order events were taken.

    Args:
        users: how many.
        poison: share of records that break the contract, for all reasons in turn.
        repeats: share of records that repeat an earlier one of the same user, event id and all.
        spread_ms: how far the events' times are thrown about, in milliseconds.
        base_ms: epoch milliseconds of the events.
        erase: share of records that are tombstones.
    """

    seed: int = 1
    users: int = 200
    poison: float = 0.0
    repeats: float = 0.0
    spread_ms: int = 0
    base_ms: int = BASE_MS
    erase: float = 0.002

    def at(self, number: int) -> Planned:
        """The record of a number."""
        draw = random.Random(f"{self.seed}.{number}")
        if draw.random() < self.poison:
            return self._poison(number)
        if draw.random() < self.erase:
            user = f"user-{draw.randrange(self.users)}"
            return Planned(number, user.encode(), None, None)
        if draw.random() < self.repeats and number > 20:
            # One that was sent a moment ago, so that its id is remembered still.
            return self._good(number, self._body(number - draw.randrange(1, 20)))
        return self._good(number, self._body(number))

    def _good(self, number: int, body: dict[str, object]) -> Planned:
        return Planned(number, str(body["user_id"]).encode(), json.dumps(body).encode(), None)

    def _body(self, number: int) -> dict[str, object]:
        draw = random.Random(f"{self.seed}.{number}.body")
        user = draw.randrange(self.users)
        at_ms = self.base_ms + (number if user % 2 else 0)
        if self.spread_ms:
            at_ms += draw.randrange(-self.spread_ms, self.spread_ms)
        body: dict[str, object] = {
            "user_id": f"user-{user}",
            "item_id": draw.choice(ITEMS) if number % 4 == 0 else f"own-{number}",
            "event_type": draw.choices(list(_TYPES), list(_TYPES.values()))[0],
            "timestamp": at_ms,
            "surface": "ads" if draw.random() < 0.1 else "posts",
            "context": {"number": number},
        }
        if number % 2 or self.repeats:
            body["event_id"] = f"e{number}"
        return body

    def _poison(self, number: int) -> Planned:
        body = self._body(number)
        key = str(body["user_id"]).encode()
        reason = POISON[number % len(POISON)]
        value: bytes | None = None
        match reason:
            case Reason.EMPTY:
                return Planned(number, key, b"", reason)
            case Reason.TOO_LARGE:
                body["text"] = "x" * MAX_BYTES
            case Reason.NOT_UTF8:
                value = json.dumps(body | {"text": "?"}).encode().replace(b"?", b"\xff")
            case Reason.NOT_JSON:
                value = json.dumps(body).encode()[:-1]
            case Reason.MISSING_FIELD:
                del body["surface"]
            case Reason.WRONG_TYPE:
                body["item_id"] = number
            case Reason.UNKNOWN_VALUE:
                body["event_type"] = "stare"
            case Reason.INVALID_VALUE:
                body["item_id"] = ""
            case Reason.UNSUPPORTED_VERSION:
                body["schema_version"] = 2
            case Reason.TIMESTAMP_RANGE:
                body["timestamp"] = BASE_MS // 1000
            case Reason.TIMESTAMP_FUTURE:
                body["timestamp"] = FUTURE_MS
            case Reason.WRONG_KEY:
                key = b"somebody-else"
        return Planned(number, key, json.dumps(body).encode() if value is None else value, reason)


#: Every reason that a record can give; `processing_failed` is none of its doing.
POISON = tuple(reason for reason in Reason if reason is not Reason.PROCESSING_FAILED)
