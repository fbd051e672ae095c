"""Records larger than the topics take that they belong to, on a real Kafka: the stream goes on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.conftest import tiny_bundle, tiny_model
from tests.integration.support import PARTITIONS, World, event, eventually
from worker.local.kafka import KafkaBroker
from worker.local.redis_server import RedisServer

#: Bytes that a topic takes by its own `max.message.bytes`.
EVENTS_TAKE, OTHERS_TAKE = 4_000_000, 40_000
ITEMS = tuple(f"{number}-{'long' * 60}" for number in range(300))

pytestmark = pytest.mark.kafka


@pytest.fixture
def world(tmp_path: Path, kafka: KafkaBroker, redis_server: RedisServer) -> World:
    """Lists of 200 items of 245 characters each; output topics that take less than one."""
    tiny_bundle(
        tmp_path / "registry" / "posts" / "v1", model=tiny_model(items=len(ITEMS)), items=ITEMS
    )
    world = World(tmp_path, kafka, redis_server, tmp_path / "registry", top_k="200")
    takes = {
        world.events: EVENTS_TAKE,
        world.dead_letters: OTHERS_TAKE,
        world.recommendations: OTHERS_TAKE,
    }

    async def make() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
        await admin.start()
        try:
            await admin.create_topics(
                [
                    NewTopic(name, PARTITIONS, 1, topic_configs={"max.message.bytes": str(most)})
                    for name, most in takes.items()
                ]
            )
        finally:
            await admin.close()

    asyncio.run(make())
    return world


def send_large(world: World, key: bytes, value: bytes) -> None:
    """Write one record that may be larger than producers usually send."""

    async def run() -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=world.broker.bootstrap, max_request_size=EVENTS_TAKE
        )
        await producer.start()
        try:
            await producer.send_and_wait(world.events, value, key)
        finally:
            await producer.stop()

    asyncio.run(run())


def test_what_is_too_large_is_cut_and_what_follows_is_served(world: World) -> None:
    with world.worker() as worker:
        # Larger than the worker produces, and than the dead-letter topic takes.
        send_large(world, b"ann", b"x" * 3_000_000)
        world.send([(b"ann", b"y" * 30_000), (b"ann", b"z" * 60_000), event("ann", ITEMS[0])])
        world.send(event(f"user-{number}", ITEMS[number], number) for number in range(20))
        eventually(lambda: sum(world.committed().values()) == 24, "all is committed")
        letters = {one.value[:1]: one for one in world.read(world.dead_letters)}
        assert set(letters) == {b"x", b"y", b"z"}
        assert letters[b"x"].value == b"x" * len(letters[b"x"].value)
        assert {name: dict(one.headers).get("truncated") for name, one in letters.items()} == {
            b"x": b"3000000",
            # 40,000 bytes are taken; halves of half a megabyte are tried, the next is 32 KiB.
            b"y": b"30000",
            b"z": b"60000",
        }
        assert len(letters[b"z"].value) > 25_000
        assert dict(letters[b"x"].headers)["reason"] == b"too_large"
        # Redis has whole lists; the topic as much of each as it takes.
        cached = world.cached("ann")
        assert cached is not None
        assert len(cached["items"]) == 200
        published = {one.key.decode(): one for one in world.read(world.recommendations)}
        assert set(published) == {"ann", *(f"user-{number}" for number in range(20))}
        items = json.loads(published["ann"].value)["items"]
        assert 100 < len(items) < 200
        assert items == cached["items"][: len(items)]
        assert "truncated" in dict(published["ann"].headers)
        assert worker.metric("streamrec_truncated_records_total") == 24
        # Known by now: nothing is refused again.
        before = worker.log.count("topic_takes_less")
        world.send([event("bob", ITEMS[1], 1), (b"bob", b"w" * 60_000)])
        eventually(lambda: sum(world.committed().values()) == 26, "these too")
        assert worker.log.count("topic_takes_less") == before
        assert worker.metric("streamrec_produce_errors_total") == 0
