"""aiokafka and ONNX Runtime, one event at a time, as most would first write it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from benchmarks.cases.common import CaseConfig, Progress, read_config
from worker.bundle import Bundle, open_bundle
from worker.local.plain_loop import run_plain_loop
from worker.settings import load_settings


async def main(config: CaseConfig) -> None:
    """Serve recommendations."""
    bundle = open_bundle(Path(config.bundle))
    progress = Progress(Path(config.progress))
    await run_plain_loop(
        load_settings(kafka=config.bootstrap, redis=config.redis, events_topic=config.topic),
        bundle,
        group=config.group,
        histories=known_histories(config, bundle),
        on_event=lambda: progress.advance(1),
    )


def known_histories(config: CaseConfig, bundle: Bundle) -> dict[str, list[str]]:
    """Items by user that were known before."""
    known = msgspec.msgpack.decode(Path(config.histories).read_bytes(), type=dict[str, list[int]])
    return {user: [bundle.items[item - 1] for item in history] for user, history in known.items()}


if __name__ == "__main__":
    asyncio.run(main(read_config()))
