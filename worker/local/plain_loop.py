"""The yardstick: the same pipeline as most people would first write it.

A plain aiokafka loop that takes one event at a time, scores it and writes the list to Redis. No
output topic, dead letters, deduplication, fallback or metrics; histories are in memory only and
offsets are committed on a timer, so it may lose both. Used by demo and bench only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer
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


async def run_plain_loop(
    settings: Settings,
    bundle: Bundle,
    *,
    group: str,
    limit: int | None = None,
    histories: dict[str, list[str]] | None = None,
    on_event: Callable[[], object] = lambda: None,
) -> Timed:
    """Process the first `limit` events of the events topic, or all that ever come.

    Args:
        histories: items of users known before, oldest first; changed.
        on_event: called when an event's list is in Redis.
    """
    decode = msgspec.json.Decoder(UserEvent).decode
    redis = Redis.from_url(settings.redis.get_secret_value())
    consumer = AIOKafkaConsumer(
        settings.events_topic,
        bootstrap_servers=settings.kafka,
        group_id=group,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    histories = {} if histories is None else histories
    length, most = bundle.manifest.max_length, bundle.manifest.most
    done, started = 0, 0.0
    try:
        async for message in consumer:
            if not done:
                started = time.perf_counter()
            event = decode(message.value)
            history = histories.setdefault(event.user_id, [])
            history.append(event.item_id)
            del history[: -settings.history_length]
            known = [bundle.index[item] for item in history if item in bundle.index][-length:]
            tensor = np.zeros((1, length), dtype=np.int64)
            if known:
                tensor[0, -len(known) :] = known
            items, scores = bundle.score(tensor, min(len(history) + settings.top_k, most))
            seen = set(history)
            top = [
                (bundle.items[index - 1], score)
                for index, score in zip(items[0].tolist(), scores[0].tolist(), strict=True)
                if bundle.items[index - 1] not in seen
            ][: settings.top_k]
            made = {
                "user_id": event.user_id,
                "surface": event.surface,
                "items": [item for item, _ in top],
                "scores": [score for _, score in top],
            }
            await redis.set(
                f"rec:{{{event.user_id}}}:{event.surface}",
                msgspec.json.encode(made),
                ex=settings.recommendations_ttl_s,
            )
            on_event()
            done += 1
            if done == limit:
                break
        seconds = time.perf_counter() - started
    finally:
        await consumer.stop()
        await redis.aclose()
    return Timed(done, seconds)
