"""Users are erased: by the command or any producer's tombstone, through crashes, on real parts."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from redis import Redis

from tests.conftest import ITEMS, tiny_bundle
from tests.integration.support import World, event, eventually
from worker.cli import main
from worker.history import History
from worker.local.kafka import KafkaBroker
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.settings import load_settings
from worker.startup import ensure_topics

USER = "somebody-to-forget"
SURFACES = ("posts", "friends", "ads")


@pytest.fixture
def world(tmp_path: Path, broker: TansuBroker | KafkaBroker, redis_server: RedisServer) -> World:
    tiny_bundle(tmp_path / "registry" / "posts" / "v1")
    return World(tmp_path, broker, redis_server, tmp_path / "registry")


def forget(world: World, *options: str, exit_code: int = 0) -> str:
    """Run `streamrec forget` as a user does."""
    flags = ["--kafka", world.broker.bootstrap, "--redis", world.redis.url]
    command = ["forget", USER, *flags, "--events-topic", world.events, *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == exit_code, result.output
    return result.output


def make_topics(world: World) -> None:
    """As a worker does at its start."""
    flags = {
        name.removeprefix("STREAMREC_").lower(): value for name, value in world.environment.items()
    }
    asyncio.run(ensure_topics(load_settings(**flags)))


def items_left(world: World) -> dict[str, list[str]]:
    """Items of the user's stored histories, by surface."""
    with Redis.from_url(world.redis.url) as client:
        stored = {name: client.get(f"hist:{{{USER}}}:{name}") for name in SURFACES}
    return {
        name: list(History.from_bytes(data, sys.maxsize).items)
        for name, data in stored.items()
        if isinstance(data, bytes)
    }


def last_published(world: World, user: str) -> bytes | None:
    """What a compacted topic would keep of a user."""
    own = [one for one in world.read(world.recommendations) if one.key == user.encode()]
    value: bytes | None = own[-1].value
    return value


def test_the_command_erases_a_user_and_nobody_else(world: World) -> None:
    with world.worker() as worker:
        world.send([event(USER, ITEMS[0], 1), event(USER, "bob", 2, surface="friends")])
        world.send([event("bob", ITEMS[1], 3)])
        eventually(lambda: worker.metric("streamrec_event_seconds_count") == 3, "all processed")
        assert forget(world, "--wait").startswith("erased: ")
        assert items_left(world) == {name: [] for name in SURFACES}
        assert [world.cached(USER, name) for name in SURFACES] == [None] * 3
        assert world.cached("bob") is not None
        eventually(lambda: last_published(world, USER) is None, "the output topic forgets")
        assert last_published(world, "bob") is not None
        assert worker.metric("streamrec_forgotten_users_total") == 1
        # What comes after counts, and nothing from before does.
        world.send([event(USER, ITEMS[2], 4)])
        eventually(lambda: world.cached(USER) is not None, "served again")
        assert items_left(world)["posts"] == [ITEMS[2]]
        assert worker.metric("streamrec_dead_letters_total") == 0
        assert "user_forgotten" in worker.log
        assert USER not in worker.log
    assert sum(world.committed().values()) == 5


def test_a_tombstone_written_while_no_worker_runs_takes_its_place(world: World) -> None:
    make_topics(world)
    world.send([event(USER, ITEMS[0], 1), event(USER, ITEMS[1], 2)])
    assert forget(world).startswith("will be erased")
    # A wait in vain says so; its tombstone stays.
    assert "as soon as a worker reads it" in forget(world, "--wait", "--wait-s=0.5", exit_code=75)
    world.send([event(USER, ITEMS[2], 3)])
    with world.worker():
        eventually(lambda: sum(world.committed().values()) == 5, "all is committed")
    assert items_left(world) == {"posts": [ITEMS[2]], "friends": [], "ads": []}


@pytest.mark.parametrize("broker", [pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True)
def test_records_read_again_after_a_crash_bring_nothing_back(world: World) -> None:
    # Nothing is committed, so that all of it is read again.
    with world.worker(commit_interval_s="3600") as worker:
        world.send([event(USER, ITEMS[0], 1), event(USER, "bob", 2, surface="friends")])
        forget(world, "--wait")
        world.send([event(USER, ITEMS[1], 3)])
        eventually(lambda: items_left(world)["posts"] == [ITEMS[1]], "what came after")
        worker.process.kill()
    assert sum(world.committed().values()) == 0
    with world.worker() as worker:
        eventually(lambda: sum(world.committed().values()) == 4, "all is committed")
        assert items_left(world) == {"posts": [ITEMS[1]], "friends": [], "ads": []}
        assert world.cached(USER, "friends") is None
        # A repeat is no further user.
        assert worker.metric("streamrec_forgotten_users_total") == 0
