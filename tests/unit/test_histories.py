"""Histories in memory over those in Redis: bounded, and readable across releases."""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.serving import POSTS, event, total
from worker.cache import UserKey
from worker.events import Event, EventType
from worker.histories import (
    MEMORY_PER_HISTORY,
    MEMORY_PER_ITEM,
    MEMORY_PER_OWN_ITEM,
    Histories,
)
from worker.history import Applied, History, Shown
from worker.metrics import Metrics
from worker.quality import UserRecord


class PreviousRelease(msgspec.Struct, array_like=True, gc=False):
    """Format 2 as the release before records of trials has it."""

    format: int
    items: tuple[str, ...]
    timestamps: bytes
    hidden: tuple[str, ...]
    event_ids: bytes
    applied: tuple[Applied, ...]
    followed: list[str] = []


RECORD = UserRecord(8_123, 3, 2, 1, 0.5, 2, 1.25)
ITEMS = st.lists(st.text(max_size=8), max_size=8, unique=True).map(tuple)


def user(name: str) -> UserKey:
    return UserKey(name, POSTS)


class Redis:
    """Stored histories and lists by user, and how often they were asked for."""

    def __init__(self) -> None:
        self.stored: dict[UserKey, tuple[bytes | None, bytes | None]] = {}
        self.reads: list[list[UserKey]] = []

    def read(self, keys: Sequence[UserKey]) -> list[tuple[bytes | None, bytes | None]]:
        self.reads.append(list(keys))
        return [self.stored.get(key, (None, None)) for key in keys]

    def discard(self, keys: Sequence[UserKey]) -> None:
        for key in keys:
            del self.stored[key]


def histories(redis: Redis, *, max_bytes: float = 1e6, metrics: Metrics | None = None) -> Histories:
    return Histories(
        redis.read, redis.discard, length=8, max_bytes=max_bytes, metrics=metrics or Metrics()
    )


def stored(*items: str, record: UserRecord | None = None) -> bytes:
    history = History(8)
    for item in items:
        history.apply(event("u", item))
    history.record = record
    return history.to_bytes()


# -- releases before and after


@given(items=ITEMS, hidden=ITEMS, followed=ITEMS)
def test_what_the_previous_release_wrote_is_read(
    items: tuple[str, ...], hidden: tuple[str, ...], followed: tuple[str, ...]
) -> None:
    times = array("q", range(len(items)))
    applied = (("events", 3, 17, 1_764_000_000_000),)
    data = msgspec.msgpack.encode(
        PreviousRelease(2, items, times.tobytes(), hidden, b"12345678", applied, list(followed))
    )
    history = History.from_bytes(data, 8)
    assert (history.items, history.hidden, tuple(history.followed)) == (items, hidden, followed)
    assert (history.timestamps, history.event_ids, history.applied) == (
        times, b"12345678", applied,
    )  # fmt: skip
    assert history.record is None


@given(items=ITEMS)
def test_what_is_written_now_is_read_by_the_previous_release(items: tuple[str, ...]) -> None:
    data = stored(*items, record=RECORD)
    old = msgspec.msgpack.decode(data, type=PreviousRelease)
    new = History.from_bytes(data, 8)
    assert (old.format, old.items, old.applied) == (2, new.items, new.applied)
    assert old.timestamps == new.timestamps.tobytes()


def test_a_record_is_kept() -> None:
    assert History.from_bytes(stored("a", record=RECORD), 8).record == RECORD


def test_a_record_is_lost_with_the_previous_release_and_the_history_is_not() -> None:
    """A rollback of the worker itself, and forth again."""
    through = msgspec.msgpack.encode(
        msgspec.msgpack.decode(stored("a", "b", record=RECORD), type=PreviousRelease)
    )
    history = History.from_bytes(through, 8)
    assert (history.items, history.record) == (("a", "b"), None)


# -- the cache


