"""The worker's intake alone: a Faust app on `BatchTransport` whose batches are finished at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.cases.faust_app import run, stock_app
from worker.intake import BatchTransport
from worker.metrics import Metrics


def main(config: CaseConfig) -> None:
    """Count events."""
    app, topic = stock_app(
        config, stream_wait_empty=True, broker_commit_interval=1.0, broker_max_poll_records=512
    )
    progress = Progress(Path(config.progress))
    channel = app.channel(value_type=list, maxsize=64)
    demand = asyncio.Event()
    demand.set()
    app.transport = BatchTransport(
        app.conf.broker,
        app,
        batches=channel,
        demand=demand,
        min_interval_s=0.0,
        fetch_wait_ms=100,
        max_in_flight_events=8192,
        shutdown_timeout_s=5.0,
        metrics=Metrics(),
        on_change=lambda assigned: None,
    )
    app.topics.add(topic)

    @app.agent(channel)
    async def count(batches: Any) -> None:
        async for fetched in batches:
            for batch in fetched:
                if batch.start():
                    batch.finish()
                    progress.advance(len(batch.records))
            demand.set()

    run(app)


if __name__ == "__main__":
    main(read_config())
