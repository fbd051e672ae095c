"""Redis goes away, comes back, and comes back with less: no event is missing at the end.

Processors on a real Redis that is told when to fail; what the intake does with what they say
(commit, go back) is a few lines here.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from worker.cache import Cache, UserKey, history_key, recommendation_key
from worker.events import Records, Surface
from worker.history import History
from worker.local.redis_server import RedisServer
from worker.metrics import Metrics
from worker.processor import Processor
from worker.rules import Rules
from worker.settings import load_settings

POSTS = Surface.POSTS
START_MS = 1_764_000_000_000
USERS = ("ann", "bob", "cat", "dan")
#: Of each partition, the event of one of its two users at each offset; some are broken.
LOGS = [
    [(USERS[2 * partition + (offset * 5 // 3) % 2], offset % 7 == 3) for offset in range(40)]
    for partition in range(2)
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as started:
        assert isinstance(started, RedisServer)
        yield started


class FlakyCache(Cache):
    """Fails while `away`; `after` more commands go through before it starts to."""

    away = False
    after = 0

    def _connection(self) -> Any:
        if self.away:
            if not self.after:
                raise RedisConnectionError("away")
            self.after -= 1
        return super()._connection()


def records(partition: int, first: int, count: int) -> Records:
    part = list(enumerate(LOGS[partition]))[first : first + count]
    values = [
        b"broken"
        if broken
        else f'{{"user_id":"{user}","item_id":"{partition}-{offset}","event_type":"view",'
        f'"surface":"posts","timestamp":{START_MS + offset}}}'.encode()
        for offset, (user, broken) in part
    ]
    return Records(
        "events", partition, [offset for offset, _ in part],
        [user.encode() for _, (user, _) in part], values, [START_MS] * len(part),
    )  # fmt: skip


class Stream:
    """What Kafka, intake and pipeline are to a processor."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.committed = [0, 0]
        #: Offset of the newest list published for each user.
        self.published: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """A new process reads from what is committed."""
        configured = load_settings(redis=self.server.url, cold_items_max=0, top_k=3)
        self.cache = FlakyCache.from_settings(configured)
        self.metrics = Metrics()
        self.processor = Processor(
            configured,
            cache=self.cache,
            models=cast(Any, SimpleNamespace(serving=lambda surface: None)),
            rules=Rules(),
            metrics=self.metrics,
        )
        # Waiting is not what is tested.
        self.processor._outage.due_in_s = lambda: 0.0  # type: ignore[method-assign]
        self.at = list(self.committed)

    def step(self, counts: tuple[int, int]) -> None:
        """Take so many records of each partition."""
        taken = [records(n, self.at[n], count) for n, count in enumerate(counts)]
        for n, part in enumerate(taken):
            self.at[n] += len(part)
        made = self.processor.process([part for part in taken if len(part)])
        for (_, n), offset in made.rewind.items():
            self.at[n] = self.committed[n] = offset
        for one, _ in made.lists:
            self.published[one.user_id] = one.origin.offset
        if made.durable and not made.rewind:
            self.committed = list(self.at)


def snapshot(server: RedisServer) -> dict[bytes, bytes]:
    with Redis.from_url(server.url) as client:
        return {key: cast(bytes, client.dump(key)) for key in cast(list[bytes], client.keys())}


def restore(server: RedisServer, kept: dict[bytes, bytes]) -> None:
    with Redis.from_url(server.url) as client:
        client.flushall()
        client.script_flush()
        for key, data in kept.items():
            client.restore(key, 0, data)


def check_all_is_there(stream: Stream) -> None:
    with Redis.from_url(stream.server.url) as client:
        for n, log in enumerate(LOGS):
            for user in {user for user, _ in log}:
                offsets = [at for at, (one, broken) in enumerate(log) if one == user and not broken]
                data = client.get(history_key(UserKey(user, POSTS)))
                assert isinstance(data, bytes)
                assert list(History.from_bytes(data, 100).items) == [f"{n}-{at}" for at in offsets]
                made = client.get(recommendation_key(UserKey(user, POSTS)))
                assert isinstance(made, bytes)
                assert msgspec.json.decode(made)["origin"]["offset"] == offsets[-1]
                assert stream.published[user] == offsets[-1]
        counted = {
            field
            for key in cast(list[bytes], client.keys("pop:*"))
            for field in cast(dict[bytes, bytes], client.hgetall(key))
        }
    expected = {
        f"i:{n}-{at}".encode() for n, log in enumerate(LOGS) for at, (_, bad) in enumerate(log)
        if not bad
    }  # fmt: skip
    assert counted == expected | {b"offset"}


ACTS = st.one_of(
    st.tuples(st.just("take"), st.integers(0, 6), st.integers(0, 6)),
    st.tuples(st.just("away"), st.integers(0, 3), st.just(0)),
    st.tuples(st.sampled_from(["back", "crash", "rebalance", "small"]), st.just(0), st.just(0)),
)
LOSSES = st.tuples(st.sampled_from(["save", "lose", "lose all"]), st.just(0), st.just(0))


def run(server: RedisServer, acts: list[tuple[str, int, int]]) -> Stream:
    restore(server, {})
    stream, saved = Stream(server), {}
    for act, first, second in acts:
        if act == "take":
            stream.step((first, second))
        elif act == "away":
            stream.cache.away, stream.cache.after = True, first
        elif act == "back":
            stream.cache.away = False
        elif act == "crash":
            stream.start()
        elif act == "rebalance":
            stream.processor.forget()
            stream.at = list(stream.committed)
        elif act == "small":
            stream.processor._histories._max_bytes = 3000.0
        elif act == "save":
            saved = snapshot(server)
        else:
            restore(server, saved if act == "lose" else {})
    stream.cache.away = False
    for _ in range(60):
        stream.step((5, 5))
        if stream.committed == [40, 40]:
            break
    assert stream.committed == [40, 40]
    return stream


PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(acts=st.lists(ACTS, max_size=25))
def test_whenever_redis_is_away_every_event_arrives(
    server: RedisServer, acts: list[tuple[str, int, int]]
) -> None:
    stream = run(server, acts)
    check_all_is_there(stream)


@PROPERTY
@given(acts=st.lists(st.one_of(ACTS, LOSSES), max_size=25))
def test_whatever_redis_loses_is_made_anew_from_the_log(
    server: RedisServer, acts: list[tuple[str, int, int]]
) -> None:
    stream = run(server, acts)
    # As the worker does once Redis is back, and at each batch.
    for _ in range(60):
        stream.step((5, 5))
        if stream.committed == [40, 40]:
            break
    check_all_is_there(stream)
