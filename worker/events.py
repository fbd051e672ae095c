"""Decode and validate a batch of event records: bytes in, events or rejections out. No I/O.

The contract is docs/events.md; its machine-readable form is docs/schema/user-event.v1.json, which
`json_schema()` generates and a test keeps equal.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Protocol

import msgspec

SCHEMA_VERSION = 1
#: Longest user, item and event id, in characters. Ids become Redis keys and labels of histories.
MAX_ID_LENGTH = 256
#: Longest user id in UTF-8.
MAX_KEY_BYTES = 4 * MAX_ID_LENGTH
#: Earliest believable epoch in milliseconds (1973-03-03). A smaller number is nearly always a
#: timestamp in seconds, which would silently sort before everything else.
EARLIEST_TIMESTAMP_MS = 100_000_000_000

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_LENGTH)]


class EventType(StrEnum):
    """What the user did."""

    VIEW = "view"
    LIKE = "like"
    COMMENT = "comment"
    SHARE = "share"
    FOLLOW = "follow"
    CLICK = "click"
    HIDE = "hide"

    # Members are keys on the hot path; Enum's own hash is a Python function.
    __hash__ = str.__hash__


#: Deliberate acts, which take back an earlier hide; a mere view or click does not.
DELIBERATE_TYPES: frozenset[EventType] = frozenset(
    {EventType.LIKE, EventType.COMMENT, EventType.SHARE, EventType.FOLLOW}
)


class Surface(StrEnum):
    """Where it happened; each surface has its own items, histories and model."""

    POSTS = "posts"
    FRIENDS = "friends"
    ADS = "ads"

    __hash__ = str.__hash__  # as in EventType


def parse_surface(name: str) -> Surface:
    """The surface called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    try:
        return Surface(name)
    except ValueError:
        known = ", ".join(surface.value for surface in Surface)
        raise ValueError(f"unknown surface {name!r}; known: {known}") from None


class Reason(StrEnum):
    """Why a record cannot be used; the label of the dead-letter counter."""

    EMPTY = "empty"
    TOO_LARGE = "too_large"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    UNKNOWN_VALUE = "unknown_value"
    INVALID_VALUE = "invalid_value"
    UNSUPPORTED_VERSION = "unsupported_version"
    TIMESTAMP_RANGE = "timestamp_range"
    TIMESTAMP_FUTURE = "timestamp_future"
    WRONG_KEY = "wrong_key"
    PROCESSING_FAILED = "processing_failed"


class UserEvent(msgspec.Struct, frozen=True, gc=False):
    """One event as producers send it (schema version 1). Unknown fields are ignored."""

    user_id: Id
    item_id: Id
    event_type: EventType
    #: RFC 3339 date-time (no offset means UTC) or epoch milliseconds.
    timestamp: int | float | datetime
    surface: Surface
    #: Makes the event idempotent across producer retries, not only across redeliveries.
    event_id: Id | None = None
    text: str | None = None
    context: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION


class Record(msgspec.Struct, frozen=True, gc=False):
    """One Kafka record as the broker delivered it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    #: Record time in epoch milliseconds (create or append time, as the topic is configured).
    timestamp_ms: int


class Message(Protocol):
    """A record as aiokafka gives it."""

    offset: int
    key: bytes | None
    value: bytes | None
    #: Record time in epoch milliseconds.
    timestamp: int


@dataclass(frozen=True, slots=True)
class Records:
    """Records of one partition in offset order, as columns of one length."""

    topic: str
    partition: int
    offsets: Sequence[int]
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    timestamps_ms: Sequence[int]

    def __len__(self) -> int:
        return len(self.offsets)

    @classmethod
    def of(cls, topic: str, partition: int, messages: Sequence[Message]) -> Records:
        """Columns of what a Kafka client read."""
        return cls(
            topic,
            partition,
            [message.offset for message in messages],
            [message.key for message in messages],
            [message.value for message in messages],
            [message.timestamp for message in messages],
        )

    def at(self, row: int) -> Record:
        """One of them."""
        return Record(
            self.topic,
            self.partition,
            self.offsets[row],
            self.keys[row],
            self.values[row],
            self.timestamps_ms[row],
        )


class Event(msgspec.Struct, gc=False):
    """A valid event with its place in the log."""

    user_id: str
    item_id: str
    event_type: EventType
    surface: Surface
    timestamp_ms: int
    event_id: str | None
    text: str | None
    topic: str
    partition: int
    offset: int
    #: Record time in epoch milliseconds.
    record_time_ms: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that breaks the contract, and why."""

    record: Record
    reason: Reason
    detail: str


