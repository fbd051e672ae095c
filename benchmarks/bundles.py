"""Bundles that are measured on: the shipped one, and synthetic ones of any size (for speed and
memory only; their recommendations mean nothing)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from models.compress.draft import Context, open_draft, save
from models.compress.methods import METHODS
from models.compress.recipe import apply, parse
from models.dataset import Queries
from models.scale import write_synthetic, zipf_histories

_ROOT = Path(__file__).parent.parent
_SEED = 7
_QUERIES = 256
#: From so many items on, only the promising ones are scored (docs/large-catalogues.md). A list of
#: ten after the longest history needs 210 items, so a few more than that must be given.
_LARGE, _FOR_LARGE = 50_000, "int8 + cells:least=256"


def default_bundle() -> Path:
    """The int8 bundle that is shipped; the newest of them."""
    return max((_ROOT / "models" / "shipped" / "posts").glob("*-int8")).resolve()


def synthetic_bundle(item_count: int, length: int) -> Path:
    """An int8 SASRec bundle, width 64, 2 blocks; made once and kept below .cache. A million items
    take two minutes.

    Args:
        length: of the histories that it reads.
    """
    registry = _ROOT / ".cache" / "bench-bundles" / "synthetic"
    recipe = _FOR_LARGE if item_count >= _LARGE else "int8"
    made = registry / f"{item_count}x{length}-{recipe.partition(':')[0].replace(' + ', '-')}"
    if made.exists():
        return made
    registry.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=registry.parent))
    try:
        draft = open_draft(write_synthetic(work / "fp32", item_count, seed=_SEED, length=length))
        context = Context(
            validation=Queries(
                zipf_histories(item_count, _QUERIES, _SEED + 2), np.ones(_QUERIES, dtype=np.int64)
            ),
            seed=_SEED,
        )
        save(apply(parse(recipe, METHODS), draft, context), made)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return made
