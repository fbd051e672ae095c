"""The shell around Kafka's producer: recommendations and dead letters, acknowledged by all
in-sync replicas before anything is committed.

Records are laid into record batches here, one per partition and write: Faust's and aiokafka's
`send` does more for one record than the rest of the pipeline together (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError
from aiokafka.partitioner import murmur2
from faust.transport.drivers import aiokafka as driver

from worker.events import Rejected

#: Longest explanation in a dead letter, in characters: it may quote what the producer sent.
MAX_DETAIL_LENGTH = 500
#: Keys whose partition is remembered; the hash is computed in Python.
REMEMBERED_KEYS = 65_536


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A record to be written."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


def recommendation_record(topic: str, user_id: str, value: bytes, model_version: str) -> Outgoing:
    """A recommendation list as a record, keyed by user; `value` is JSON as in docs/events.md."""
    return Outgoing(
        topic,
        user_id.encode("utf-8", "surrogatepass"),
        value,
        [("model_version", model_version.encode())],
    )


def dead_letter_record(topic: str, rejected: Rejected) -> Outgoing:
    """A rejected record: its own key and value, untouched, and why in the headers."""
    record = rejected.record
    return Outgoing(
        topic,
        record.key,
        record.value,
        [
            ("reason", rejected.reason.value.encode()),
            ("detail", rejected.detail[:MAX_DETAIL_LENGTH].encode("utf-8", "replace")),
            ("origin_topic", record.topic.encode()),
            ("origin_partition", str(record.partition).encode()),
            ("origin_offset", str(record.offset).encode()),
            ("origin_timestamp_ms", str(record.timestamp_ms).encode()),
        ],
    )


class BatchProducer(driver.Producer):
    """Faust's aiokafka producer, by the batch."""

    async def send_all(self, records: Sequence[Outgoing]) -> None:
        """Write `records`; returns once every one is acknowledged.

        Records of one key go to one partition, chosen as Kafka's own clients do (murmur2).

        Raises:
            Exception: whatever the producer raises for the first that failed. Some may have been
                written.
        """
        producer = self._ensure_producer()
        by_place: dict[tuple[str, int], list[Outgoing]] = {}
        counts: dict[str, int] = {}
        for record in records:
            topic = record.topic
            if topic not in counts:
                counts[topic] = len(await _partitions(producer, topic))
            place = topic, partition_of(record.key, counts[topic])
            by_place.setdefault(place, []).append(record)
        now_ms = int(time.time() * 1000)
        pending: list[Awaitable[Any]] = []
        for (topic, partition), own in by_place.items():
            builder = producer.create_batch()
            for record in own:
                if not _append(builder, record, now_ms):
                    pending.append(await producer.send_batch(builder, topic, partition=partition))
                    builder = producer.create_batch()
                    if not _append(builder, record, now_ms):
                        raise MessageSizeTooLargeError(f"a record for {topic} fits no batch")
            builder.close()
            pending.append(await producer.send_batch(builder, topic, partition=partition))
        for result in await asyncio.gather(*pending, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def partitions(self, topic: str) -> set[int]:
        """Partitions of a topic.

        Raises:
            KafkaConnectionError: none are known.
        """
        return await _partitions(self._ensure_producer(), topic)


async def _partitions(producer: Any, topic: str) -> set[int]:
    found: set[int] | None = await producer.partitions_for(topic)
    if not found:
        raise KafkaConnectionError(f"no partitions of {topic} are known")
    return found


def _append(builder: Any, record: Outgoing, now_ms: int) -> bool:
    return (
        builder.append(timestamp=now_ms, key=record.key, value=record.value, headers=record.headers)
        is not None
    )


def partition_of(key: bytes | None, count: int) -> int:
    """Partition of a key among `count`, as Kafka's default partitioner has it; any without one."""
    return random.randrange(count) if key is None else _hashed(key) % count


@lru_cache(maxsize=REMEMBERED_KEYS)
def _hashed(key: bytes) -> int:
    return int(murmur2(key)) & 0x7FFFFFFF


class Outbox:
    """Writes records through a `BatchProducer`."""

    def __init__(self, producer: Callable[[], Any]) -> None:
        # Asked for at each use: Faust makes its producer when the app starts.
        self._producer = producer

    async def send(self, records: Sequence[Outgoing]) -> None:
        """Write `records`; returns once every one is acknowledged.

        Raises:
            Exception: as `BatchProducer.send_all`. Writing all of them again is right, since
                consumers drop repeats by their origin.
        """
        if records:
            await self._producer().send_all(records)

    async def partitions(self, topic: str) -> set[int]:
        """Partitions of a topic.

        Raises:
            KafkaConnectionError: none are known.
        """
        found: set[int] = await self._producer().partitions(topic)
        return found