class Tombstone(msgspec.Struct, frozen=True, gc=False):
    """A record with a user's key and no value: what is kept of the user is to be erased."""

    user_id: str
    topic: str
    partition: int
    offset: int
    #: Record time in epoch milliseconds.
    record_time_ms: int


@dataclass(slots=True)
class EventBatch:
    """What a batch of records held: the valid events in order, the tombstones in order, and the
    rejected records."""

    records: Records
    events: list[Event] = field(default_factory=list)
    tombstones: list[Tombstone] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def cut(self) -> list[EventBatch]:
        """The same in parts, in order, each ending behind a tombstone or at the end: so that who
        takes the events of a part, then its tombstone, keeps the order of the records."""
        if not self.tombstones:
            return [self]
        parts, start = [], 0
        offsets = [event.offset for event in self.events]
        for tombstone in self.tombstones:
            end = bisect_left(offsets, tombstone.offset)
            parts.append(EventBatch(self.records, self.events[start:end], [tombstone]))
            start = end
        return [*parts, EventBatch(self.records, self.events[start:], [], self.rejected)]


class Decoder:
    """Decodes records against the contract.

    Args:
        max_bytes: largest value in bytes; larger ones are rejected unread.
        max_future_ms: how far ahead of `now_ms` a timestamp may lie, in milliseconds.
        require_user_key: reject records whose key is not the user id. Kafka orders and places
            records by key, so a wrong key breaks the order of a user's events.
    """

    def __init__(
        self, *, max_bytes: int, max_future_ms: int, require_user_key: bool = True
    ) -> None:
        self._decode = msgspec.json.Decoder(UserEvent).decode
        self._max_bytes = max_bytes
        self._max_future_ms = max_future_ms
        self._require_user_key = require_user_key

    def decode(self, records: Records, *, now_ms: int) -> EventBatch:
        """Decode `records` in order. Never raises for what a record holds."""
        batch = EventBatch(records)
        topic, partition = records.topic, records.partition
        accept, check = batch.events.append, self._check
        latest_ms = now_ms + self._max_future_ms
        columns = zip(
            records.offsets, records.keys, records.values, records.timestamps_ms, strict=True
        )
        for row, (offset, key, value, record_time_ms) in enumerate(columns):
            try:
                if value is None and key is not None:
                    batch.tombstones.append(
                        Tombstone(_user_of(key), topic, partition, offset, record_time_ms)
                    )
                    continue
                raw, timestamp_ms = check(key, value, latest_ms)
            except _ContractError as error:
                batch.rejected.append(Rejected(records.at(row), error.reason, error.detail))
            else:
                accept(
                    Event(
                        raw.user_id,
                        raw.item_id,
                        raw.event_type,
                        raw.surface,
                        timestamp_ms,
                        raw.event_id,
                        raw.text,
                        topic,
                        partition,
                        offset,
                        record_time_ms,
                    )
                )
        return batch

    def _check(
        self, key: bytes | None, value: bytes | None, latest_ms: int
    ) -> tuple[UserEvent, int]:
        """The event in `value` and its time in epoch milliseconds."""
        if not value:
            raise _ContractError(
                Reason.EMPTY,
                "the record has no key and no value" if value is None else "the value is empty",
            )
        if len(value) > self._max_bytes:
            raise _ContractError(
                Reason.TOO_LARGE, f"{len(value)} bytes; at most {self._max_bytes} are accepted"
            )
        # msgspec checks the strings it keeps; a field that it skips may hold anything.
        if not value.isascii():
            try:
                value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _ContractError(
                    Reason.NOT_UTF8, f"invalid UTF-8 at byte {error.start}: {error.reason}"
                ) from None
        try:
            raw = self._decode(value)
        except msgspec.ValidationError as error:
            raise _ContractError(_classify(str(error)), str(error)) from None
        except msgspec.DecodeError as error:
            raise _ContractError(Reason.NOT_JSON, str(error)) from None
        except RecursionError:
            raise _ContractError(Reason.NOT_JSON, "nested too deeply") from None
        if raw.schema_version != SCHEMA_VERSION:
            raise _ContractError(
                Reason.UNSUPPORTED_VERSION,
                f"schema_version {_shown(raw.schema_version)}; this worker reads {SCHEMA_VERSION}",
            )
        if self._require_user_key and key != raw.user_id.encode("utf-8", "surrogatepass"):
            raise _ContractError(
                Reason.WRONG_KEY,
                "the record key must be the user_id in UTF-8, since Kafka orders records by key",
            )
        timestamp = raw.timestamp
        if type(timestamp) is int and EARLIEST_TIMESTAMP_MS <= timestamp <= latest_ms:
            return raw, timestamp
        return raw, _timestamp_ms(timestamp, latest_ms)


