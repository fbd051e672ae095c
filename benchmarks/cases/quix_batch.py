"""Quix Streams around the shared scorer, by the batch: a `BatchingSink`, flushed and committed by
number of messages and by time."""

from __future__ import annotations

from pathlib import Path

from quixstreams.sinks import BatchingSink, SinkBatch
from redis import Redis

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.cases.quix import application
from benchmarks.peer_scorer import PeerScorer, write


class ScoringSink(BatchingSink):
    """Scores what it collected and sets it in Redis.

    A sink's batches are one partition's each; they are joined until the flush, so that a run of
    the model has the whole of them.
    """

    def __init__(self, config: CaseConfig) -> None:
        super().__init__()
        self._scorer = PeerScorer(config)
        self._progress = Progress(Path(config.progress))
        self._redis = Redis.from_url(config.redis)
        self._values: list[bytes] = []

    def write(self, batch: SinkBatch) -> None:
        """Take one partition's batch."""
        self._values += [item.value for item in batch]

    def flush(self) -> None:
        """Take all batches, then score them as one."""
        super().flush()
        if self._values:
            write(self._redis, self._scorer.score(self._values))
            self._progress.advance(len(self._values))
            self._values.clear()


def main(config: CaseConfig) -> None:
    """Serve recommendations."""
    app = application(
        config,
        commit_every=config.batch,
        commit_interval=config.wait_s,
        consumer_poll_timeout=config.wait_s,
    )
    topic = app.topic(config.topic, key_deserializer="bytes", value_deserializer="bytes")
    app.dataframe(topic).sink(ScoringSink(config))
    app.run()


if __name__ == "__main__":
    main(read_config())
