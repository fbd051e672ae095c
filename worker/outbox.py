"""The shell around Kafka's producer: recommendations and dead letters, acknowledged by all
in-sync replicas before anything is committed.

Records are laid into record batches here, one per partition and write: Faust's and aiokafka's
`send` does more for one record than the rest of the pipeline together (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from aiokafka.errors import (
    KafkaConnectionError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)
from aiokafka.partitioner import murmur2
from faust.transport.drivers import aiokafka as driver

from worker.events import MAX_KEY_BYTES, Rejected, Tombstone
from worker.ranking import Recommendations

log = logging.getLogger(__name__)

#: Largest record batch that is produced, half of Kafka's default `max.message.bytes`; less where a
#: topic takes less, down to the smallest.
LARGEST_BATCH_BYTES = 512 * 1024
SMALLEST_BATCH_BYTES = 8 * 1024
#: Everything of a record batch of one but its value: headers, and a key of `MAX_KEY_BYTES`.
SPARE_BYTES = 4 * 1024
#: Longest explanation in a dead letter, in characters: it may quote what the producer sent.
MAX_DETAIL_LENGTH = 500
#: Keys whose partition is remembered: 220 bytes each, for the 1.4 us that the hash takes.
REMEMBERED_KEYS = 16_384


#: A value made to take at most so many bytes.
Cut = Callable[[bytes, int], bytes]


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A record to be written."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    #: How it may be made smaller where the broker does not take it; None: not at all.
    cut: Cut | None = None


def recommendation_record(topic: str, user_id: str, value: bytes, model_version: str) -> Outgoing:
    """A recommendation list as a record, keyed by user; `value` is JSON as in docs/events.md."""
    return Outgoing(
        topic,
        user_id.encode("utf-8", "surrogatepass"),
        value,
        [("model_version", model_version.encode())],
        shorter_list,
    )


def forgotten_record(topic: str, tombstone: Tombstone) -> Outgoing:
    """A tombstone for the lists of a user who was erased, so that a compacted topic forgets."""
    return Outgoing(
        topic,
        tombstone.user_id.encode("utf-8", "surrogatepass"),
        None,
        _origin(tombstone.topic, tombstone.partition, tombstone.offset, tombstone.record_time_ms),
    )


def dead_letter_record(topic: str, rejected: Rejected) -> Outgoing:
    """A rejected record: its own key and value, untouched unless they are too large, and why in
    the headers."""
    record = rejected.record
    key = record.key
    headers = [
        ("reason", rejected.reason.value.encode()),
        ("detail", rejected.detail[:MAX_DETAIL_LENGTH].encode("utf-8", "replace")),
        *_origin(record.topic, record.partition, record.offset, record.timestamp_ms),
    ]
    if key is not None and len(key) > MAX_KEY_BYTES:
        headers.append(("truncated_key", str(len(key)).encode()))
        key = key[:MAX_KEY_BYTES]
    return Outgoing(topic, key, record.value, headers, _first_bytes)


def _origin(topic: str, partition: int, offset: int, timestamp_ms: int) -> list[tuple[str, bytes]]:
    return [
        ("origin_topic", topic.encode()),
        ("origin_partition", str(partition).encode()),
        ("origin_offset", str(offset).encode()),
        ("origin_timestamp_ms", str(timestamp_ms).encode()),
    ]


def _first_bytes(value: bytes, most_bytes: int) -> bytes:
    return value[:most_bytes]


def shorter_list(value: bytes, most_bytes: int) -> bytes:
    """A published list with as many of its first items as take at most `most_bytes`."""
    recommendations = _DECODE_LIST(value)
    count = len(recommendations.items)
    while len(value) > most_bytes and count:
        # By the items' mean size; then on, if those that are left are longer ones.
        count = count * most_bytes // len(value)
        recommendations = msgspec.structs.replace(
            recommendations,
            items=recommendations.items[:count],
            scores=recommendations.scores[:count],
        )
        value = _ENCODE(recommendations)
    return value


_DECODE_LIST = msgspec.json.Decoder(Recommendations).decode
_ENCODE = msgspec.json.Encoder().encode


def fitted(record: Outgoing, batch_bytes: int) -> Outgoing:
    """`record` so that a record batch of `batch_bytes` holds it: itself, or with a value that is
    cut and a header `truncated` that tells how many bytes it had.

    Raises:
        MessageSizeTooLargeError: it is too large, and may not be cut.
    """
    value, most_bytes = record.value, batch_bytes - SPARE_BYTES
    if value is None or len(value) <= most_bytes:
        return record
    if record.cut is None:
        raise MessageSizeTooLargeError(
            f"a record of {len(value)} bytes; {record.topic} takes about {batch_bytes}"
        )
    return Outgoing(
        record.topic,
        record.key,
        record.cut(value, most_bytes),
        [*record.headers, ("truncated", str(len(value)).encode())],
        record.cut,
    )


#: What says that a record batch is larger than the topic takes.
_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


class BatchProducer(driver.Producer):
    """Faust's aiokafka producer, by the batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Largest record batch by topic, where that is less than `LARGEST_BATCH_BYTES`.
        self._limits: dict[str, int] = {}

    async def send_all(self, records: Sequence[Outgoing]) -> None:
        """Write `records`; returns once every one is acknowledged.

        Records of one key go to one partition, chosen as Kafka's own clients do (murmur2). What a
        topic takes is found out by trying: where the broker finds a record batch too large, all
        records of that topic are written again, so that their order holds, in smaller ones, and
        those that fit none are cut.

        Raises:
            Exception: whatever the producer raises for the first that failed. Some may have been
                written.
        """
        while records:
            refused = await self._send(records)
            for topic in refused:
                self._limits[topic] = self._limit(topic) // 2
                log.warning(
                    "topic_takes_less topic=%s; record batches have at most %d bytes from now on",
                    topic, self._limits[topic],
                )  # fmt: skip
            records = [record for record in records if record.topic in refused]

    def _limit(self, topic: str) -> int:
        return self._limits.get(topic, LARGEST_BATCH_BYTES)

    async def _send(self, records: Sequence[Outgoing]) -> set[str]:
        """One attempt; returns topics that take less than was tried."""
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
        topics: list[str] = []
        pending: list[Awaitable[Any]] = []
        cut: Counter[str] = Counter()
        for (topic, partition), own in by_place.items():
            limit = self._limit(topic)
            builder = producer.create_batch()
            for record in own:
                fitting = fitted(record, limit)
                cut[topic] += fitting is not record
                if not _append(builder, fitting, now_ms, limit):
                    topics.append(topic)
                    pending.append(await producer.send_batch(builder, topic, partition=partition))
                    builder = producer.create_batch()
                    _append(builder, fitting, now_ms, limit)
            builder.close()
            topics.append(topic)
            pending.append(await producer.send_batch(builder, topic, partition=partition))
        refused = set()
        results = await asyncio.gather(*pending, return_exceptions=True)
        for topic, result in zip(topics, results, strict=True):
            if isinstance(result, _TOO_LARGE) and self._limit(topic) > SMALLEST_BATCH_BYTES:
                refused.add(topic)
            elif isinstance(result, BaseException):
                raise result
        for topic, count in cut.items():
            if count and topic not in refused:
                self.transport.metrics.truncated.labels(topic).inc(count)
        return refused

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


def _append(builder: Any, record: Outgoing, now_ms: int, limit: int) -> bool:
    """Add a record to a record batch; False where it is full. The first one always fits."""
    if limit < LARGEST_BATCH_BYTES and builder.record_count():
        size = builder.size() + SPARE_BYTES + len(record.value or b"")
        if size > limit:
            return False
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