def test_a_user_is_read_once_with_the_list_that_was_served() -> None:
    redis = Redis()
    list_of_ann = b'{"user_id":"ann","model_version":"posts@v1","items":["x","y"],"scores":[2,1]}'
    redis.stored = {user("ann"): (stored("a", record=RECORD), list_of_ann)}
    own = histories(redis)
    history = own.load([user("ann"), user("bob"), user("ann")])[user("ann")]
    assert history.items == ("a",) and history.record == RECORD
    assert (history.served, history.beside) == (Shown("posts@v1", ("x", "y")), None)
    assert own.load([user("ann")])[user("ann")] is history
    assert redis.reads == [[user("ann"), user("bob")]]


@pytest.mark.parametrize(
    "damage",
    [
        None, b"", b"garbage", b"[]", b'{"items":["a"]}', b'{"model_version":"\xff","items":[]}',
        b'{"user_id":' + b"[" * 200_000,
    ],
)  # fmt: skip
def test_without_a_list_that_can_be_read_none_was_served(damage: bytes | None) -> None:
    redis = Redis()
    redis.stored = {user("ann"): (stored("a"), damage)}
    history = histories(redis).load([user("ann")])[user("ann")]
    assert (history.items, history.served) == (("a",), None)


def test_a_damaged_history_starts_its_user_afresh_and_no_other() -> None:
    redis, metrics = Redis(), Metrics()
    redis.stored = {user("ann"): (b"garbage", None), user("bob"): (stored("b"), None)}
    loaded = histories(redis, metrics=metrics).load([user("ann"), user("bob")])
    assert [one.items for one in loaded.values()] == [(), ("b",)]
    assert total(metrics, "streamrec_history_reads_total", found="damaged") == 1
    # Else the mark of what was damaged could refuse what is written from now on.
    assert list(redis.stored) == [user("bob")]


def test_a_rebalance_forgets_all() -> None:
    redis = Redis()
    own = histories(redis)
    own.load([user("ann")])
    own.clear()
    own.load([user("ann")])
    assert len(redis.reads) == 2


def test_over_the_bound_the_least_recently_used_go() -> None:
    redis, metrics = Redis(), Metrics()
    own = histories(redis, max_bytes=2.5 * MEMORY_PER_HISTORY, metrics=metrics)
    for name in ("ann", "bob", "ann", "cat"):
        own.load([user(name)])
        own.stored([user(name)])
        own.trim()
    redis.reads.clear()
    own.load([user("ann"), user("cat")])
    assert redis.reads == []
    own.load([user("bob")])
    assert redis.reads == [[user("bob")]]


def test_lists_of_a_trial_are_part_of_the_bound() -> None:
    def size(lists: int) -> float:
        metrics = Metrics()
        own = histories(Redis(), metrics=metrics)
        history = own.load([user("ann")])[user("ann")]
        shown = Shown("posts@v1", tuple(f"item-{number}" for number in range(10)))
        history.served = shown if lists > 0 else None
        history.beside = shown if lists > 1 else None
        own.stored([user("ann")])
        own.trim()
        return total(metrics, "streamrec_history_cache_bytes")

    assert size(2) - size(1) == size(1) - size(0) > 10 * 8


@pytest.mark.parametrize("known", [True, False])
def test_what_a_history_takes_is_reckoned_as_measured(known: bool) -> None:
    """By Python's own account of the objects that belong to one history alone."""
    length = 200
    names = [f"item-{number:04d}" for number in range(length)]
    index = {name: at for at, name in enumerate(names, start=1)} if known else {}
    stored = History(length)
    for number, name in enumerate(names):
        stored.apply(
            Event(
                "ann", name, EventType.VIEW, POSTS, 1_764_000_000_000 + number,
                f"e{number}", None, "user-events", 0, number, 1_764_000_000_000 + number,
            )
        )  # fmt: skip
    data = stored.to_bytes()
    own = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            history = History.from_bytes(data, length)
            history.refresh_window(index, names, "catalogue", "version")
            own.append(history)
        taken = (tracemalloc.get_traced_memory()[0] - before) / len(own)
    finally:
        tracemalloc.stop()
    reckoned = MEMORY_PER_HISTORY + len(data) + MEMORY_PER_ITEM * length
    reckoned += MEMORY_PER_OWN_ITEM * own[0].unshared() + len(own[0].window)
    assert taken < reckoned < 1.5 * taken
