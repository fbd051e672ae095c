"""Bytewax around the shared scorer, by the batches that its Kafka source gives."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.run import cli_main
from redis import Redis

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.peer_scorer import PeerScorer, write

_List = tuple[str, bytes]


class _RedisPartition(StatelessSinkPartition[_List]):
    def __init__(self, url: str) -> None:
        self._redis = Redis.from_url(url)

    def write_batch(self, items: list[_List]) -> None:
        write(self._redis, items)


class RedisSink(DynamicSink[_List]):
    """Sets each batch of lists in one round trip."""

    def __init__(self, url: str) -> None:
        self._url = url

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _RedisPartition:
        """One connection a worker."""
        return _RedisPartition(self._url)


def main(config: CaseConfig) -> None:
    """Serve recommendations."""
    scorer = PeerScorer(config)
    progress = Progress(Path(config.progress))

    def recommend(batch: list[KafkaSourceMessage]) -> Iterable[_List]:
        lists = scorer.score([message.value for message in batch])
        progress.advance(len(batch))
        return lists

    flow = Dataflow("recommend")
    source = KafkaSource([config.bootstrap], [config.topic], batch_size=config.batch)
    events = op.input("events", flow, source)
    op.output("redis", op.flat_map_batch("score", events, recommend), RedisSink(config.redis))
    cli_main(flow, workers_per_process=1)


if __name__ == "__main__":
    main(read_config())
