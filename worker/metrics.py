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

#: Seconds, from 100 microseconds (one decoded batch) to 10 s (an outage felt).
STAGE_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0,
)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SWAP_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The worker's metrics on a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

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
        self.commit_age_seconds = Gauge(
            "streamrec_commit_age_seconds",
            "Time since the partition had nothing left to commit.",
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
        self.produce_errors = Counter(
            "streamrec_produce_errors",
            "Failed writes to Kafka; each is retried.",
            registry=registry,
        )
        self.inference_errors = Counter(
            "streamrec_inference_errors",
            "Batches that the model failed on; the fallback served them.",
            ["surface"],
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
        self.model_info = Gauge(
            "streamrec_model_info",
            "1 for the model that serves a surface.",
            ["surface", "name", "version", "precision"],
            registry=registry,
        )
        self.model_file_bytes = Gauge(
            "streamrec_model_file_bytes",
            "Size of the bundle on disk.",
            ["surface"],
            registry=registry,
        )
        self.model_memory_bytes = Gauge(
            "streamrec_model_memory_bytes",
            "Growth of resident memory by loading the model.",
            ["surface"],
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
            "Model swaps by result.",
            ["surface", "result"],
            registry=registry,
        )
        self.swap_seconds = Histogram(
            "streamrec_model_swap_seconds",
            "Time of a model swap by phase (load, switch).",
            ["phase"],
            buckets=SWAP_BUCKETS,
            registry=registry,
        )


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
