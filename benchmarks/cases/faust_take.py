"""Stock Faust with an agent that takes batches and does nothing with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.cases.faust_app import run, stock_app


def main(config: CaseConfig) -> None:
    """Count events by the batch."""
    app, topic = stock_app(config)
    progress = Progress(Path(config.progress))

    @app.agent(topic)
    async def count(stream: Any) -> None:
        async for batch in stream.take(config.batch, within=config.wait_s):
            progress.advance(len(batch))

    run(app)


if __name__ == "__main__":
    main(read_config())
