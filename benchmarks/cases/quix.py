"""Quix Streams around the shared scorer, message by message: `StreamingDataFrame.update`."""

from __future__ import annotations

from pathlib import Path

from quixstreams import Application
from redis import Redis

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.peer_scorer import PeerScorer, write


def application(config: CaseConfig, **settings: float) -> Application:
    """An application as both Quix cases use it."""
    return Application(
        broker_address=config.bootstrap,
        consumer_group=config.group,
        auto_offset_reset="earliest",
        auto_create_topics=False,
        consumer_extra_config={"session.timeout.ms": 1000 * config.session_s},
        loglevel="WARNING",
        **settings,
    )


def main(config: CaseConfig) -> None:
    """Serve recommendations."""
    scorer = PeerScorer(config)
    progress = Progress(Path(config.progress))
    redis = Redis.from_url(config.redis)
    app = application(config, commit_interval=1.0)

    def recommend(value: bytes) -> None:
        write(redis, scorer.score([value]))
        progress.advance(1)

    topic = app.topic(config.topic, key_deserializer="bytes", value_deserializer="bytes")
    app.dataframe(topic).update(recommend)
    app.run()


if __name__ == "__main__":
    main(read_config())
