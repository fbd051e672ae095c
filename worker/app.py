"""The Faust app, built from settings: the one place that knows both Faust and the pipeline."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from math import nan
from pathlib import Path
from typing import Any

import faust
import mode
from faust.types import TP
from yarl import URL

from worker.cache import REDIS_FAILURES, Cache
from worker.decider import Decider
from worker.errors import HistoryFormatError
from worker.health import STALLED_EXIT_CODE, Health
from worker.intake import BatchTransport, batch_consumer
from worker.kafka_security import faust_credentials
from worker.logs import place_of
from worker.memory import room
from worker.metrics import Metrics
from worker.models import Models
from worker.outbox import LARGEST_BATCH_BYTES, Outbox
from worker.partition_ages import PartitionAges
from worker.pipeline import KAFKA_FAILURES, Pipeline
from worker.processor import Processor
from worker.registry import open_registry
from worker.release_channel import follow_releases
from worker.releases import Release
from worker.rules import Rules, read_rules
from worker.session import MAX_RUN_ROWS
from worker.settings import Settings
from worker.signing import parse_public_key

log = logging.getLogger(__name__)

#: Seconds between looks at lag, Redis and readiness.
WATCH_INTERVAL_S = 1.0


class StreamrecApp(faust.App):
    """A Faust app with what the worker needs at hand."""

    settings: Settings
    pipeline: Pipeline
    models: Models
    decider: Decider
    metrics: Metrics
    health: Health
    cache: Cache

    async def on_started_init_extra_services(self) -> None:
        """Start the background service once Faust itself is up."""
        await super().on_started_init_extra_services()
        await self.add_runtime_dependency(Background(self))


def create_app(settings: Settings, releases: Iterable[tuple[str, Release]]) -> StreamrecApp:
    """Build the app; connects to nothing yet, except that it loads the models.

    Args:
        releases: those that were pushed before this start, each with its model's name.

    Raises:
        BundleError: a model is missing or broken.
        SettingsError: the rules file is.
    """
    metrics = Metrics()
    metrics.start_at_zero(settings.models_by_surface)
    health = Health(stall_timeout_s=settings.stall_timeout_s)
    metrics.ready.set_function(lambda: float(not health.not_ready()))
    metrics.memory_available_bytes.set_function(lambda: _room_or_nan()[0])
    metrics.memory_limit_bytes.set_function(lambda: _room_or_nan()[1])
    registry = open_registry(settings.registry, settings.registry_mirror_dir)
    budget_mb = settings.model_memory_mb
    models = Models(
        registry,
        settings.models_by_surface,
        inference_threads=settings.inference_threads,
        warmup_batches=(1, MAX_RUN_ROWS),
        shadow_share=settings.shadow_share,
        memory_budget_bytes=None if budget_mb is None else int(budget_mb * 1e6),
        public_keys=[
            parse_public_key(key) for key in settings.public_keys.split(",") if key.strip()
        ],
        metrics=metrics,
    )
    for name, release in releases:
        models.note(name, release)
    models.load_all()
    rules = read_rules(settings.rules) if settings.rules is not None else Rules()
    poll_records = settings.batch_max_events
    app = StreamrecApp(
        settings.group,
        broker=[URL(f"kafka://{address}") for address in settings.kafka.split(",")],
        broker_credentials=faust_credentials(settings),
        autodiscover=False,
        origin="worker",
        # At least once, made idempotent here. Faust's exactly_once does not start (faust#440).
        processing_guarantee="at_least_once",
        stream_wait_empty=True,
        broker_commit_interval=settings.commit_interval_s,
        broker_session_timeout=settings.session_timeout_s,
        broker_heartbeat_interval=settings.session_timeout_s / 10,
        broker_rebalance_timeout=settings.rebalance_timeout_s,
        broker_request_timeout=max(40.0, settings.session_timeout_s + 10.0),
        # Backpressure stops fetching for as long as Redis is down; that must not look like death
        # to Kafka. worker/health.py watches for real stalls.
        broker_max_poll_interval=1800.0,
        broker_max_poll_records=poll_records,
        consumer_group_instance_id=settings.instance_id,
        consumer_auto_offset_reset="earliest",
        producer_acks=-1,
        producer_linger=0.0,
        # Records of one partition and write go as one batch, well below a broker's usual bound.
        producer_max_batch_size=LARGEST_BATCH_BYTES,
        producer_request_timeout=30.0,
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        # Faust makes it and writes nothing there; the working directory may be read-only.
        datadir=Path(tempfile.gettempdir()) / "streamrec-faust",
        worker_redirect_stdouts=False,
    )
    app.settings = settings
    app.metrics, app.health, app.models = metrics, health, models
    app.cache = cache = Cache.from_settings(settings)
    # The transport bounds what is in flight, in events; a fetch has at least one.
    room = settings.max_in_flight_events + poll_records
    channel = app.channel(value_type=list, maxsize=room)

    def on_change(assigned: frozenset[TP] | None) -> None:
        own = [tp for tp in assigned or () if tp.topic == settings.events_topic]
        health.assigned = None if assigned is None else len(own)
        metrics.assigned_partitions.set(len(own))
        for gauge in (metrics.consumer_lag, metrics.lag_seconds, metrics.commit_age_seconds):
            gauge.clear()
        if assigned:
            metrics.rebalances.inc()
        processor.forget()

    processor = Processor(settings, cache=cache, models=models, rules=rules, metrics=metrics)
    outbox = Outbox(lambda: app.producer)
    app.pipeline = pipeline = Pipeline(
        settings,
        processor=processor,
        outbox=outbox,
        metrics=metrics,
        on_rewind=lambda offsets: batch_consumer(app).rewind(
            {TP(*partition): offset for partition, offset in offsets.items()}
        ),
    )
    app.decider = Decider(
        settings,
        models=models,
        registry=registry,
        cache=cache,
        outbox=outbox,
        metrics=metrics,
        kafka_failures=KAFKA_FAILURES,
    )
    app.transport = BatchTransport(
        app.conf.broker,
        app,
        batches=channel,
        demand=pipeline.demand,
        min_interval_s=settings.batch_interval_ms / 1000.0,
        fetch_wait_ms=settings.fetch_wait_ms,
        max_in_flight_events=settings.max_in_flight_events,
        shutdown_timeout_s=settings.shutdown_timeout_s,
        metrics=metrics,
        on_change=on_change,
    )
    # Subscribes to the topic. No agent reads it event by event: the transport hands its record
    # batches to the channel.
    app.topics.add(
        app.topic(settings.events_topic, key_type=bytes, value_type=bytes, value_serializer="raw")
    )

    @app.agent(channel, name="streamrec.pipeline")
    async def hand_over(batches: Any) -> None:
        async for fetched in batches:
            await pipeline.put(fetched)

    return app


class Background(mode.Service):
    """What runs beside the stream: the pipeline's stages, the model refresh, the watch.

    A child of the app, so that it outlives the drain at a stop.
    """

    def __init__(self, app: StreamrecApp) -> None:
        super().__init__()
        self._app = app
        self._settings = app.settings
        self._ages: PartitionAges[TP] = PartitionAges()

    @mode.Service.task
    async def _run_pipeline(self) -> None:
        try:
            await self._app.pipeline.run()
        except Exception as error:
            # At once: a drain would wait for the very batch that failed. Nothing is lost, since
            # what is not committed is read again.
            failed = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            log.critical(
                "pipeline_failed error=%s%s; the process exits and starts from committed offsets",
                place_of(failed),
                # Says what to do, and nothing of any user.
                f" ({failed})" if isinstance(failed, HistoryFormatError) else "",
            )
            os._exit(STALLED_EXIT_CODE)

    @mode.Service.task
    async def _refresh_models(self) -> None:
        models = self._app.models
        while not self.should_stop:
            with suppress(TimeoutError):
                await asyncio.wait_for(models.pushed.wait(), self._settings.registry_poll_s)
            try:
                await models.refresh()
            except Exception:
                log.exception("model_refresh_failed")

    @mode.Service.task
    async def _follow_releases(self) -> None:
        if self._settings.releases_topic:
            await follow_releases(self._settings, self._app.models.note)

    @mode.Service.task
    async def _decide(self) -> None:
        first = TP(self._settings.events_topic, 0)
        while not self.should_stop:
            await self.sleep(self._settings.gate_interval_s)
            try:
                if first in batch_consumer(self._app).assignment():
                    await self._app.decider.look()
                else:
                    self._app.decider.rest()
            except Exception:
                log.exception("decision_failed")

    @mode.Service.task
    async def _beat(self) -> None:
        self._app.health.started = True
        while not self.should_stop:
            self._app.health.beat_at = time.monotonic()
            await self.sleep(WATCH_INTERVAL_S / 2)

    @mode.Service.task
    async def _watch(self) -> None:
        health = self._app.health
        while not self.should_stop:
            health.models_ready = self._app.models.ready
            self._app.metrics.degraded.labels("model").set(not health.models_ready)
            answered = health.redis_ready
            try:
                await asyncio.to_thread(self._app.cache.ping)
                # One that is full answers, and takes nothing.
                health.redis_ready = not self._app.pipeline.waits_for_redis
            except REDIS_FAILURES:
                health.redis_ready = False
            if health.redis_ready and not answered:
                # It may have come back with less than it had.
                await self._app.pipeline.put([])
            health.kafka_answers = kafka_answers = await self._watch_partitions()
            up = self._app.metrics.dependency_up
            up.labels("redis").set(health.redis_ready)
            up.labels("kafka").set(kafka_answers)
            # A restart brings neither back; the worker holds on to what it has read and retries.
            health.wait_for(
                "Redis" if not health.redis_ready else None if kafka_answers else "Kafka"
            )
            await self.sleep(WATCH_INTERVAL_S)

    async def _watch_partitions(self) -> bool:
        """Measure lag and commit age; False where Kafka does not answer."""
        app, health = self._app, self._app.health
        if not health.assigned or app.rebalancing:
            health.progress_at = time.monotonic()
            return True
        consumer = batch_consumer(app)
        assigned = [tp for tp in consumer.assignment() if tp.topic == self._settings.events_topic]
        try:
            # The broker's own answer: a consumer that has stopped fetching knows no newer one.
            ends = await asyncio.wait_for(consumer.highwaters(*assigned), 5.0)
            positions = {
                tp: await asyncio.wait_for(consumer.position(tp), 5.0) or 0 for tp in assigned
            }
        except Exception as error:  # the group may have moved on in between
            log.warning("offsets_unknown error=%r", error)
            return False
        if app.rebalancing:
            return True
        now, unread = time.monotonic(), 0
        self._ages.keep(assigned)
        for tp in consumer.assignment() & set(assigned):
            consumer.end_offsets[tp] = ends[tp]
            unread += max(0, ends[tp] - positions[tp])
            self._export_partition(tp, ends[tp], positions[tp], now)
        app.metrics.in_flight.set(consumer.tracker.in_flight)
        health.progress_at = consumer.progress_at
        # Unread events count as waiting only while nothing is in flight: under backpressure they
        # are expected, and what is in flight is watched itself.
        health.waiting_events = consumer.tracker.in_flight or unread
        if not health.waiting_events:
            consumer.progress_at = now
        return True

    def _export_partition(self, tp: TP, end: int, position: int, now: float) -> None:
        """Lag and ages of a partition.

        Args:
            end: next offset that the broker would write.
            position: next offset that would be read.
        """
        metrics, consumer = self._app.metrics, batch_consumer(self._app)
        labels = tp.topic, str(tp.partition)
        # Where nothing was read yet, what would be read next is what is finished.
        finished = consumer.tracker.positions().get(tp, position)
        lag = max(0, end - finished)
        metrics.consumer_lag.labels(*labels).set(lag)
        behind_s = self._ages.behind_s(tp, lag, now)
        oldest_s = consumer.oldest_unfinished_s(tp)
        if oldest_s is not None:
            behind_s = max(0.0, time.time() - oldest_s)
        metrics.lag_seconds.labels(*labels).set(behind_s)
        committed = consumer.tracker.committed_positions().get(tp, finished)
        metrics.commit_age_seconds.labels(*labels).set(
            self._ages.uncommitted_s(tp, finished, committed, now)
        )


def _room_or_nan() -> tuple[float, float]:
    """Bytes left and in all, as `memory.room` has them."""
    return room() or (nan, nan)
