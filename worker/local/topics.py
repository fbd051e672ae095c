"""Read a topic from its beginning to where it ends now, for summaries and checks."""

from __future__ import annotations

from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition


async def read_topic(bootstrap: str, topic: str, *, partitions: int) -> list[Any]:
    """Every record now in `topic`; those of one partition in their order."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await consumer.start()
    try:
        places = [TopicPartition(topic, number) for number in range(partitions)]
        consumer.assign(places)
        await consumer.seek_to_beginning(*places)
        ends = await consumer.end_offsets(places)
        left = {place for place in places if ends[place] > 0}
        found: list[Any] = []
        while left:
            for place, records in (await consumer.getmany(timeout_ms=500)).items():
                found += records
                if records and records[-1].offset + 1 >= ends[place]:
                    left.discard(place)
        return found
    finally:
        await consumer.stop()