def json_schema() -> dict[str, Any]:
    """The event contract as JSON Schema (draft 2020-12), as published in docs/schema/."""
    (schema,), components = msgspec.json.schema_components([UserEvent])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:streamrec:user-event:v{SCHEMA_VERSION}",
        **schema,
        "$defs": components,
    } | {"$ref": "#/$defs/UserEvent"}


class _ContractError(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def _user_of(key: bytes) -> str:
    """The user whose tombstone has this key."""
    # As long as no valid id is; so that no time is spent on a longer one.
    if 0 < len(key) <= MAX_KEY_BYTES:
        with suppress(UnicodeDecodeError):
            user_id = key.decode("utf-8", "surrogatepass")
            if len(user_id) <= MAX_ID_LENGTH:
                return user_id
    raise _ContractError(
        Reason.WRONG_KEY,
        "a record without a value erases the user whom its key names; this key is no user id"
        f" (1 to {MAX_ID_LENGTH} characters of UTF-8)",
    )


def _classify(message: str) -> Reason:
    """Which reason a msgspec validation message stands for."""
    if "missing required field" in message:
        return Reason.MISSING_FIELD
    if message.startswith("Invalid enum value"):
        return Reason.UNKNOWN_VALUE
    if " of length " in message or message.startswith(("Invalid", "Integer")):
        return Reason.INVALID_VALUE
    return Reason.WRONG_TYPE


def _timestamp_ms(value: int | float | datetime, latest_ms: int) -> int:
    if isinstance(value, datetime):
        aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        milliseconds = aware.timestamp() * 1000.0
    else:
        milliseconds = value
    # A float may be infinite or not a number only through overflow such as 1e999.
    if not EARLIEST_TIMESTAMP_MS <= milliseconds < 1e15:
        raise _ContractError(
            Reason.TIMESTAMP_RANGE,
            f"timestamp {_shown(value)} is not epoch milliseconds after 1973-03-03"
            " (is it in seconds?) or an ISO 8601 date",
        )
    if milliseconds > latest_ms:
        raise _ContractError(
            Reason.TIMESTAMP_FUTURE,
            f"timestamp {_shown(value)} lies {int(milliseconds - latest_ms)} ms past the accepted"
            " future; check the producer's clock",
        )
    return int(milliseconds)


def _shown(value: object) -> str:
    # Python refuses to print integers of more than 4,300 digits; such a message helps nobody.
    if isinstance(value, int) and value.bit_length() > 128:
        return f"(a number of {value.bit_length()} bits)"
    return str(value)
