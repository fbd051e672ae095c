"""A recurrent model served live: one step an event, made anew after a restart."""

from pathlib import Path

import msgspec
from redis import Redis

from tests.integration.support import World, eventually
from worker.bundle import open_bundle
from worker.events import Surface
from worker.history import History
from worker.local.ml100k import load_ml100k
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.recommender import Recommender
from worker.replay import ml100k_events
from worker.rules import Rules

SHIPPED = Path(__file__).parents[2] / "models" / "shipped"
NAME = "posts-recurrent"


def test_lists_are_those_of_the_whole_history_across_a_restart(
    tmp_path: Path, tansu: TansuBroker, redis_server: RedisServer
) -> None:
    world = World(tmp_path, tansu, redis_server, SHIPPED, models=f"posts={NAME}")
    replay = list(ml100k_events(load_ml100k()))[:3_000]
    records = [(e.user_id.encode(), msgspec.json.encode(e)) for e in replay]
    with world.worker():
        world.send(records[:1_500])
        eventually(lambda: sum(world.committed().values()) == 1_500, "half is committed")
    with world.worker() as worker:
        world.send(records[1_500:])
        eventually(lambda: sum(world.committed().values()) == len(records), "all is committed")
        assert worker.metric("streamrec_inference_errors_total") == 0
    version = sorted(path.name for path in (SHIPPED / NAME).iterdir())[-1]
    bundle = open_bundle(SHIPPED / NAME / version)
    users = sorted({e.user_id for e in replay})
    with Redis.from_url(redis_server.url) as client:
        stored = [client.get(f"hist:{{{user}}}:posts") for user in users]
    histories = [History.from_bytes(data, 200) for data in stored if isinstance(data, bytes)]
    assert len(histories) == len(users)
    expected = Recommender(Surface.POSTS, Rules(), top_k=10).rank(bundle, users, histories).ranked
    alike = 0
    for row, user in enumerate(users):
        cached = world.cached(user)
        assert cached is not None and cached["model_version"] == f"{NAME}@{version}"
        assert not set(cached["items"]) & set(histories[row].items)
        alike += len(set(cached["items"]) & set(expected[row][0]))
    # Rounding, and what a carry remembers beyond `max_length`, may change a place or two.
    assert alike / (10 * len(users)) > 0.8
