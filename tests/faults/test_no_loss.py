"""What must not lose an event: a kill, an outage of Redis, a stall."""

from pathlib import Path

import msgspec
import pytest

from tests.conftest import ITEMS, tiny_bundle
from tests.integration.support import World, event, eventually
from worker.local.ml100k import load_ml100k
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.replay import ml100k_events

SHIPPED = Path(__file__).parents[2] / "models" / "shipped"


@pytest.fixture
def world(tmp_path: Path, tansu: TansuBroker, redis_server: RedisServer) -> World:
    """The embedded broker, a Redis, and a tiny model."""
    tiny_bundle(tmp_path / "registry" / "posts" / "v1")
    return World(tmp_path, tansu, redis_server, tmp_path / "registry")


def test_after_sigkill_midway_every_cached_list_reflects_the_users_last_event(
    tmp_path: Path, tansu: TansuBroker, redis_server: RedisServer
) -> None:
    """Real events and the shipped model; kills on Apache Kafka are cells of the fault matrix."""
    world = World(tmp_path, tansu, redis_server, SHIPPED)
    replay = list(ml100k_events(load_ml100k()))[:12_000]
    records = [(e.user_id.encode(), msgspec.json.encode(e)) for e in replay]
    worker = world.worker(batch_max_events="64")
    with worker:
        world.send(records[:6000])
        eventually(lambda: worker.metric("streamrec_event_seconds_count") > 500, "under way")
        worker.process.kill()
    with world.worker() as restarted:
        world.send(records[6000:])
        eventually(lambda: sum(world.committed().values()) == len(replay), "all is committed")
        assert restarted.metric("streamrec_dead_letters_total") == 0
    # The place of each user's last event, from the log itself.
    last = {record.key.decode(): record for record in world.read(world.events)}
    seen: dict[str, list[str]] = {}
    for one in replay:
        seen.setdefault(one.user_id, []).append(one.item_id)
    assert set(last) == set(seen)
    for user, record in last.items():
        cached = world.cached(user)
        assert cached is not None, f"user {user} has nothing cached"
        assert cached["origin"] == {
            "topic": world.events,
            "partition": record.partition,
            "offset": record.offset,
        }
        assert not set(cached["items"]) & set(seen[user][-200:])


def test_a_redis_outage_delays_events_and_loses_none(
    world: World, redis_server: RedisServer
) -> None:
    with world.worker() as worker:
        world.send([event("ann", ITEMS[0], 1)])
        eventually(lambda: sum(world.committed().values()) == 1, "first event committed")
        redis_server.stop()
        world.send([event("ann", ITEMS[1], 2), event("bob", ITEMS[2], 3)])
        eventually(lambda: worker.metric("streamrec_redis_errors_total") > 0, "the outage is seen")
        eventually(lambda: worker.get("/readyz")[0] == 503, "not ready without Redis")
        assert worker.get("/livez")[0] == 200
        assert sum(world.committed().values()) == 1
        redis_server.start()
        eventually(lambda: sum(world.committed().values()) == 3, "all is committed")
        assert not {ITEMS[0], ITEMS[1]} & set((world.cached("ann") or {})["items"])
        assert world.cached("bob") is not None


def test_a_worker_that_stops_consuming_fails_livez_and_exits(
    world: World, redis_server: RedisServer
) -> None:
    """faust-streaming/faust#175: a consumer that stops, in a process that looks well. Here the
    pipeline is held by a Redis that accepts commands and never answers a blocked client, while
    the watch, on a connection of its own, still gets answers."""
    from redis import Redis

    with world.worker(stall_timeout_s="3", redis_timeout_ms="600000") as worker:
        with Redis.from_url(redis_server.url) as client:
            # Writes wait; PING does not.
            client.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
        world.send([event("ann", ITEMS[0])])
        eventually(lambda: not worker.process.running, "the process exits", 30.0)
        assert "stalled" in worker.log
        assert "70" in worker.process.exit_note()


@pytest.mark.parametrize("method", ["take", "take_events"])
def test_stock_faust_acknowledges_a_batch_whose_handler_raised(method: str) -> None:
    """Why worker/intake.py takes batches before Faust's streams do."""
    import inspect

    from faust.streams import Stream

    source = inspect.getsource(getattr(Stream, method))
    assert "finally:" in source and "ack" in source.partition("finally:")[2]


def test_a_crash_of_the_pipeline_leaves_its_batch_uncommitted(
    world: World, redis_server: RedisServer
) -> None:
    """The cure: the same failure here commits nothing, and a restart reads the events again."""
    from redis import Redis

    with Redis.from_url(redis_server.url) as client:
        # A history written by a later release makes the handler raise: it must not be overwritten.
        later = msgspec.msgpack.encode([99, [], [], [], [], {}])
        client.set("hist:{ann}:posts", later)
        with world.worker() as worker:
            world.send([event("ann", ITEMS[0]), event("bob", ITEMS[1])])
            eventually(lambda: not worker.process.running, "the handler raised", 30.0)
            assert "format 99" in worker.log
        assert client.get("hist:{ann}:posts") == later
        assert sum(world.committed().values()) == 0
        client.delete("hist:{ann}:posts")
    with world.worker():
        eventually(lambda: sum(world.committed().values()) == 2, "read again and committed")
    assert world.cached("ann") is not None


def test_a_damaged_history_costs_one_user_their_past_and_nobody_the_stream(
    world: World, redis_server: RedisServer
) -> None:
    from redis import Redis

    with Redis.from_url(redis_server.url) as client:
        client.set("hist:{ann}:posts", b"garbage")
    with world.worker() as worker:
        world.send([event("ann", ITEMS[0]), event("bob", ITEMS[1])])
        eventually(lambda: sum(world.committed().values()) == 2, "all is committed")
        assert worker.metric('streamrec_history_reads_total{found="damaged"}') == 1
    assert world.cached("ann") is not None
