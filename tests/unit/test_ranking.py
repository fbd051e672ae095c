"""Rules, popularity, settings and health: the rest of the pure core."""

import time
from pathlib import Path

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from worker.cache import UserKey, history_key, recommendation_key
from worker.errors import SettingsError
from worker.events import Event, EventType, Surface
from worker.health import Health
from worker.metrics import BulkHistogram
from worker.outbox import partition_of
from worker.popularity import PopularityTable, log2_add, most_popular
from worker.ranking import Filter
from worker.rules import Rules, SurfaceRules, read_rules
from worker.settings import ModelChoice, load_settings, parse_models

CANDIDATES = [(item, -float(rank)) for rank, item in enumerate("abcdefgh")]


def top(rules: Rules, exclude: frozenset[str] = frozenset(), count: int = 3) -> list[str]:
    items, scores = Filter(rules, Surface.POSTS).top(CANDIDATES, exclude=exclude, count=count)
    assert scores == sorted(scores, reverse=True)
    return items


def test_seen_and_blocked_items_are_left_out() -> None:
    assert top(Rules(block=frozenset("a")), frozenset("b")) == ["c", "d", "e"]


def test_only_allowed_items_are_shown_on_a_surface() -> None:
    rules = Rules(surfaces={Surface.POSTS: SurfaceRules(allow=frozenset("gh"))})
    assert top(rules) == ["g", "h"]
    empty = Rules(surfaces={Surface.POSTS: SurfaceRules(allow=frozenset())})
    assert top(empty) == []


def test_an_author_fills_no_more_than_their_cap() -> None:
    rules = Rules(
        surfaces={Surface.POSTS: SurfaceRules(max_per_author=1)},
        authors={"a": "x", "b": "x", "c": "x", "d": "y"},
    )
    assert top(rules) == ["a", "d", "e"]


@pytest.mark.parametrize(
    "text", ["", "{", '{"blok": []}', '{"surfaces": {"posts": {"max_per_author": 0}}}']
)
def test_a_wrong_rules_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rules.json"
    file.write_text(text)
    with pytest.raises(SettingsError, match="STREAMREC_RULES"):
        read_rules(file)


def event(item: str, at: int, offset: int, kind: EventType = EventType.VIEW) -> Event:
    return Event("u", item, kind, Surface.POSTS, at, None, None, "t", 0, offset, 1)


def table(*events: tuple[str, int], half_life_ms: int = 1000) -> PopularityTable:
    made = PopularityTable(half_life_ms=half_life_ms, max_items=10)
    made.add([event(item, at, offset) for offset, (item, at) in enumerate(events)])
    return made


def test_popularity_halves_in_a_half_life() -> None:
    made = table(("old", 0), ("old", 0), ("old", 0), ("new", 1000), ("new", 1000))
    assert [item for item, _ in most_popular([made.weights], 2)] == ["new", "old"]


def test_a_redelivered_event_is_not_counted_twice() -> None:
    made = table(("a", 0), ("b", 0))
    before = dict(made.weights)
    made.add([event("a", 0, 0), event("b", 0, 1)])
    assert made.weights == before


def test_a_popularity_table_stays_within_its_bound() -> None:
    made = PopularityTable(half_life_ms=1000, max_items=10)
    for number in range(500):
        made.add([event(f"i{number}", number, number)])
    assert len(made.weights) <= 20
    assert "i499" in made.weights


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_log_sums_never_overflow_and_never_shrink(values: list[float]) -> None:
    total = None
    for value in values:
        total = log2_add(total, value)
        assert total >= value
    assert total is not None and total <= max(values) + len(values)


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_user_id_reaches_another_users_keys(left: str, right: str) -> None:
    for key in (history_key, recommendation_key):
        one, other = key(UserKey(left, Surface.POSTS)), key(UserKey(right, Surface.POSTS))
        assert (one == other) == (left == right)
        assert one.count("{") == one.count("}") == 1


