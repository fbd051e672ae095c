"""The shell around Kafka's producer: recommendations and dead letters, acknowledged by all
in-sync replicas before anything is committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from worker.events import Rejected
from worker.ranking import Recommendations

_ENCODE = msgspec.json.Encoder().encode
#: Longest explanation in a dead letter, in characters: it may quote what the producer sent.
MAX_DETAIL_LENGTH = 500


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be written."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


def recommendation_record(topic: str, recommendations: Recommendations) -> Outgoing:
    """A recommendation list as a record, keyed by user; JSON as in docs/events.md."""
    return Outgoing(
        topic,
        recommendations.user_id.encode("utf-8", "surrogatepass"),
        _ENCODE(recommendations),
        [("model_version", recommendations.model_version.encode())],
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


class Outbox:
    """Writes records through a Faust producer and waits until the broker has them."""

    def __init__(self, producer: Callable[[], Any]) -> None:
        # Asked for at each use: Faust makes its producer when the app starts.
        self._producer = producer

    async def send(self, records: Sequence[Outgoing]) -> None:
        """Write `records`; returns once every one is acknowledged.

        Raises:
            Exception: whatever the producer raises for the first that failed. Some may have been
                written; writing all of them again is right, since consumers drop repeats by
                their origin.
        """
        producer = self._producer()
        acknowledgements = [
            await producer.send(record.topic, record.key, record.value, None, None, record.headers)
            for record in records
        ]
        results = await asyncio.gather(*acknowledgements, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
