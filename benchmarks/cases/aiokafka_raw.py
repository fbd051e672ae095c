"""aiokafka alone: batches are read and counted."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiokafka import AIOKafkaConsumer

from benchmarks.cases.common import CaseConfig, Progress, read_config


async def main(config: CaseConfig) -> None:
    """Count events."""
    progress = Progress(Path(config.progress))
    consumer = AIOKafkaConsumer(
        config.topic,
        bootstrap_servers=config.bootstrap,
        group_id=config.group,
        auto_offset_reset="earliest",
        session_timeout_ms=1000 * config.session_s,
    )
    await consumer.start()
    while True:
        batches = await consumer.getmany(timeout_ms=200)
        progress.advance(sum(map(len, batches.values())))


if __name__ == "__main__":
    asyncio.run(main(read_config()))
