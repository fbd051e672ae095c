"""A post that the bundle has never seen is recommended within seconds, by what it says."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from redis import Redis

from tests.conftest import ITEMS, tiny_bundle
from tests.integration.support import World, event, eventually
from tests.unit.test_text import model_with_state
from worker.bundle import open_bundle
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.text import SCHEME, TextSpec, grams

pytest.importorskip("sklearn")

from models.text import Encoder, item_vectors
from models.text_export import export_text

SPEC = TextSpec(SCHEME, buckets=1 << 14, max_grams=64)
LIKED = ITEMS[0]


@pytest.fixture
def world(tmp_path: Path, tansu: TansuBroker, redis_server: RedisServer) -> World:
    """A model of random vectors, and an encoder to which "jazz" means much the same as `LIKED`."""
    plain = open_bundle(tiny_bundle(tmp_path / "plain", model=model_with_state()))
    histories = np.random.default_rng(0).integers(0, len(ITEMS) + 1, (400, 8))
    liked = item_vectors(plain, histories)[0]
    rows = np.zeros((SPEC.buckets + 1, len(liked)), dtype=np.float32)
    for word, direction in (("jazz", 3.0), ("football", -3.0)):
        (gram,) = grams(word, buckets=SPEC.buckets, limit=1)
        rows[gram] = direction * liked
    idf = np.zeros(SPEC.buckets + 1, dtype=np.float32)
    idf[rows.any(axis=1)] = 1.0
    encoder = Encoder(SPEC, rows, idf, np.zeros_like(liked))
    tiny_bundle(
        tmp_path / "registry" / "posts" / "v1",
        model=model_with_state(),
        text_model=export_text(encoder),
        text=SPEC,
    )
    return World(tmp_path, tansu, redis_server, tmp_path / "registry", cold_items_poll_s="0.3")


def listed(world: World, user: str) -> list[str]:
    return list((world.cached(user) or {"items": []})["items"])


def test_a_new_post_reaches_those_who_like_what_it_is_about(world: World) -> None:
    with world.worker() as worker:
        world.send([event("ann", LIKED, 1)])
        eventually(lambda: bool(listed(world, "ann")), "served before there is a post")
        world.send(
            [
                event("bob", "fresh-football", 2, text="Football tonight"),
                event("bob", "fresh-jazz", 3, text="Jazz tonight"),
            ]
        )
        # Other users' partitions may be read in another order: she looks again.
        posted = time.monotonic()
        turn = iter(range(10, 1000))

        def ann_sees_it() -> bool:
            world.send([event("ann", LIKED, next(turn))])
            return "fresh-jazz" in listed(world, "ann")

        eventually(ann_sees_it, "the post is recommended", timeout_s=20.0)
        assert time.monotonic() - posted < 15.0
        found = world.cached("ann")
        assert found is not None
        assert found["source"] == "model"
        assert found["items"][0] == "fresh-jazz"
        assert found["scores"] == sorted(found["scores"], reverse=True)
        assert "fresh-football" not in found["items"]
        # Bob has seen both.
        assert not {"fresh-jazz", "fresh-football"} & set(listed(world, "bob"))
        assert worker.metric('streamrec_cold_items{surface="posts"}') == 2
        assert worker.metric("streamrec_cold_recommended_total") >= 1
    # Another process knows them from Redis.
    with Redis.from_url(world.redis.url) as client:
        assert client.zcard("cold:{posts}") == 2
        assert 0 < int(client.ttl("cold:{posts}")) <= 3 * 86400  # type: ignore[arg-type]
        client.zadd("cold:{posts}", {b"not what a worker wrote": time.time()})
    with world.worker() as worker:
        world.send([event("carol", LIKED, 1)])
        eventually(lambda: bool(listed(world, "carol")), "served after the restart")
        assert listed(world, "carol")[0] == "fresh-jazz"
        assert not worker.metric("streamrec_redis_errors_total")
