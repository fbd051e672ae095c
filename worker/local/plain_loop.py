"""The yardstick: the same pipeline as most people would first write it.

A plain aiokafka loop that takes one event at a time, scores it, writes it to Redis and publishes
the result. No dead letters, no deduplication, no fallback; offsets are committed on a timer, so it
may lose events. Used by demo and bench only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from redis.asyncio import Redis

from worker.bundle import Bundle
from worker.events import UserEvent
from worker.settings import Settings


@dataclass(frozen=True)
class Timed:
    """How many events took how long."""

    events: int
    seconds: float

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds if self.seconds else 0.0


async def run_plain_loop(settings: Settings, bundle: Bundle, *, limit: int, group: str) -> Timed:
    """Process the first `limit` events of the events topic."""
    decode = msgspec.json.Decoder(UserEvent).decode
    redis = Redis.from_url(settings.redis.get_secret_value())
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka, acks="all")
    consumer = AIOKafkaConsumer(
        settings.events_topic,
        bootstrap_servers=settings.kafka,
        group_id=group,
        auto_offset_reset="earliest",
    )
    await producer.start()
    await consumer.start()
    histories: dict[str, list[str]] = {}
    length = bundle.manifest.max_length
    done, started = 0, 0.0
    try:
        async for message in consumer:
            if not done:
                started = time.perf_counter()
            event = decode(message.value)
            history = histories.setdefault(event.user_id, [])
            history.append(event.item_id)
            known = [bundle.index[item] for item in history if item in bundle.index][-length:]
            tensor = np.zeros((1, length), dtype=np.int64)
            if known:
                tensor[0, -len(known) :] = known
            items, _ = bundle.score(tensor, min(len(history) + 10, len(bundle.items)))
            seen = set(history)
            top = [
                bundle.items[index - 1]
                for index in items[0].tolist()
                if bundle.items[index - 1] not in seen
            ][:10]
            data = msgspec.json.encode(top)
            await redis.set(f"plain:{event.user_id}", data)
            await producer.send(settings.recommendations_topic, data, key=message.key)
            done += 1
            if done >= limit:
                break
        seconds = time.perf_counter() - started
    finally:
        await consumer.stop()
        await producer.stop()
        await redis.aclose()
    return Timed(done, seconds)