def test_models_are_named_by_surface() -> None:
    assert parse_models("posts=sasrec@v1, ads=clicks") == {
        Surface.POSTS: ModelChoice("sasrec", "v1"),
        Surface.ADS: ModelChoice("clicks", None),
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"top_k": 0}, "STREAMREC_TOP_K"),
        ({"http_port": 99999}, "STREAMREC_HTTP_PORT"),
        ({"models": "mail=x"}, "STREAMREC_MODELS: unknown surface 'mail'"),
        ({"models": "posts"}, "is not surface=name"),
        ({"models": "posts=a,posts=b"}, "named twice"),
        ({"max_in_flight_events": 1}, "STREAMREC_MAX_IN_FLIGHT_EVENTS"),
    ],
)
def test_a_wrong_setting_is_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(**flags)


def test_settings_come_from_the_environment_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMREC_TOP_K", "7")
    assert load_settings().top_k == 7
    assert load_settings(top_k=3).top_k == 3


def test_a_password_is_never_shown() -> None:
    assert "hunter2" not in repr(load_settings(redis="redis://:hunter2@h/0"))


def health(**changes: object) -> Health:
    now = time.monotonic()
    made = Health(stall_timeout_s=10.0, started=True, beat_at=now, progress_at=now)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_events_waiting_without_progress_are_a_stall() -> None:
    stuck = health(waiting_events=5, progress_at=time.monotonic() - 60)
    assert "5 events wait" in (stuck.stalled(time.monotonic()) or "")


def test_what_waited_for_an_outage_gets_time_once_that_is_over() -> None:
    now = time.monotonic()
    waiting = health(waiting_events=5, progress_at=now - 60, beat_at=now + 60)
    waiting.wait_for("Kafka")
    assert waiting.stalled(time.monotonic() + 60) is None
    waiting.wait_for(None)
    assert waiting.stalled(time.monotonic() + 9) is None
    assert waiting.stalled(time.monotonic() + 11) is not None


def test_a_stuck_event_loop_is_a_stall() -> None:
    assert "event loop" in (health(beat_at=0.0).stalled(60.0) or "")


@pytest.mark.parametrize(
    "quiet",
    [
        {},
        {"waiting_events": 5, "waiting_for": "Redis"},
        {"waiting_events": 5, "started": False},
    ],
    ids=["nothing to do", "Redis is down", "still starting"],
)
def test_what_is_no_stall(quiet: dict[str, object]) -> None:
    assert health(progress_at=0.0, **quiet).stalled(time.monotonic()) is None


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(-(10**7), 10**7), st.sampled_from(EventType)),
        max_size=30,
    ),
    st.integers(1, 10),
)
def test_popularity_counted_by_the_batch_is_that_counted_one_by_one(
    acts: list[tuple[str, int, EventType]], size: int
) -> None:
    events = [event(item, at, offset, kind) for offset, (item, at, kind) in enumerate(acts)]
    one_by_one, batched = table(), table()
    for one in events:
        one_by_one.add([one])
    for start in range(0, len(events), size):
        batched.add(events[start : start + size])
        batched.add(events[max(0, start - 2) : start + size])  # delivered again
    assert batched.weights == pytest.approx(one_by_one.weights)
    assert batched.changed == one_by_one.changed
    assert batched.offset == one_by_one.offset


def test_a_bulk_histogram_reads_as_one_asked_for_every_event() -> None:
    registry = CollectorRegistry()
    bulk = BulkHistogram("bulk_seconds", "Bulk.", (0.1, 0.5, 1.0))
    registry.register(bulk)
    plain = Histogram("plain_seconds", "Plain.", buckets=(0.1, 0.5, 1.0), registry=registry)
    for value, times in ((0.05, 3), (0.1, 2), (0.7, 1), (9.0, 4)):
        bulk.observe(value, times)
        for _ in range(times):
            plain.observe(value)
    for suffix, labels in [
        *(("_bucket", {"le": bound}) for bound in ("0.1", "0.5", "1.0", "+Inf")),
        ("_sum", {}),
        ("_count", {}),
    ]:
        one = registry.get_sample_value(f"bulk_seconds{suffix}", labels)
        assert one is not None
        assert one == pytest.approx(registry.get_sample_value(f"plain_seconds{suffix}", labels))


@given(st.binary(min_size=1, max_size=40), st.integers(1, 50))
def test_a_key_goes_to_the_partition_that_kafkas_clients_choose(key: bytes, count: int) -> None:
    partitions = list(range(count))
    assert partition_of(key, count) == DefaultPartitioner()(key, partitions, partitions)
    assert 0 <= partition_of(None, count) < count
