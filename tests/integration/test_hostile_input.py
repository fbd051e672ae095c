"""Producers may send anything: no list, key, label or log line of another's comes of it."""

import json
import re
from pathlib import Path

from redis import Redis

from tests.conftest import ITEMS, tiny_bundle
from tests.integration.support import World, event, eventually
from worker.cache import UserKey, recommendation_key
from worker.events import Surface
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker

#: Each is another user.
USERS = [
    "victim",
    "{victim}",
    "victim}:posts",
    "x{victim}",
    "%7Bvictim%7D",
    "victim\r\nFLUSHALL",
    "victim\n",
    "*1\r\n$8\r\nFLUSHALL\r\n",
    "victim\0",
    "v\u0456ctim",  # a Cyrillic letter
    "victi\u1d50",
    "rec:{victim}:posts",
    "EVALSHA",
    "\U0001f600",
    "\u202evictim",
    '"}{"level":"critical"}',
    "v" * 128,
    "\x1b[31mvictim",
    "../../etc/passwd",
    "${jndi:ldap://victim}",
]
ODD = [
    event("victim", "i", surface="made-up"),
    event("victim", "i", surface="posts\n"),
    event("victim", "i", event_type='like",x="y'),
    event("v" * 100_000, "i"),
    (b"victim", b'{"user_id":"\\ud800","item_id":"i","event_type":"view"}'),
    (b"\xff\xfe", b"\xff\xfe"),
]


def test_whatever_users_are_called_each_has_a_list_of_their_own(
    tmp_path: Path, tansu: TansuBroker, redis_server: RedisServer
) -> None:
    tiny_bundle(tmp_path / "registry" / "posts" / "v1", seed=1)
    world = World(tmp_path, tansu, redis_server, tmp_path / "registry")
    with world.worker(log_level="debug") as worker:
        world.send([event("calm", ITEMS[0])])
        eventually(lambda: world.cached("calm") is not None, "served")
        eventually(lambda: worker.metric("streamrec_event_seconds_count") >= 1, "published")
        calm = series(worker.get("/metrics")[1])
        world.send([*(event(user, ITEMS[n % 40]) for n, user in enumerate(USERS)), *ODD])
        total = len(USERS) + len(ODD) + 1
        eventually(lambda: worker.metric("streamrec_event_seconds_count") == total, "all processed")
        assert worker.metric("streamrec_dead_letters_total") == len(ODD)
        hostile = series(worker.get("/metrics")[1])
    with Redis.from_url(world.redis.url) as client:
        lists = {
            user: client.get(recommendation_key(UserKey(user, Surface.POSTS))) for user in USERS
        }
        assert len(client.keys("rec:*")) == len(client.keys("hist:*")) == len(USERS) + 1
    for user, data in lists.items():
        assert data is not None
        assert json.loads(data)["user_id"] == user  # type: ignore[arg-type]
    # No label is what a producer sent: only fixed ones, of outcomes that had not been, are new.
    known = {"invalid_value", "unknown_value", "not_json", "not_utf8", "too_large", "wrong_key"}
    new = {value for labels in hostile - calm for _, value in labels}
    assert new <= known | {value for labels in calm for _, value in labels} | set("0123")
    # Nor is any line of the log; and each is one object.
    lines = worker.log.split("\n")
    said = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(said) >= len(ODD)
    assert all(set(line) <= {"time", "level", "logger", "message"} for line in said)
    for user in ("victim", "FLUSHALL", "level", "\x1b", "jndi", "passwd"):
        assert not [line for line in said if user in line["message"]]
    assert "victim" not in worker.log


def series(exposed: str) -> set[frozenset[tuple[str, str]]]:
    """Labels of all series, but for the bounds of histograms."""
    found = re.findall(r"^streamrec_\w+\{(.*)\} ", exposed, re.MULTILINE)
    pairs = (re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels) for labels in found)
    return {frozenset(pair for pair in own if pair[0] != "le") for own in pairs}
