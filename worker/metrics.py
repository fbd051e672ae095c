"""Every metric, declared once. Names follow the Prometheus conventions; docs/metrics.md lists them.

Labels come from fixed sets (surfaces, types, stages, versions), never from what a producer sent,
so that the number of series is bounded.
"""

from __future__ import annotations

import resource
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from worker.errors import Refusal
from worker.events import Reason, Surface
from worker.gate import ROLLBACK_VERDICTS, Verdict
from worker.version_series import VersionSeries

#: Seconds, from 100 microseconds (one decoded batch) to 10 s (an outage felt).
STAGE_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0,
)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
OVERLAP_BUCKETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Seconds from 10 milliseconds to an hour: how late lists are when a worker catches up.
FRESHNESS_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
)  # fmt: skip
SWAP_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The worker's metrics on a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._declare_stream(registry)
        self._declare_lists(registry)
        self._declare_models(registry)
        self._declare_trials(registry)
        #: Which versions have series.
        self.versions = VersionSeries(
            [
                self.inference_errors, self.recommendations, self.score_seconds, self.scored,
                self.judged, self.hits, self.reciprocal_ranks,
            ]
        )  # fmt: skip

    def _declare_stream(self, registry: CollectorRegistry) -> None:
        """Events, offsets, dependencies and memory."""
        self.events = Counter(
            "streamrec_events",
            "Events by what became of them (applied, duplicate, late, failed).",
            ["surface", "event_type", "outcome"],
            registry=registry,
        )
        self.dead_letters = Counter(
            "streamrec_dead_letters",
            "Records sent to the dead-letter topic.",
            ["reason"],
            registry=registry,
        )
        self.truncated = Counter(
            "streamrec_truncated_records",
            "Dead letters and lists that were cut to what the broker takes (docs/limits.md).",
            ["topic"],
            registry=registry,
        )
        self.forgotten_users = Counter(
            "streamrec_forgotten_users",
            "Users erased by a tombstone, repeats left out (docs/privacy.md).",
            registry=registry,
        )
        self.batch_events = Histogram(
            "streamrec_batch_events",
            "Events in a micro-batch.",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "streamrec_stage_seconds",
            "Time of one batch in a stage (decode, history, score, filter, cache, publish).",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.event_seconds = BulkHistogram(
            "streamrec_event_seconds",
            "From reading an event to its recommendation being in Redis and on the output topic.",
            STAGE_BUCKETS,
        )
        registry.register(self.event_seconds)
        self.cached_seconds = BulkHistogram(
            "streamrec_cached_seconds",
            "From reading an event to its recommendation being in Redis.",
            STAGE_BUCKETS,
        )
        registry.register(self.cached_seconds)
        self.freshness_seconds = BulkHistogram(
            "streamrec_freshness_seconds",
            "From an event's time in Kafka to its recommendation being in Redis; events of one read"
            " count as late as the oldest.",
            FRESHNESS_BUCKETS,
        )
        registry.register(self.freshness_seconds)
        self.ready = Gauge(
            "streamrec_ready", "1 while /readyz says that this worker is ready.", registry=registry
        )
        self.dependency_up = Gauge(
            "streamrec_dependency_up",
            "1 while Kafka or Redis answers this worker, asked every second.",
            ["dependency"],
            registry=registry,
        )
        self.memory_limit_bytes = Gauge(
            "streamrec_memory_limit_bytes",
            "Memory that the container, or else the machine, may take.",
            registry=registry,
        )
        self.memory_available_bytes = Gauge(
            "streamrec_memory_available_bytes",
            "What is left of it; cached files count as left.",
            registry=registry,
        )
        self.busy_seconds = Gauge(
            "streamrec_busy_seconds",
            "From the first event read to the last one finished, in this process.",
            registry=registry,
        )
        self.in_flight = Gauge(
            "streamrec_in_flight_events", "Events read and not yet finished.", registry=registry
        )
        self.consumer_lag = Gauge(
            "streamrec_consumer_lag_events",
            "Events on the broker that are not yet finished.",
            ["topic", "partition"],
            registry=registry,
        )
        self.lag_seconds = Gauge(
            "streamrec_lag_seconds",
            "Age of the oldest event that is not yet finished: by its time in Kafka once it is"
            " read, by how long the partition has been behind before; 0 without lag.",
            ["topic", "partition"],
            registry=registry,
        )
        self.commit_age_seconds = Gauge(
            "streamrec_commit_age_seconds",
            "Time that the oldest finished event has waited to be committed; 0 where none waits.",
            ["topic", "partition"],
            registry=registry,
        )
        self.commits = Counter(
            "streamrec_commits", "Offset commits by result.", ["result"], registry=registry
        )
        self.rebalances = Counter(
            "streamrec_rebalances", "Assignments received from the group.", registry=registry
        )
        self.assigned_partitions = Gauge(
            "streamrec_assigned_partitions",
            "Partitions assigned to this worker.",
            registry=registry,
        )
        self.redis_errors = Counter(
            "streamrec_redis_errors",
            "Failed Redis round trips; each is retried.",
            ["operation"],
            registry=registry,
        )
        for operation in ("read_users", "write_batch"):
            self.redis_errors.labels(operation)  # so that the first failure is an increase
        self.redis_seconds = Histogram(
            "streamrec_redis_seconds",
            "Time of the round trip to Redis of one batch, by operation; failed ones included.",
            ["operation"],
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.degraded = Gauge(
            "streamrec_degraded",
            "1 while the worker goes on with less (redis, model, overload): docs/delivery.md.",
            ["reason"],
            registry=registry,
        )
        self.lists_shed = Counter(
            "streamrec_lists_shed",
            "Lists that views did not make, since the worker was behind (STREAMREC_SHED_LAG_S).",
            ["surface"],
            registry=registry,
        )
        self.redis_losses = Counter(
            "streamrec_redis_losses",
            "Times that Redis was found to have lost effects of a partition.",
            registry=registry,
        )
        self.stale_writes = Counter(
            "streamrec_stale_writes",
            "Writes that Redis refused, since another worker had written something newer.",
            ["kind"],
            registry=registry,
        )
        self.produce_errors = Counter(
            "streamrec_produce_errors",
            "Failed writes to Kafka; each is retried.",
            registry=registry,
        )

    def _declare_lists(self, registry: CollectorRegistry) -> None:
        """Recommendation lists, and the histories that they are made from."""
        self.inference_errors = Counter(
            "streamrec_inference_errors",
            "Batches that a model failed on; another version, or the fallback, served them.",
            ["surface", "model_version"],
            registry=registry,
        )
        self.recommendations = Counter(
            "streamrec_recommendations",
            "Recommendation lists written.",
            ["surface", "source", "model_version"],
            registry=registry,
        )
        self.short_recommendations = Counter(
            "streamrec_short_recommendations",
            "Lists shorter than asked for, since nothing more was allowed.",
            ["surface"],
            registry=registry,
        )
        self.cold_items = Gauge(
            "streamrec_cold_items",
            "Items without a row in the model that can be recommended by their text.",
            ["surface"],
            registry=registry,
        )
        self.cold_recommended = Counter(
            "streamrec_cold_recommended",
            "Places of recommendation lists that such items took.",
            ["surface"],
            registry=registry,
        )
        self.history_cache_bytes = Gauge(
            "streamrec_history_cache_bytes",
            "Estimated memory of cached histories.",
            registry=registry,
        )
        self.history_cache_users = Gauge(
            "streamrec_history_cache_entries", "Histories cached.", registry=registry
        )
        self.history_reads = Counter(
            "streamrec_history_reads",
            "Histories looked up, by where they were (cache, redis, nowhere, damaged).",
            ["found"],
            registry=registry,
        )

    def _declare_models(self, registry: CollectorRegistry) -> None:
        """What serves, and how it came to."""
        self.model_info = Gauge(
            "streamrec_model_info",
            "1 for each model in memory, with its role (stable, canary, shadow).",
            ["surface", "name", "version", "precision", "role"],
            registry=registry,
        )
        self.model_file_bytes = Gauge(
            "streamrec_model_file_bytes",
            "Size of the bundle on disk.",
            ["surface", "version"],
            registry=registry,
        )
        self.model_memory_bytes = Gauge(
            "streamrec_model_memory_bytes",
            "Growth of resident memory by loading the model.",
            ["surface", "version"],
            registry=registry,
        )
        self.model_created_seconds = Gauge(
            "streamrec_model_created_timestamp_seconds",
            "When the serving model was made, as Unix time.",
            ["surface"],
            registry=registry,
        )
        self.model_age_seconds = Gauge(
            "streamrec_model_age_seconds",
            "Age of the serving model.",
            ["surface"],
            registry=registry,
        )
        self.swaps = Counter(
            "streamrec_model_swaps",
            "Times that other models took over a surface, canaries and shadows included.",
            ["surface"],
            registry=registry,
        )
        self.swap_seconds = Histogram(
            "streamrec_model_swap_seconds",
            "Time of a model swap by phase (load, switch).",
            ["phase"],
            buckets=SWAP_BUCKETS,
            registry=registry,
        )
        self.refused_bundles = Counter(
            "streamrec_refused_bundles",
            "Bundles that were not loaded, by reason (docs/bundle.md).",
            ["surface", "reason"],
            registry=registry,
        )
        self.release_followed = Gauge(
            "streamrec_release_followed",
            "1 while this worker serves what the registry wants served, 0 while it cannot.",
            ["surface"],
            registry=registry,
        )
        self.release_revision = Gauge(
            "streamrec_release_revision",
            "Revision of the release that this worker follows; 0 without one.",
            ["surface"],
            registry=registry,
        )

    def _declare_trials(self, registry: CollectorRegistry) -> None:
        """What users did with the lists of each version, and what the gate made of it."""
        self.canary_share = Gauge(
            "streamrec_canary_share",
            "Share of users that a canary serves.",
            ["surface"],
            registry=registry,
        )
        self.score_seconds = Counter(
            "streamrec_score_seconds",
            "Time that a model took for its lists.",
            ["surface", "model_version"],
            registry=registry,
        )
        self.scored = Counter(
            "streamrec_scored_lists",
            "Lists that a model made, those of canaries and shadows that nobody saw included.",
            ["surface", "model_version"],
            registry=registry,
        )
        self.judged = Counter(
            "streamrec_judged_events",
            "Positive events that were looked up in the list that the user was served before.",
            ["surface", "model_version"],
            registry=registry,
        )
        self.hits = Counter(
            "streamrec_hits",
            "Those of them whose item was on the list.",
            ["surface", "model_version"],
            registry=registry,
        )
        self.reciprocal_ranks = Counter(
            "streamrec_reciprocal_ranks",
            "Sum of 1 / place on the list over those hits.",
            ["surface", "model_version"],
            registry=registry,
        )
        self.coverage = Gauge(
            "streamrec_catalogue_coverage_ratio",
            "Share of the model's items that this worker has put on a served list.",
            ["surface", "model_version"],
            registry=registry,
        )
        self.overlap = Histogram(
            "streamrec_trial_overlap_ratio",
            "Share of items that both versions' lists for a user have in common.",
            ["surface"],
            buckets=OVERLAP_BUCKETS,
            registry=registry,
        )
        self.score_drift = Gauge(
            "streamrec_trial_score_drift",
            "How far the other version's best scores lie above the stable one's, in standard"
            " deviations.",
            ["surface"],
            registry=registry,
        )
        self.live_quality = Gauge(
            "streamrec_live_quality",
            "Figures of a version over all partitions (hit_rate, mrr) with bounds that hold at all"
            " times (estimate, low, high); by the worker that decides.",
            ["surface", "role", "model_version", "figure", "bound"],
            registry=registry,
        )
        self.trial_evidence = Gauge(
            "streamrec_trial_evidence",
            "What the gate decides by (docs/quality.md); by the worker that decides.",
            ["surface", "figure"],
            registry=registry,
        )
        self.decisions = Counter(
            "streamrec_decisions",
            "Canaries that the gate promoted or rolled back.",
            ["surface", "action", "reason"],
            registry=registry,
        )

    def start_at_zero(self, surfaces: Iterable[Surface]) -> None:
        """Export what is counted seldom, and watched, before anything happens.

        A counter that appears with its first event appears as 1: to `increase()` nothing happened.

        Args:
            surfaces: those that have a model.
        """
        for letter in Reason:
            self.dead_letters.labels(letter.value)
        for result in ("ok", "failed"):
            self.commits.labels(result)
        for phase in ("load", "switch"):
            self.swap_seconds.labels(phase)
        for surface in surfaces:
            self.swaps.labels(surface.value)
            for refusal in Refusal:
                self.refused_bundles.labels(surface.value, refusal.value)
            self.decisions.labels(surface.value, "promote", Verdict.NOT_WORSE.value)
            for verdict in ROLLBACK_VERDICTS:
                self.decisions.labels(surface.value, "rollback", verdict.value)


class BulkHistogram(Collector):
    """A histogram that takes many equal observations at the cost of one.

    The events of a record batch are read and finished together, so that they share their latency;
    prometheus_client's own histogram would be asked once for each. One thread observes.

    Args:
        bounds: upper bounds in ascending order, without infinity.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """What Prometheus reads."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self._name, self._documentation)
        family.add_metric([], buckets=buckets, sum_value=self._sum)
        return [family]


def resident_bytes() -> int:
    """Resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
