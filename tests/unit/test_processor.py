"""What a micro-batch does where Redis or the group does not play along."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.conftest import ITEMS, tiny_bundle
from tests.unit.serving import WritesAtOnce, total
from worker.bundle import open_bundle
from worker.cache import Position, Refused, UserKey
from worker.events import Records, Surface
from worker.history import History
from worker.metrics import Metrics
from worker.models import Serving
from worker.processor import Processor
from worker.rules import Rules
from worker.settings import load_settings

ANN = UserKey("ann", Surface.POSTS)
PLACE = ("events", 0)


class FakeRedis(WritesAtOnce):
    """A cache that can be told what to do when histories are read."""

    def __init__(self) -> None:
        self.on_read: Callable[[], None] = lambda: None
        self.failures = 0
        self.writes: list[dict[str, Any]] = []
        self.reads = 0

    def fail(self) -> None:
        raise RedisConnectionError("Redis is away")

    def read_users(self, keys: list[Any]) -> list[tuple[None, None]]:
        self.reads += 1
        self.on_read()
        return [(None, None)] * len(keys)

    def read_popularity(self, key: object, into: object) -> None:
        return None

    def write_batch(self, **effects: Any) -> Refused:
        if self.failures:
            self.failures -= 1
            self.fail()
        self.writes.append({name: dict(effect) for name, effect in effects.items()})
        return Refused()


@pytest.fixture
def redis() -> FakeRedis:
    return FakeRedis()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def processor(redis: FakeRedis, metrics: Metrics) -> Processor:
    return Processor(
        load_settings(require_user_key=False, cold_items_max=0),
        cache=cast(Any, redis),
        models=cast(Any, SimpleNamespace(serving=lambda surface: None)),
        rules=Rules(),
        metrics=metrics,
    )


def records(*values: bytes | None, first: int = 0) -> Records:
    count = len(values)
    offsets = list(range(first, first + count))
    return Records("events", 0, offsets, [b"ann"] * count, values, [1_764_000_000_000] * count)


def view(item: str, user: str = "ann") -> bytes:
    return (
        f'{{"user_id":"{user}","item_id":"{item}","event_type":"view","surface":"posts",'
        '"timestamp":1764000000000}'
    ).encode()


def test_a_batch_whose_partitions_are_taken_away_meanwhile_has_no_effect(
    processor: Processor, redis: FakeRedis
) -> None:
    redis.on_read = processor.forget
    made = processor.process([records(view("p1"), b"not JSON")])
    assert (made.lists, made.rejected, redis.writes) == ([], [], [])


def test_after_a_rebalance_histories_are_read_again(processor: Processor, redis: FakeRedis) -> None:
    processor.process([records(view("p1"))])
    processor.process([records(view("p2"), first=1)])
    assert redis.reads == 1
    processor.forget()
    processor.process([records(view("p3"), first=2)])
    assert redis.reads == 2


def test_ids_in_histories_are_the_model_s_own_strings(redis: FakeRedis, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle(tmp_path / "v1"))
    serving = Serving(Surface.POSTS, bundle)
    processor = Processor(
        load_settings(require_user_key=False, cold_items_max=0),
        cache=cast(Any, redis),
        models=cast(Any, SimpleNamespace(serving={Surface.POSTS: serving}.get)),
        rules=Rules(),
        metrics=Metrics(),
    )
    # One that the window is made anew for, and one that is put at its end.
    for offset, item in enumerate((ITEMS[0], ITEMS[1], "unknown")):
        processor.process([records(view(item), first=offset)])
    kept = processor._histories.loaded([ANN])[ANN].items
    assert kept == (ITEMS[0], ITEMS[1], "unknown")
    assert [one is own for one, own in zip(kept[:2], bundle.items[:2], strict=True)] == [True, True]


def test_what_redis_does_not_take_is_held_back_and_written_later(
    processor: Processor, redis: FakeRedis
) -> None:
    redis.failures = 1
    made = processor.process([records(view("p1"))])
    assert (len(made.lists), made.durable, redis.writes) == (1, False, [])
    assert processor.waits_for_redis
    # Too early to ask again: users in memory go on.
    made = processor.process([records(view("p2"), first=1)])
    assert (len(made.lists), made.durable, redis.writes) == (1, False, [])
    time.sleep(processor.retry_in_s)
    made = processor.process([])
    assert (made.lists, made.durable) == ([], True)
    (effects,) = redis.writes
    assert list(effects["histories"]) == list(effects["recommendations"]) == [ANN]
    assert History.from_bytes(effects["histories"][ANN], 9).items == ("p1", "p2")
    assert not processor.waits_for_redis


def test_a_tombstone_takes_the_list_of_earlier_events_and_leaves_that_of_later_ones(
    processor: Processor, redis: FakeRedis
) -> None:
    made = processor.process([records(view("p1"), None)])
    assert made.lists == []
    assert [one.offset for one in made.forgotten] == [1]
    (written,) = redis.writes
    assert not written["histories"] and not written["recommendations"]
    assert {key.surface.value for key in written["forgotten"]} == {"posts", "friends", "ads"}
    made = processor.process([records(view("p2"), None, view("p3"), first=2)])
    assert [one.origin.offset for one, _ in made.lists] == [4]
    assert [one.offset for one in made.forgotten] == [3]
    written = redis.writes[-1]
    assert {key.surface.value for key in written["forgotten"]} == {"friends", "ads"}
    (stored,) = written["histories"].values()
    assert History.from_bytes(stored, 200).items == ("p3",)


def test_nothing_that_a_producer_sends_becomes_a_label(
    processor: Processor, metrics: Metrics
) -> None:
    good = view("p1")
    swapped = [
        good.replace(old, new)
        for old, new in (
            (b'"ann"', b'"hostile"'), (b'"p1"', b'"hostile"'), (b'"view"', b'"hostile"'),
            (b'"posts"', b'"hostile"'), (b'"timestamp"', b'"hostile"'), (b"1764", b"hostile"),
        )
    ]  # fmt: skip
    processor.process([records(*swapped, b"hostile", None, b"")])
    labels = {
        value
        for family in metrics.registry.collect()
        for sample in family.samples
        for value in sample.labels.values()
    }
    assert {"posts", "view"} <= labels
    assert not [value for value in labels if "hostile" in value or "ann" in value]


def test_users_who_are_not_in_memory_wait_for_redis(processor: Processor, redis: FakeRedis) -> None:
    redis.on_read = redis.fail
    made = processor.process([records(view("p1"), b"not JSON")])
    assert (made.lists, len(made.rejected), made.durable) == ([], 1, False)
    redis.on_read = lambda: None
    time.sleep(processor.retry_in_s)
    made = processor.process([records(view("p2"), first=2)])
    assert ([one.origin.offset for one, _ in made.lists], made.durable) == ([2], True)
    assert made.rejected == []
    assert History.from_bytes(redis.writes[0]["histories"][ANN], 9).items == ("p1", "p2")


def test_what_is_held_back_is_let_go_after_a_rebalance(
    processor: Processor, redis: FakeRedis
) -> None:
    redis.failures = 1
    processor.process([records(view("p1"))])
    processor.forget()
    time.sleep(processor.retry_in_s)
    assert processor.process([]).durable
    assert [effects["histories"] for effects in redis.writes] == [{}]


def test_nothing_is_written_without_what_was_parked(processor: Processor, redis: FakeRedis) -> None:
    """Else Redis could lose what was written, and no position would tell."""
    processor.process([records(view("p1"))])
    redis.failures = 1
    processor.process([records(view("p2"), first=1)])
    processor.process([records(view("p3", "bob"), first=2)])
    redis.on_read = redis.fail
    time.sleep(processor.retry_in_s)
    assert not processor.process([]).durable
    assert len(redis.writes) == 1
    redis.on_read = lambda: None
    time.sleep(processor.retry_in_s)
    assert processor.process([]).durable
    effects = redis.writes[1]
    assert list(effects["histories"]) == [ANN, UserKey("bob", Surface.POSTS)]
    assert effects["positions"] == {PLACE: Position(1, 3)}


def test_far_behind_views_make_no_list_until_half_of_that_is_caught_up(
    redis: FakeRedis, metrics: Metrics
) -> None:
    own = Processor(
        load_settings(require_user_key=False, cold_items_max=0, shed_lag_s=60.0),
        cache=cast(Any, redis),
        models=cast(Any, SimpleNamespace(serving=lambda surface: None)),
        rules=Rules(),
        metrics=metrics,
    )
    offset = 0

    def take(value: bytes, age_s: float) -> int:
        """How many lists an event makes that is so old."""
        nonlocal offset
        made = own.process(
            [Records("events", 0, [offset], [b"ann"], [value], [int((time.time() - age_s) * 1e3)])]
        )
        offset += 1
        assert made.durable
        return len(made.lists)

    assert take(view("p1"), 59.0) == 1
    assert take(view("p2"), 61.0) == 0
    assert take(view("p3").replace(b"view", b"like"), 61.0) == 1
    assert take(view("p4"), 31.0) == 0
    assert take(view("p5"), 29.0) == 1
    assert take(view("p6"), 31.0) == 1
    stored = History.from_bytes(redis.writes[-1]["histories"][ANN], 9)
    assert stored.items == ("p1", "p2", "p3", "p4", "p5", "p6")
    assert total(metrics, "streamrec_lists_shed_total") == 2
