"""The model alone: batches of full histories, each in as many runs as is fastest, no I/O. No whole
path can be faster on these CPUs, unless it scores less."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.cases.common import CaseConfig, Progress, read_config
from benchmarks.peer_scorer import best_rows
from worker.bundle import open_bundle


def main(config: CaseConfig) -> None:
    """Score."""
    progress = Progress(Path(config.progress))
    bundle = open_bundle(Path(config.bundle))
    manifest = bundle.manifest
    count = min(manifest.most, config.top_k + manifest.max_length)
    rows = best_rows(bundle, config.batch, count)
    history = np.random.default_rng(0).integers(
        1, manifest.item_count + 1, size=(config.batch, manifest.max_length)
    )
    while True:
        for start in range(0, config.batch, rows):
            bundle.score(history[start : start + rows], count)
        progress.advance(config.batch)


if __name__ == "__main__":
    main(read_config())
