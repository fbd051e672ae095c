"""Stock Faust around the shared scorer, by the batch: `take`, score, one Redis round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.cases.faust_app import run, stock_app
from benchmarks.peer_scorer import PeerScorer, fill


def main(config: CaseConfig) -> None:
    """Serve recommendations."""
    scorer = PeerScorer(config)
    app, topic = stock_app(config)
    progress = Progress(Path(config.progress))
    redis = Redis.from_url(config.redis)

    @app.agent(topic)
    async def recommend(stream: Any) -> None:
        async for batch in stream.take(config.batch, within=config.wait_s):
            pipe = redis.pipeline(transaction=False)
            fill(pipe, scorer.score(batch))
            await pipe.execute()
            progress.advance(len(batch))

    run(app)


if __name__ == "__main__":
    main(read_config())
