"""Stock Faust with an agent that does nothing: what Faust's way of an event costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.cases.faust_app import run, stock_app


def main(config: CaseConfig) -> None:
    """Count events."""
    app, topic = stock_app(config)
    progress = Progress(Path(config.progress))

    @app.agent(topic)
    async def count(stream: Any) -> None:
        async for _ in stream:
            progress.advance(1)

    run(app)


if __name__ == "__main__":
    main(read_config())
