"""Watches how far a group has committed while a cell runs: recovery times come from its samples."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

_INTERVAL_S = 0.1
_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a group stood after a time (`time.monotonic()`), by partition."""

    at: float
    committed: Mapping[int, int]
    ends: Mapping[int, int]

    @property
    def lag(self) -> int:
        """Events on the broker and not committed."""
        return sum(self.ends.values()) - sum(self.committed.values())


class Sampler(threading.Thread):
    """Takes samples until it is stopped; goes on trying while the broker is away."""

    def __init__(self, bootstrap: str, group: str, topic: str, partitions: int) -> None:
        super().__init__(name="sampler", daemon=True)
        self.samples: list[Sample] = []
        self._servers = bootstrap
        self._group = group
        self._places = [TopicPartition(topic, number) for number in range(partitions)]
        self._enough = threading.Event()

    def run(self) -> None:
        for name in ("aiokafka", "aiokafka.consumer.group_coordinator"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        while not self._enough.is_set():
            try:
                asyncio.run(self._watch())
            except (KafkaError, OSError, TimeoutError, RuntimeError):
                time.sleep(_INTERVAL_S)

    async def _watch(self) -> None:
        timeout_ms = int(_TIMEOUT_S * 1000)
        consumer = AIOKafkaConsumer(bootstrap_servers=self._servers, request_timeout_ms=timeout_ms)
        admin = AIOKafkaAdminClient(bootstrap_servers=self._servers, request_timeout_ms=timeout_ms)
        try:
            async with asyncio.timeout(2 * _TIMEOUT_S):
                await consumer.start()
                await admin.start()
            while not self._enough.is_set():
                at = time.monotonic()
                async with asyncio.timeout(_TIMEOUT_S):
                    found = await admin.list_consumer_group_offsets(self._group)
                    ends = await consumer.end_offsets(self._places)
                committed = {tp.partition: one.offset for tp, one in found.items()}
                self.samples.append(
                    Sample(at, committed, {tp.partition: ends[tp] for tp in self._places})
                )
                await asyncio.sleep(_INTERVAL_S)
        finally:
            await asyncio.gather(consumer.stop(), admin.close(), return_exceptions=True)

    @property
    def last(self) -> Sample | None:
        """The newest sample; None before the first."""
        return self.samples[-1] if self.samples else None

    def stop(self) -> None:
        """End."""
        self._enough.set()
        if self.is_alive():
            self.join(30)


def recovered_at(samples: Sequence[Sample], since: float) -> float | None:
    """When all that was sent by `since` was committed; None where it was not.

    Times are `time.monotonic()`.
    """
    target: Mapping[int, int] | None = None
    for sample in samples:
        if sample.at < since:
            continue
        if target is None:
            target = sample.ends
        if all(sample.committed.get(place, 0) >= end for place, end in target.items()):
            return sample.at
    return None


def longest_gap_s(samples: Sequence[Sample]) -> float:
    """Longest time without any commit while events waited, in seconds.

    There are no samples while the broker is away; that time counts.
    """
    longest, moved_at = 0.0, 0.0
    before: Sample | None = None
    for sample in samples:
        if before is None or sample.lag <= 0:
            moved_at = sample.at
        else:
            longest = max(longest, sample.at - moved_at)
            if sample.committed != before.committed:
                moved_at = sample.at
        before = sample
    return longest
