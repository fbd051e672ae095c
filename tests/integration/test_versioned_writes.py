"""Redis keeps the newer of two writes, whoever comes last: marks and scripts on a real Redis."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from tests.integration.support import eventually
from tests.unit.serving import total
from worker.cache import (
    REDIS_FAILURES,
    Cache,
    PartitionKey,
    Position,
    Refused,
    UserKey,
    history_key,
    recommendation_key,
)
from worker.early_write import EarlyWrite, RedisAwayError
from worker.events import Records, Surface
from worker.history import History
from worker.local.redis_server import RedisServer
from worker.metrics import Metrics
from worker.popularity import PopularityTable
from worker.processor import Made, Processor
from worker.rules import Rules
from worker.settings import load_settings
from worker.versions import Applied

POSTS = Surface.POSTS
ANN = UserKey("ann", POSTS)
START_MS = 1_764_000_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as started:
        assert isinstance(started, RedisServer)
        yield started


@pytest.fixture
def cache(server: RedisServer) -> Iterator[Cache]:
    with Redis.from_url(server.url) as client:
        client.flushall()
    made = Cache(
        server.url,
        timeout_ms=2000,
        recommendations_ttl_s=60,
        history_ttl_s=60,
        forget_ttl_s=7,
    )
    yield made
    made.close()


def history(*applied: Applied, item: str = "") -> bytes:
    """A stored history into which these records went, the newest last."""
    return History(8, items=(item,) if item else (), applied=applied).to_bytes()


def write(cache: Cache, data: bytes, made: bytes | None = None) -> bool:
    """Whether Redis took a history and list of ann."""
    lists = {} if made is None else {ANN: made}
    refused = cache.write_batch(histories={ANN: data}, recommendations=lists, popularity={})
    assert refused in (Refused(), Refused(users=[ANN]))
    return not refused.users


@pytest.mark.parametrize(
    ("stored", "written", "taken"),
    [
        # Later in the same partition, the same once more, and earlier.
        ([("events", 0, 7, 5)], [("events", 0, 8, 5)], True),
        ([("events", 0, 7, 5)], [("events", 0, 7, 5)], True),
        ([("events", 0, 7, 5)], [("events", 0, 6, 5)], False),
        # Offsets are numbers, also where they need more bytes.
        ([("events", 0, 255, 5)], [("events", 0, 256, 5)], True),
        ([("events", 0, 2**40, 5)], [("events", 0, 3, 5)], False),
        # A topic made anew: offsets from 0, later record times.
        ([("events", 0, 7, 5)], [("events", 0, 0, 6)], True),
        # Another partition or topic: taken by who knows of the record that Redis has last.
        ([("events", 0, 7, 5)], [("events", 1, 9, 9)], False),
        ([("events", 0, 7, 5)], [("other", 0, 9, 9)], False),
        ([("events", 0, 7, 5)], [("events", 0, 7, 5), ("events", 1, 0, 1)], True),
        ([("events", 0, 7, 5), ("events", 1, 0, 9)], [("events", 0, 8, 9)], False),
        ([("events", 0, 6, 5), ("events", 1, 0, 9)], [("events", 1, 0, 9), ("events", 0, 7, 5)],
         True),
        # No record time (-1) in the topic.
        ([("events", 0, 7, -1)], [("events", 0, 6, -1)], False),
    ],
)  # fmt: skip
def test_a_write_that_lacks_the_last_record_of_what_is_stored_is_refused(
    cache: Cache, stored: list[Applied], written: list[Applied], taken: bool
) -> None:
    first, second = history(*stored, item="first"), history(*written, item="second")
    assert write(cache, first, b"first list")
    assert write(cache, second, b"second list") is taken
    expected = (second, b"second list") if taken else (first, b"first list")
    assert cache.read_users([ANN]) == [expected]


def test_what_the_release_before_wrote_is_overwritten(cache: Cache, server: RedisServer) -> None:
    unmarked = msgspec.msgpack.encode([2, (), b"", (), b"", (("events", 0, 7, 5),), []])
    with Redis.from_url(server.url) as client:
        client.set(history_key(ANN), unmarked)
    assert write(cache, history(("events", 0, 8, 5)))


def test_a_history_without_a_list_leaves_the_list(cache: Cache) -> None:
    write(cache, history(("events", 0, 7, 5)), b"a list")
    write(cache, history(("events", 0, 8, 5)))
    assert cache.read_users([ANN])[0][1] == b"a list"


def test_what_is_erased_stays_so_against_late_writes_and_expires(
    cache: Cache, server: RedisServer
) -> None:
    assert write(cache, history(("events", 0, 7, 5), item="secret"), b"a list")
    empty = history(("events", 0, 8, 5))
    effects: dict[str, Any] = {"histories": {}, "recommendations": {}, "popularity": {}}
    for _ in range(2):
        refused = cache.write_batch(**effects, forgotten={ANN: empty})
        assert refused == Refused()
        assert cache.read_users([ANN]) == [(empty, None)]
    assert not write(cache, history(("events", 0, 7, 5), item="secret"), b"a list")
    assert cache.read_users([ANN]) == [(empty, None)]
    with Redis.from_url(server.url) as client:
        assert 0 < client.ttl(history_key(ANN)) <= 7
    assert write(cache, history(("events", 0, 9, 5), item="new"), b"a new list")


def test_an_older_erasure_is_refused(cache: Cache) -> None:
    newer = history(("events", 0, 9, 5), item="after")
    write(cache, newer, b"a list")
    refused = cache.write_batch(
        histories={}, recommendations={}, popularity={},
        forgotten={ANN: history(("events", 0, 8, 5))},
    )  # fmt: skip
    assert refused == Refused(users=[ANN])
    assert cache.read_users([ANN]) == [(newer, b"a list")]


def table(offset: int, time_ms: int, **weights: float) -> PopularityTable:
    made = PopularityTable(half_life_ms=1000, max_items=100_000)
    made.offset, made.record_time_ms = offset, time_ms
    made.weights = dict(weights)
    made.changed = set(weights)
    return made


def test_popularity_and_tallies_that_are_older_are_refused_too(cache: Cache) -> None:
    place, other = PartitionKey(POSTS, "events", 0), PartitionKey(POSTS, "events", 1)

    def put(offset: int, weight: float) -> Refused:
        tally = {place: history(("events", 0, offset, 5))}
        return cache.write_batch(
            histories={}, recommendations={},
            popularity={place: table(offset, 5, a=weight), other: table(offset, offset, b=weight)},
            tallies=tally,
        )  # fmt: skip

    assert put(9, 1.0) == put(10, 2.0) == put(10, 2.0) == Refused()
    late = put(8, 3.0)
    assert late == Refused(popularity=[place, other], tallies=[place])
    found = table(0, 0)
    cache.read_popularity(place, found)
    assert (found.offset, found.record_time_ms, found.weights) == (10, 5, {"a": 2.0})
    assert cache.read_tallies([place]) == [history(("events", 0, 10, 5))]


def test_a_large_table_is_written_whole(cache: Cache) -> None:
    place = PartitionKey(POSTS, "events", 0)
    changes = table(1, 5, **{f"item-{n}": float(n) for n in range(10_001)})
    effects: dict[str, Any] = {"histories": {}, "recommendations": {}}
    cache.write_batch(**effects, popularity={place: changes})
    found = table(0, 0)
    cache.read_popularity(place, found)
    assert found.weights == changes.weights
    changes.offset, changes.removed, changes.changed = 2, changes.changed, set()
    cache.write_batch(**effects, popularity={place: changes})
    empty = table(0, 0)
    cache.read_popularity(place, empty)
    assert (empty.offset, empty.weights) == (2, {})


def test_a_redis_that_was_started_anew_is_given_its_scripts(
    cache: Cache, server: RedisServer
) -> None:
    write(cache, history(("events", 0, 7, 5)))
    with Redis.from_url(server.url) as client:
        client.script_flush()
    assert write(cache, history(("events", 0, 8, 5)), b"a list")
    assert cache.read_users([ANN])[0][1] == b"a list"


# -- two workers that both take themselves for the owner

USERS = ("ann", "bob", "cat")
#: One partition: at each offset, the event of one user.
LOG = [
    (
        USERS[offset * 7 % 3],
        f'{{"user_id":"{USERS[offset * 7 % 3]}","item_id":"item-{offset}","event_type":"view",'
        f'"surface":"posts","timestamp":{START_MS + offset}}}'.encode(),
    )
    for offset in range(24)
]


def records(first: int, count: int, partition: int = 0) -> Records:
    part = LOG[first : first + count]
    return Records(
        "events", partition, list(range(first, first + len(part))),
        [user.encode() for user, _ in part], [value for _, value in part],
        [START_MS] * len(part),
    )  # fmt: skip


class Worker:
    """A processor that reads the log from `at` on."""

    def __init__(self, server: RedisServer, at: int, **settings: Any) -> None:
        self.metrics = Metrics()
        configured = load_settings(redis=server.url, cold_items_max=0, top_k=3, **settings)
        self.processor = Processor(
            configured,
            cache=Cache.from_settings(configured),
            models=cast(Any, SimpleNamespace(serving=lambda surface: None)),
            rules=Rules(),
            metrics=self.metrics,
        )
        self.at = at

    def step(self, count: int) -> Made:
        part = records(self.at, count)
        self.at += len(part)
        return self.processor.process([part] if len(part) else [])


def stored_items(server: RedisServer) -> dict[str, list[str]]:
    with Redis.from_url(server.url) as client:
        found = {user: client.get(history_key(UserKey(user, POSTS))) for user in USERS}
    return {
        user: list(History.from_bytes(data, 100).items)
        for user, data in found.items()
        if isinstance(data, bytes)
    }


def origins(server: RedisServer) -> dict[str, int]:
    with Redis.from_url(server.url) as client:
        found = {user: client.get(recommendation_key(UserKey(user, POSTS))) for user in USERS}
    return {
        user: msgspec.json.decode(data)["origin"]["offset"]
        for user, data in found.items()
        if isinstance(data, bytes)
    }


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    before=st.integers(0, 8),
    steps=st.lists(st.tuples(st.sampled_from(["old", "new"]), st.integers(1, 6)), max_size=14),
)
def test_whoever_writes_last_no_event_is_missing_and_no_list_goes_back(
    cache: Cache, server: RedisServer, before: int, steps: list[tuple[str, int]]
) -> None:
    with Redis.from_url(server.url) as client:
        client.flushall()
    old = Worker(server, 0)
    if before:
        old.step(before)
    # Its partition moves on from what it committed, anything up to what it has done.
    new = Worker(server, before // 2)
    newest: dict[str, int] = {}
    for who, count in steps:
        (old if who == "old" else new).step(count)
        listed = origins(server)
        assert all(listed[user] >= offset for user, offset in newest.items())
        newest = listed
    new.step(len(LOG))
    expected: dict[str, list[str]] = {user: [] for user in USERS}
    for offset, (user, _) in enumerate(LOG):
        expected[user].append(f"item-{offset}")
    assert stored_items(server) == expected
    last = {user: offset for offset, (user, _) in enumerate(LOG)}
    assert origins(server) == last
    found = table(0, 0)
    cache.read_popularity(PartitionKey(POSTS, "events", 0), found)
    assert found.offset == len(LOG) - 1
    assert set(found.weights) == {f"item-{offset}" for offset in range(len(LOG))}


def test_a_zombie_reads_again_what_it_could_not_write_and_says_so(
    cache: Cache, server: RedisServer
) -> None:
    zombie, owner = Worker(server, 0), Worker(server, 0)
    zombie.step(4)
    owner.step(12)
    made = zombie.step(2)
    assert made.lists == []
    assert total(zombie.metrics, "streamrec_stale_writes_total", kind="user") == 2
    assert total(zombie.metrics, "streamrec_stale_writes_total", kind="popularity") == 1
    # Counted once, as what they were when the batch came.
    assert total(zombie.metrics, "streamrec_events_total") == 6
    # It goes on from what the owner wrote, and so may well be the first with what comes next.
    zombie.step(10)
    assert stored_items(server) == {
        user: [f"item-{n}" for n in range(16) if LOG[n][0] == user] for user in USERS
    }


def test_a_user_whose_events_moved_to_a_new_partition_keeps_those_of_both(
    cache: Cache, server: RedisServer
) -> None:
    """Partitions were added: the last events of the old one, and the first of the new one, are
    taken by two workers at once."""
    # The new partition does not start at 0 here, which else would look like a loss.
    old, new = Worker(server, 0), Worker(server, 0, redis_repair=False)
    old.step(6)
    new.processor.process([records(12, 6, partition=1)])
    made = old.step(6)
    assert total(old.metrics, "streamrec_stale_writes_total", kind="user") == 3
    assert {one.user_id for one, _ in made.lists} == set(USERS)
    new.processor.process([records(18, 6, partition=1)])
    assert stored_items(server) == {
        user: [f"item-{n}" for n in range(24) if LOG[n][0] == user] for user in USERS
    }


BOB, EVE = UserKey("bob", POSTS), UserKey("eve", POSTS)
EVENTS = ("events", 0)


def test_what_is_known_early_is_in_redis_before_the_rest_is(
    cache: Cache, server: RedisServer
) -> None:
    positions = {EVENTS: Position(0, 10)}
    with closing(cache.begin(positions)) as batch, Redis.from_url(server.url) as client:
        batch.users({ANN: history(("events", 0, 7, 5))}, {ANN: b"list"})
        eventually(lambda: client.get(recommendation_key(ANN)) == b"list", "the list")
        # How far all was taken is told last.
        assert cache.read_position(EVENTS) is None
        batch.users({BOB: history(("events", 0, 9, 5))}, {})
        assert batch.finish(popularity={}) == Refused()
    assert cache.read_position(EVENTS) == 10
    assert cache.read_users([BOB])[0][0] == history(("events", 0, 9, 5))


def test_users_who_were_sent_at_different_times_are_refused_by_name(cache: Cache) -> None:
    assert write(cache, history(("events", 0, 8, 5)))
    with closing(cache.begin({})) as batch:
        batch.users({BOB: history(("events", 0, 6, 5))}, {})
        batch.users({ANN: history(("events", 0, 7, 5)), EVE: history(("events", 0, 7, 5))}, {})
        refused = batch.finish(popularity={}, forgotten={UserKey("zoe", POSTS): history()})
    assert refused == Refused(users=[ANN])


def test_nothing_is_sent_early_to_a_redis_that_lost_data(cache: Cache) -> None:
    with closing(cache.begin({EVENTS: Position(5, 10)})) as batch:
        batch.users({ANN: history(("events", 0, 7, 5))}, {ANN: b"list"})
        assert batch.finish(popularity={}) == Refused(lost={EVENTS: 0})
    assert cache.read_users([ANN]) == [(None, None)]
    assert cache.read_position(EVENTS) is None


def test_scripts_that_are_gone_in_the_middle_are_brought_again(
    cache: Cache, server: RedisServer
) -> None:
    positions = {EVENTS: Position(0, 10)}
    with closing(cache.begin(positions)) as batch, Redis.from_url(server.url) as client:
        assert write(cache, history(("events", 0, 1, 1)))  # brings the scripts
        batch.users({ANN: history(("events", 0, 7, 5))}, {})
        client.script_flush()
        batch.users({BOB: history(("events", 0, 8, 5))}, {})
        assert batch.finish(popularity={}) == Refused()
    assert all(stored for stored, _ in cache.read_users([ANN, BOB]))
    assert cache.read_position(EVENTS) == 10


def test_replies_of_a_batch_that_is_given_up_are_not_taken_for_those_of_the_next(
    cache: Cache,
) -> None:
    with closing(cache.begin({EVENTS: Position(0, 10)})) as batch:
        batch.users({ANN: history(("events", 0, 7, 5))}, {})
    assert cache.read_users([BOB, EVE]) == [(None, None), (None, None)]


def test_a_head_start_that_breaks_is_given_up_and_said_once(
    cache: Cache, server: RedisServer
) -> None:
    attempts: list[str] = []

    def attempt(name: str, operation: Callable[[], Any]) -> Any:
        attempts.append(name)
        try:
            return operation()
        except REDIS_FAILURES as error:
            raise RedisAwayError(name) from error

    early = EarlyWrite(lambda: cache.begin({EVENTS: Position(0, 10)}), attempt)
    early.users({ANN: history(("events", 0, 7, 5))}, {})
    assert early.alive
    assert list(early.sent) == [ANN]
    with Redis.from_url(server.url) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    sent = 0
    while early.alive:  # the system takes what is sent to a closed connection, for a while
        assert sent < 100
        early.users({UserKey(f"user-{sent}", POSTS): history(("events", 0, 8, 5))}, {})
        sent += 1
        time.sleep(0.01)
    tried = len(attempts)
    early.users({EVE: history(("events", 0, 9, 5))}, {})
    assert EVE not in early.sent
    assert len(attempts) == tried


def test_lists_of_a_micro_batch_are_in_redis_while_others_are_made(
    server: RedisServer, cache: Cache
) -> None:
    processor = Processor(
        load_settings(require_user_key=False, cold_items_max=0),
        cache=cache,
        models=cast(Any, SimpleNamespace(serving=lambda surface: None)),
        rules=Rules(),
        metrics=Metrics(),
    )
    maker = processor._lists[POSTS]
    make, portions = maker.make, list[Sequence[str]]()

    def watched(serving: Any, users: Sequence[str], *rest: Any) -> Any:
        with Redis.from_url(server.url) as client:
            for user in (user for before in portions for user in before):
                key = recommendation_key(UserKey(user, POSTS))
                eventually(lambda key=key: client.exists(key) == 1, "a list")  # type: ignore[misc]
        portions.append(users)
        return make(serving, users, *rest)

    maker.make = watched  # type: ignore[method-assign]
    users = [f"user-{n}" for n in range(40)]
    values = [
        msgspec.json.encode(
            {
                "user_id": user, "item_id": f"item-{n}", "event_type": "view",
                "timestamp": START_MS, "surface": "posts",
            }
        )
        for n, user in enumerate(users)
    ]  # fmt: skip
    records = Records("events", 0, list(range(40)), [b"x"] * 40, values, [START_MS] * 40)
    made = processor.process([records])
    assert made.durable
    assert len(portions) >= 2
    assert sorted(user for some in portions for user in some) == sorted(users)
    assert {one.user_id for one, _ in made.lists} == set(users)
    assert cache.read_position(EVENTS) == 40
