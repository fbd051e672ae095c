"""aiokafka batches around the shared scorer: read, score, one Redis round trip, commit."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiokafka import AIOKafkaConsumer
from redis.asyncio import Redis

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.peer_scorer import PeerScorer, fill


async def main(config: CaseConfig) -> None:
    """Serve recommendations."""
    scorer = PeerScorer(config)
    progress = Progress(Path(config.progress))
    redis = Redis.from_url(config.redis)
    consumer = AIOKafkaConsumer(
        config.topic,
        bootstrap_servers=config.bootstrap,
        group_id=config.group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        session_timeout_ms=1000 * config.session_s,
    )
    await consumer.start()
    while True:
        batches = await consumer.getmany(timeout_ms=200, max_records=config.batch)
        values = [record.value for records in batches.values() for record in records]
        if not values:
            continue
        pipe = redis.pipeline(transaction=False)
        fill(pipe, scorer.score(values))
        await pipe.execute()
        await consumer.commit()
        progress.advance(len(values))


if __name__ == "__main__":
    asyncio.run(main(read_config()))
