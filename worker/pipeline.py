"""The loop around the steps.

    one fetch -> micro-batch -> processor, in its thread -> output topic, dead letters -> finish

While a micro-batch is published the next is processed. Both take micro-batches in order, so a
user's events keep theirs. Only what is finished may be committed. What Redis does not take yet is
published, and finished once it is in Redis.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from aiokafka.errors import KafkaError
from faust.exceptions import ProducerSendError

from worker.cache import Partition
from worker.intake import RecordBatch
from worker.metrics import Metrics
from worker.outbox import (
    Outbox,
    Outgoing,
    dead_letter_record,
    forgotten_record,
    recommendation_record,
)
from worker.processor import Made, Processor
from worker.retry import until_it_works
from worker.settings import Settings

log = logging.getLogger(__name__)

#: Shortest time in seconds between two looks whether Redis is back, where no events come in.
ASK_AGAIN_S = 0.05
#: What a lost or failing Kafka raises from a producer.
KAFKA_FAILURES = (KafkaError, ProducerSendError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Processed:
    """A micro-batch whose effects are in Redis, or are held back for it."""

    batches: Sequence[RecordBatch]
    made: Made


class Pipeline:
    """Takes micro-batches through the processor and publishes what it made. One per worker.

    Args:
        on_rewind: has partitions read again from these offsets; drops what is in flight.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        processor: Processor,
        outbox: Outbox,
        metrics: Metrics,
        on_rewind: Callable[[Mapping[Partition, int]], None],
    ) -> None:
        self._on_rewind = on_rewind
        self._settings = settings
        self._processor = processor
        self._outbox = outbox
        self._metrics = metrics
        # Bounded by the intake, which reads no more while too many events are in flight.
        self._incoming: asyncio.Queue[Sequence[RecordBatch]] = asyncio.Queue()
        self._processed: asyncio.Queue[Processed] = asyncio.Queue()  # likewise
        #: Set while there is nothing to process; the intake clears it when it has brought more.
        self.demand = asyncio.Event()

    @property
    def waits_for_redis(self) -> bool:
        """Whether Redis was away when it was asked last."""
        return self._processor.waits_for_redis

    async def put(self, batches: Sequence[RecordBatch]) -> None:
        """Hand in a micro-batch."""
        await self._incoming.put(batches)

    async def run(self) -> None:
        """Both stages, until cancelled. An exception here is a defect: the process must restart."""
        # One thread for all batches: its caches stay warm, and what it allocates comes back to it.
        with ThreadPoolExecutor(1, "streamrec-processor") as thread:
            async with asyncio.TaskGroup() as stages:
                stages.create_task(self._process_stage(thread))
                stages.create_task(self._publish_stage())

    async def _process_stage(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._incoming.empty():
                self.demand.set()
            fetched = await self._next()
            batches = [batch for batch in fetched if batch.start()]
            if fetched and not batches:
                continue
            records = [batch.records for batch in batches]
            made = await loop.run_in_executor(thread, self._processor.process, records)
            if made.rewind:
                # All that is in flight, these batches included, is read again.
                self._on_rewind(made.rewind)
                continue
            if not made.durable:
                self._processed.put_nowait(Processed(batches, made))
                continue
            now, now_s = time.monotonic(), time.time()
            for batch in batches:
                count, oldest_s = len(batch.records), batch.oldest_s
                self._metrics.cached_seconds.observe(now - batch.read_at, count)
                if oldest_s is not None:
                    self._metrics.freshness_seconds.observe(max(0.0, now_s - oldest_s), count)
            self._processed.put_nowait(Processed(batches, made))

    async def _next(self) -> Sequence[RecordBatch]:
        """The next micro-batch; an empty one where it is time to ask Redis again."""
        if not self._processor.waits_for_redis:
            return await self._incoming.get()
        with suppress(TimeoutError):
            return await asyncio.wait_for(
                self._incoming.get(), max(ASK_AGAIN_S, self._processor.retry_in_s)
            )
        return []

    async def _publish_stage(self) -> None:
        first_read_at = float("inf")
        #: Published, but their effects are not in Redis yet.
        held: list[RecordBatch] = []
        while True:
            # Together, since a broker does as much for a small request as for a large one. Those
            # who ask Redis have their lists already.
            processed = [await self._processed.get()]
            await asyncio.sleep(self._settings.publish_linger_ms / 1000.0)
            while not self._processed.empty():
                processed.append(self._processed.get_nowait())
            await self._publish([one.made for one in processed])
            now = time.monotonic()
            durable: list[RecordBatch] = []
            for one in processed:
                held += one.batches
                if one.made.durable:
                    durable += held
                    held = []
            first_read_at = min([first_read_at, *(batch.read_at for batch in durable[:1])])
            if durable:
                self._metrics.busy_seconds.set(now - first_read_at)
            for batch in durable:
                batch.finish()
                self._metrics.event_seconds.observe(now - batch.read_at, len(batch.records))

    def _records(self, made: Made) -> list[Outgoing]:
        """What is published for users: those erased first, since their lists were made after."""
        topic = self._settings.recommendations_topic
        records = [forgotten_record(topic, one) for one in made.forgotten]
        records += [
            recommendation_record(topic, one.user_id, value, one.model_version)
            for one, value in made.lists
        ]
        return records

    async def _publish(self, made: Sequence[Made]) -> None:
        """Write lists, tombstones and dead letters to Kafka, however long that takes."""
        metrics, settings = self._metrics, self._settings
        lists = [pair for one in made for pair in one.lists]
        rejected = [letter for one in made for letter in one.rejected]
        with metrics.stage_seconds.labels("publish").time():
            outgoing = [dead_letter_record(settings.dead_letter_topic, one) for one in rejected]
            for one in made:
                outgoing += self._records(one)
            await until_it_works(
                lambda: self._outbox.send(outgoing),
                name="produce",
                failures=KAFKA_FAILURES,
                on_failure=metrics.produce_errors.inc,
            )
        for letter in rejected:
            metrics.dead_letters.labels(letter.reason.value).inc()
            log.warning(
                "dead_letter reason=%s topic=%s partition=%d offset=%d",
                letter.reason.value,
                letter.record.topic,
                letter.record.partition,
                letter.record.offset,
            )
        counts = Counter(
            (one.surface, one.source, one.model_version, len(one.items) < settings.top_k)
            for one, _ in lists
        )
        for (surface, source, version, short), count in counts.items():
            metrics.recommendations.labels(surface.value, source, version).inc(count)
            if short:
                metrics.short_recommendations.labels(surface.value).inc(count)
