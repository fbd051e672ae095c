"""The worker's intake alone: a Faust app on `BatchTransport` whose batches are finished at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import faust

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.cases.faust_app import run
from worker.intake import BatchTransport, RecordBatch
from worker.metrics import Metrics


def main(config: CaseConfig) -> None:
    """Count events."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    progress = Progress(Path(config.progress))
    app = faust.App(
        config.group,
        broker=f"kafka://{config.bootstrap}",
        broker_session_timeout=config.session_s,
        broker_request_timeout=config.session_s + 30,
        autodiscover=False,
        stream_wait_empty=True,
        broker_commit_interval=1.0,
        broker_max_poll_records=512,
        consumer_auto_offset_reset="earliest",
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        worker_redirect_stdouts=False,
    )
    channel = app.channel(value_type=RecordBatch, maxsize=64)
    demand = asyncio.Event()
    demand.set()
    app.transport = BatchTransport(
        app.conf.broker,
        app,
        batches=channel,
        demand=demand,
        max_in_flight_events=8192,
        shutdown_timeout_s=5.0,
        metrics=Metrics(),
        on_change=lambda assigned: None,
    )
    app.topics.add(
        app.topic(config.topic, key_type=bytes, value_type=bytes, value_serializer="raw")
    )

    @app.agent(channel)
    async def count(batches: Any) -> None:
        async for batch in batches:
            if batch.start():
                batch.finish()
                progress.advance(len(batch.records))

    run(app)


if __name__ == "__main__":
    main(read_config())
