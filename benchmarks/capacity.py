"""What a cluster needs for a wanted rate, reasoned from what one machine measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.peers import OURS
from benchmarks.results import Results

#: No process is planned to be busier than this: bursts, rebalances and restarts need room.
UTILISATION = 0.6
#: A group that grows to twice its pods must still find a partition for each.
PARTITIONS_PER_POD = 2


@dataclass(frozen=True)
class Need:
    """For `rate` events a second; CPUs at `UTILISATION`."""

    rate: float
    pods: int
    partitions: int
    worker_cpus: float
    redis_cpus: float
    #: Redis runs commands on one thread: a shard is one CPU.
    redis_shards: int
    broker_cpus: float


def need(results: Results, rate: float) -> Need:
    """Scale the medians of the run up to `rate`; one pod is what was measured."""
    per_pod = results.spread(OURS, lambda run: run.full.rate).median * UTILISATION
    cpus = {
        part: rate
        / 1e6
        * results.spread(OURS, lambda run, p=part: run.full.cpu_s_per_million(p)).median
        / UTILISATION
        for part in ("sut", "redis", "broker")
    }
    pods = math.ceil(rate / per_pod)
    return Need(
        rate=rate,
        pods=pods,
        partitions=PARTITIONS_PER_POD * pods,
        worker_cpus=cpus["sut"],
        redis_cpus=cpus["redis"],
        redis_shards=math.ceil(cpus["redis"]),
        broker_cpus=cpus["broker"],
    )


def capacity_table(results: Results) -> list[list[str]]:
    """Rows for some rates; the first is the head."""
    rows = [["events/s", "worker pods", "partitions", "worker CPUs", "Redis shards", "broker CPUs"]]
    for rate in (10_000.0, 100_000.0, 1_000_000.0):
        found = need(results, rate)
        rows.append(
            [
                f"{rate:,.0f}",
                f"{found.pods:,}",
                f"{found.partitions:,}",
                f"{found.worker_cpus:,.0f}",
                f"{found.redis_shards:,}",
                f"{found.broker_cpus:,.0f}",
            ]
        )
    return rows
