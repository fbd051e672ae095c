"""confluent-kafka (librdkafka) alone: batches are read and counted."""

from __future__ import annotations

from pathlib import Path

from confluent_kafka import Consumer

from benchmarks.cases.common import CaseConfig, Progress, read_config


def main(config: CaseConfig) -> None:
    """Count events."""
    progress = Progress(Path(config.progress))
    consumer = Consumer(
        {
            "bootstrap.servers": config.bootstrap,
            "group.id": config.group,
            "auto.offset.reset": "earliest",
            "session.timeout.ms": 1000 * config.session_s,
        }
    )
    consumer.subscribe([config.topic])
    while True:
        progress.advance(sum(1 for m in consumer.consume(config.batch, 0.1) if m.error() is None))


if __name__ == "__main__":
    main(read_config())
