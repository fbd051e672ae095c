"""The worker as its users meet it: real broker, real Redis, a process of its own."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import ITEMS, tiny_bundle
from tests.integration.support import World, event, eventually
from worker.cli import main
from worker.local.kafka import KafkaBroker
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.registry import LocalRegistry


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    tiny_bundle(tmp_path / "registry" / "posts" / "v1", seed=1)
    return tmp_path / "registry"


@pytest.fixture
def world(
    tmp_path: Path, broker: TansuBroker | KafkaBroker, redis_server: RedisServer, registry: Path
) -> World:
    return World(tmp_path, broker, redis_server, registry)


def test_events_become_recommendations_in_redis_and_on_the_topic(
    world: World, registry: Path
) -> None:
    with world.worker() as worker:
        world.send(event("ann", item, n) for n, item in enumerate(ITEMS[:3]))
        world.send([event("new", "unknown to the model")])
        eventually(lambda: worker.metric("streamrec_event_seconds_count") == 4, "all processed")
        cached = world.cached("ann")
        assert cached is not None
        assert cached["source"] == "model"
        assert cached["model_version"] == "posts@v1"
        assert len(cached["items"]) == 10
        assert not set(cached["items"]) & set(ITEMS[:3])
        # The history that the worker wrote is the one that explains the list that it wrote.
        flags = ["--explain", "--redis", world.redis.url, "--registry", str(registry)]
        said = json.loads(CliRunner().invoke(main, ["recommend", "ann", *flags]).stdout)
        assert said["explanations"]["history_changed"] is False
        assert [one["score"] for one in said["explanations"]["items"]] == pytest.approx(
            cached["scores"], abs=1e-4
        )
        fallback = world.cached("new")
        assert fallback is not None
        assert (fallback["source"], fallback["model_version"]) == ("fallback", "popularity")
        published = [json.loads(record.value) for record in world.read(world.recommendations)]
        assert cached in published
        assert worker.get("/livez")[0] == 200
        assert worker.metric("streamrec_ready") == 1
        assert worker.metric('streamrec_dependency_up{dependency="kafka"}') == 1
        assert worker.metric("streamrec_freshness_seconds_count") == 4
        assert 0 < worker.metric("streamrec_freshness_seconds_sum") < 4 * 60
        assert worker.metric('streamrec_redis_seconds_count{operation="write_batch"}') >= 1
        assert (
            0
            < worker.metric("streamrec_memory_available_bytes")
            <= worker.metric("streamrec_memory_limit_bytes")
        )
    # Stopped in order: everything that was finished is committed.
    assert sum(world.committed().values()) == 4


def test_bad_records_go_to_the_dead_letter_topic_and_the_stream_goes_on(world: World) -> None:
    bad = [
        (b"ann", b"{"),
        (b"ann", b'{"user_id":"\xff"}'),
        (b"ann", b""),
        event("ann", "i", event_type="poke"),
        (b"somebody", event("ann", "i")[1]),
        event("ann", "i" * 300),
        event("ann", "i", timestamp=9e14),
    ]
    with world.worker() as worker:
        world.send([*bad, event("ann", ITEMS[0])])
        eventually(lambda: world.cached("ann") is not None, "the good event is served")
        eventually(
            lambda: worker.metric("streamrec_dead_letters_total") == len(bad),
            "dead letters counted",
        )
        letters = world.read(world.dead_letters)
        assert sorted(letters_value or b"" for letters_value in (x.value for x in letters)) == (
            sorted(value or b"" for _, value in bad)
        )
        headers = [dict(letter.headers) for letter in letters]
        assert {header["origin_topic"].decode() for header in headers} == {world.events}
        assert {header["reason"].decode() for header in headers} == {
            "not_json", "not_utf8", "empty", "unknown_value", "wrong_key", "invalid_value",
            "timestamp_future",
        }  # fmt: skip
        assert all(header["detail"] and header["origin_offset"] for header in headers)
    assert sum(world.committed().values()) == len(bad) + 1


def test_a_promoted_version_takes_over_between_two_events(world: World, registry: Path) -> None:
    tiny_bundle(registry / "posts" / "v2", seed=2)
    LocalRegistry(registry).promote("posts", "v1")
    with world.worker() as worker:
        world.send([event("ann", ITEMS[0], 1)])
        eventually(lambda: world.cached("ann") is not None, "served by v1")
        assert (world.cached("ann") or {})["model_version"] == "posts@v1"
        LocalRegistry(registry).promote("posts", "v2")
        eventually(lambda: 'version="v2"' in worker.get("/metrics")[1], "v2 serves")
        world.send([event("ann", ITEMS[1], 2)])
        eventually(
            lambda: (world.cached("ann") or {})["model_version"] == "posts@v2", "served by v2"
        )
        # The history went over to the new version.
        assert not {ITEMS[0], ITEMS[1]} & set((world.cached("ann") or {})["items"])


def test_two_workers_share_the_partitions_and_lose_nothing(world: World) -> None:
    users = [f"user-{n}" for n in range(40)]
    with world.worker() as first:
        world.send(event(user, ITEMS[0], 1) for user in users)
        with world.worker() as second:
            for round_ in range(1, 6):
                world.send(event(user, ITEMS[round_], round_ + 1) for user in users)
            eventually(
                lambda: (
                    first.metric("streamrec_assigned_partitions") > 0
                    and second.metric("streamrec_assigned_partitions") > 0
                ),
                "both have partitions",
            )
            world.send(event(user, ITEMS[6], 9) for user in users)
            expected = set(ITEMS[:7])
            eventually(
                lambda: sum(world.committed().values()) == 7 * len(users), "all is committed"
            )
            for user in users:
                found = world.cached(user)
                assert found is not None
                assert not set(found["items"]) & expected
