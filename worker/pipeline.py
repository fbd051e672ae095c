"""The loop that joins the steps; the only module that knows their order.

    record batches -> micro-batch -> decode -> histories -> score -> rank
                   -> Redis, output topic, dead letters -> finish (offsets may be committed)

Three stages run side by side: while one micro-batch is published, the next is written to Redis and
the one after is computed. Each stage takes micro-batches in order, so a user's events keep theirs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from aiokafka.errors import KafkaError
from faust.exceptions import ProducerSendError

from worker.bundle import Bundle
from worker.cache import REDIS_FAILURES, Cache, PartitionKey, UserKey, encode
from worker.cold_items import ColdIndex, ColdItems
from worker.events import Decoder, Event, EventBatch, Reason, Rejected, Surface
from worker.histories import Histories
from worker.history import History
from worker.intake import RecordBatch
from worker.metrics import Metrics
from worker.models import Models
from worker.outbox import Outbox, dead_letter_record, recommendation_record
from worker.popularity import PopularityTable, most_popular
from worker.ranking import Origin, Recommendations
from worker.recommender import Ranked, Recommender
from worker.retry import until_it_works
from worker.rules import Rules
from worker.settings import Settings
from worker.text import MAX_TEXT_CHARS

log = logging.getLogger(__name__)

#: What a lost or failing Kafka raises from a producer.
KAFKA_FAILURES = (KafkaError, ProducerSendError, OSError, TimeoutError)

FALLBACK_VERSION = "popularity"
#: Candidates of the fallback are found anew after this many seconds at most.
POPULAR_REFRESH_S = 1.0
#: Cold items of other workers are asked for again this far back: their clocks may be behind.
CLOCK_SKEW_S = 60.0


@dataclass(slots=True)
class Touched:
    """What a micro-batch did to one user on one surface."""

    history: History
    #: The newest event that was applied.
    event: Event


@dataclass(slots=True)
class Effects:
    """All that a micro-batch changes outside this process."""

    batches: Sequence[RecordBatch]
    histories: dict[UserKey, bytes] = field(default_factory=dict)
    recommendations: dict[UserKey, Recommendations] = field(default_factory=dict)
    popularity: dict[PartitionKey, PopularityTable] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    #: Text by item of the cold items that were seen first in this batch.
    cold_items: dict[Surface, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written:
    """A micro-batch whose effects are in Redis."""

    effects: Effects
    #: Its recommendations as JSON.
    lists: dict[UserKey, bytes]


class Pipeline:
    """Turns record batches into recommendations. One per worker."""

    def __init__(
        self,
        settings: Settings,
        *,
        cache: Cache,
        outbox: Outbox,
        models: Models,
        rules: Rules,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._outbox = outbox
        self._models = models
        self._metrics = metrics
        self._decoder = Decoder(
            max_bytes=settings.event_max_bytes,
            max_future_ms=int(settings.event_max_future_s * 1000),
            require_user_key=settings.require_user_key,
        )
        self._recommenders = {
            surface: Recommender(surface, rules, top_k=settings.top_k) for surface in Surface
        }
        self._histories = Histories(
            self._read_histories,
            length=settings.history_length,
            max_bytes=settings.history_cache_mb * 1e6,
            metrics=metrics,
        )
        self._popularity: dict[PartitionKey, PopularityTable] = {}
        self._popular: dict[Surface, tuple[float, list[tuple[str, float]]]] = {}
        self._cold = {
            surface: ColdItems(
                max_items=settings.cold_items_max, ttl_s=float(settings.cold_items_ttl_s)
            )
            for surface in Surface
        }
        # Bounded by the intake, which reads no more while too many events are in flight.
        self._incoming: asyncio.Queue[RecordBatch] = asyncio.Queue()
        #: Set while there is nothing to compute.
        self.demand = asyncio.Event()
        self._computed: asyncio.Queue[Effects] = asyncio.Queue(maxsize=1)
        self._cached: asyncio.Queue[Written] = asyncio.Queue()  # bounded likewise
        self._generation = 0

    # -- the three stages

    async def put(self, batch: RecordBatch) -> None:
        """Hand in a record batch."""
        await self._incoming.put(batch)

    async def run(self) -> None:
        """All stages, until cancelled. An exception here is a defect: the process must restart."""
        async with asyncio.TaskGroup() as stages:
            stages.create_task(self._compute_stage())
            stages.create_task(self._cache_stage())
            stages.create_task(self._publish_stage())
            if self._settings.cold_items_max:
                stages.create_task(self._share_cold_items())

    def forget(self) -> None:
        """The partitions were taken away: another worker may change their users from now on."""
        self._generation += 1
        self._histories.clear()
        self._popularity.clear()
        self._popular.clear()

    async def _compute_stage(self) -> None:
        while True:
            batches = await self._collect()
            started = [batch for batch in batches if batch.start()]
            if not started:
                continue
            await self._computed.put(await self.compute(started))

    async def _collect(self) -> list[RecordBatch]:
        """Record batches for one micro-batch: all that wait, within its bounds."""
        self.demand.set()
        first = await self._incoming.get()
        collected, events = [first], len(first.records)
        deadline = time.monotonic() + self._settings.batch_max_wait_ms / 1000.0
        while events < self._settings.batch_max_events:
            wait_s = deadline - time.monotonic()
            try:
                batch = (
                    self._incoming.get_nowait()
                    if wait_s <= 0
                    else await asyncio.wait_for(self._incoming.get(), wait_s)
                )
            except (TimeoutError, asyncio.QueueEmpty):
                break
            collected.append(batch)
            events += len(batch.records)
        self.demand.clear()
        return collected

    async def _cache_stage(self) -> None:
        while True:
            effects = await self._computed.get()
            lists = await self.cache(effects)
            now = time.monotonic()
            for batch in effects.batches:
                self._metrics.cached_seconds.observe(now - batch.read_at, len(batch.records))
            self._cached.put_nowait(Written(effects, lists))

    async def _publish_stage(self) -> None:
        first_read_at = float("inf")
        while True:
            # Together, since a broker does as much for a small request as for a large one. Those
            # who ask Redis have their lists already.
            written = [await self._cached.get()]
            await asyncio.sleep(self._settings.publish_linger_ms / 1000.0)
            while not self._cached.empty():
                written.append(self._cached.get_nowait())
            await self.publish(written)
            now = time.monotonic()
            batches = [batch for one in written for batch in one.effects.batches]
            first_read_at = min(first_read_at, batches[0].read_at)
            self._metrics.busy_seconds.set(now - first_read_at)
            for batch in batches:
                batch.finish()
                self._metrics.event_seconds.observe(now - batch.read_at, len(batch.records))

    async def _share_cold_items(self) -> None:
        """Take in the cold items that other workers saw, and those from before a restart."""
        since_s = dict.fromkeys(self._cold, 0.0)
        while True:
            now_s = time.time()
            try:
                for surface, cold in self._cold.items():
                    cold.expire(now_s)
                    bundle = self._models.serving(surface)
                    if bundle is None or bundle.text is None:
                        continue
                    for found in await self._cache.read_cold_items(surface, since_s[surface]):
                        cold.note(*found)
                    since_s[surface] = now_s - CLOCK_SKEW_S
            except REDIS_FAILURES as error:
                self._metrics.redis_errors.labels("read_cold_items").inc()
                log.warning("cold_items_unread error=%r", error)
            await asyncio.sleep(self._settings.cold_items_poll_s)

    # -- computing

    async def compute(self, batches: Sequence[RecordBatch]) -> Effects:
        """Everything up to the effects: decode, histories, score, rank."""
        generation = self._generation
        effects = Effects(batches)
        with self._stage("decode"):
            now_ms = int(time.time() * 1000)
            decoded = [self._decoder.decode(batch.records, now_ms=now_ms) for batch in batches]
        self._metrics.batch_events.observe(sum(len(batch.records) for batch in batches))
        with self._stage("history"):
            touched = await self._apply(decoded, effects)
        for surface, users in _by_surface(touched).items():
            await self._recommend(surface, users, effects)
        with self._stage("history"):
            if generation == self._generation:
                effects.histories = self._histories.changed(touched)
            else:
                # A rebalance came in between. The batch is read again by whoever owns it now, and
                # writing its effects could undo what that worker has written.
                effects.recommendations.clear()
                effects.popularity.clear()
                effects.rejected.clear()
        return effects

    async def _apply(
        self, decoded: Sequence[EventBatch], effects: Effects
    ) -> dict[UserKey, Touched]:
        """Apply events to histories and popularity; returns what they touched."""
        keys = [
            [UserKey(event.user_id, event.surface) for event in batch.events] for batch in decoded
        ]
        histories = await self._histories.load(key for own in keys for key in own)
        touched: dict[UserKey, Touched] = {}
        outcomes: Counter[tuple[Surface, str, str]] = Counter()
        for batch, own in zip(decoded, keys, strict=True):
            effects.rejected += batch.rejected
            counted: dict[Surface, list[Event]] = {}
            for event, key in zip(batch.events, own, strict=True):
                history = histories[key]
                try:
                    outcome: str = history.apply(event)
                except Exception as error:
                    # One event must never stop the stream.
                    log.exception("event_failed surface=%s", event.surface.value)
                    outcome = "failed"
                    effects.rejected.append(_failed(batch, event, error))
                else:
                    # A repeat is written again too: its first effects may never have arrived.
                    touched[key] = Touched(history, event)
                    counted.setdefault(event.surface, []).append(event)
                    if event.text:
                        self._note_text(event, event.text, effects)
                outcomes[event.surface, event.event_type, outcome] += 1
            for surface, events in counted.items():
                place = PartitionKey(surface, batch.records.topic, batch.records.partition)
                (await self._table(place)).add(events)
        for labels, count in outcomes.items():
            self._metrics.events.labels(*labels).inc(count)
        for place, table in self._popularity.items():
            if table.changed or table.removed:
                effects.popularity[place] = table.copy_changes()
        return touched

    def _note_text(self, event: Event, text: str, effects: Effects) -> None:
        """Keep the text of an item that the serving model does not know."""
        bundle = self._models.serving(event.surface)
        if bundle is None or bundle.text is None or event.item_id in bundle.index:
            return
        if self._cold[event.surface].note(event.item_id, text, time.time()):
            effects.cold_items.setdefault(event.surface, {})[event.item_id] = text[:MAX_TEXT_CHARS]

    async def _cold_index(self, surface: Surface, bundle: Bundle) -> ColdIndex | None:
        """Cold items with a vector of `bundle`; None where there are none."""
        cold = self._cold[surface]
        if bundle.text is None or not len(cold):
            return None
        texts = cold.without_vector(bundle)
        if texts:
            try:
                vectors = await asyncio.to_thread(bundle.text.encode, list(texts.values()))
            except Exception:
                log.exception("text_failed version=%s", bundle.manifest.version)
                self._metrics.inference_errors.labels(surface.value).inc()
                return None
            cold.add_vectors(list(texts), vectors)
        self._metrics.cold_items.labels(surface.value).set(
            0 if cold.index is None else len(cold.index)
        )
        return cold.index

    async def _table(self, place: PartitionKey) -> PopularityTable:
        table = self._popularity.get(place)
        if table is None:
            fresh = table = PopularityTable(
                half_life_ms=int(self._settings.popularity_half_life_s * 1000),
                max_items=self._settings.popularity_max_items,
            )
            await until_it_works(
                lambda: self._cache.read_popularity(place, fresh),
                name="read_popularity",
                failures=REDIS_FAILURES,
                on_failure=self._metrics.redis_errors.labels("read_popularity").inc,
            )
            self._popularity[place] = table
        return table

    async def _recommend(
        self, surface: Surface, users: dict[UserKey, Touched], effects: Effects
    ) -> None:
        """Lists for `users`, all of one surface: by the model where it can, else by popularity."""
        recommender = self._recommenders[surface]
        names = [key.user_id for key in users]
        histories = [one.history for one in users.values()]
        # Taken once: a swap in the middle must not mix two versions' item indexes.
        bundle = self._models.serving(surface)
        ranked: dict[int, Ranked] = {}
        version = FALLBACK_VERSION
        if bundle is not None:
            version = bundle.manifest.reference
            ranked = await self._rank(recommender, surface, bundle, names, histories)
        popular = self._most_popular(surface) if len(ranked) < len(names) else []
        now_ms = int(time.time() * 1000)
        with self._stage("filter"):
            for at, (key, one) in enumerate(users.items()):
                by_model = at in ranked
                items, scores = (
                    ranked[at]
                    if by_model
                    else recommender.popular(key.user_id, one.history, popular)
                )
                event = one.event
                effects.recommendations[key] = Recommendations(
                    user_id=key.user_id,
                    surface=surface,
                    items=items,
                    scores=scores,
                    model_version=version if by_model else FALLBACK_VERSION,
                    source="model" if by_model else "fallback",
                    generated_at_ms=now_ms,
                    origin=Origin(event.topic, event.partition, event.offset),
                )

    async def _rank(
        self,
        recommender: Recommender,
        surface: Surface,
        bundle: Bundle,
        users: Sequence[str],
        histories: Sequence[History],
    ) -> dict[int, Ranked]:
        """Lists by place in `users`, for those that the model can score; none where it failed."""
        cold = await self._cold_index(surface, bundle)
        try:
            lists = await asyncio.to_thread(recommender.rank, bundle, users, histories, cold)
        except Exception:
            log.exception("inference_failed version=%s", bundle.manifest.version)
            self._metrics.inference_errors.labels(surface.value).inc()
            return {}
        stage_seconds = self._metrics.stage_seconds
        stage_seconds.labels("score").observe(lists.score_s)
        stage_seconds.labels("filter").observe(lists.filter_s)
        if cold is not None:
            self._metrics.cold_recommended.labels(surface.value).inc(
                sum(
                    item not in bundle.index for items, _ in lists.ranked.values() for item in items
                )
            )
        return lists.ranked

    def _most_popular(self, surface: Surface) -> list[tuple[str, float]]:
        """Candidates of the fallback: enough to fill a list after the longest history."""
        known = self._popular.get(surface)
        now = time.monotonic()
        if known is None or now - known[0] > POPULAR_REFRESH_S:
            tables = [
                table.weights
                for place, table in self._popularity.items()
                if place.surface is surface
            ]
            count = self._settings.top_k + 2 * self._settings.history_length
            known = self._popular[surface] = (now, most_popular(tables, count))
        return known[1]

    # -- effects

    async def cache(self, effects: Effects) -> dict[UserKey, bytes]:
        """Write `effects` to Redis, however long that takes; repeating it changes nothing.

        Returns:
            The recommendations as JSON.
        """
        with self._stage("cache"):
            lists = {key: encode(made) for key, made in effects.recommendations.items()}
            await until_it_works(
                lambda: self._cache.write_batch(
                    histories=effects.histories,
                    recommendations=lists,
                    popularity=effects.popularity,
                    cold_items=effects.cold_items,
                ),
                name="write_batch",
                failures=REDIS_FAILURES,
                on_failure=self._metrics.redis_errors.labels("write_batch").inc,
            )
        self._histories.written(effects.histories)
        return lists

    async def publish(self, written: Sequence[Written]) -> None:
        """Write lists and dead letters to Kafka, however long that takes."""
        metrics, settings = self._metrics, self._settings
        made = [one for batch in written for one in batch.effects.recommendations.values()]
        rejected = [one for batch in written for one in batch.effects.rejected]
        with self._stage("publish"):
            values = [value for batch in written for value in batch.lists.values()]
            outgoing = [dead_letter_record(settings.dead_letter_topic, one) for one in rejected]
            outgoing += [
                recommendation_record(
                    settings.recommendations_topic, one.user_id, value, one.model_version
                )
                for one, value in zip(made, values, strict=True)
            ]
            await until_it_works(
                lambda: self._outbox.send(outgoing),
                name="produce",
                failures=KAFKA_FAILURES,
                on_failure=metrics.produce_errors.inc,
            )
        for one in rejected:
            metrics.dead_letters.labels(one.reason.value).inc()
            log.warning(
                "dead_letter reason=%s topic=%s partition=%d offset=%d",
                one.reason.value,
                one.record.topic,
                one.record.partition,
                one.record.offset,
            )
        counts = Counter(
            (one.surface, one.source, one.model_version, len(one.items) < settings.top_k)
            for one in made
        )
        for (surface, source, version, short), count in counts.items():
            metrics.recommendations.labels(surface.value, source, version).inc(count)
            if short:
                metrics.short_recommendations.labels(surface.value).inc(count)

    async def _read_histories(self, keys: Sequence[UserKey]) -> list[bytes | None]:
        return await until_it_works(
            lambda: self._cache.read_histories(keys),
            name="read_histories",
            failures=REDIS_FAILURES,
            on_failure=self._metrics.redis_errors.labels("read_histories").inc,
        )

    def _stage(self, name: str) -> AbstractContextManager[object]:
        return self._metrics.stage_seconds.labels(name).time()


def _by_surface(touched: dict[UserKey, Touched]) -> dict[Surface, dict[UserKey, Touched]]:
    grouped: dict[Surface, dict[UserKey, Touched]] = {}
    for key, one in touched.items():
        grouped.setdefault(key.surface, {})[key] = one
    return grouped


def _failed(batch: EventBatch, event: Event, error: Exception) -> Rejected:
    row = batch.records.offsets.index(event.offset)
    return Rejected(batch.records.at(row), Reason.PROCESSING_FAILED, repr(error))
