"""Bundles that are measured on: the shipped one, and synthetic ones of any size (for speed and
memory only; their recommendations mean nothing)."""

from __future__ import annotations

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
    return _shipped("int8")


def shipped_float_bundle() -> Path:
    """The float32 bundle that is shipped; the newest of them."""
    return _shipped("fp32")


def synthetic_bundle(item_count: int, length: int) -> Path:
    """An int8 SASRec bundle, width 64, 2 blocks; made once and kept below .cache. A million items
    take two minutes.

    Args:
        length: of the histories that it reads.
    """
    recipe = _FOR_LARGE if item_count >= _LARGE else "int8"
    made = _place(item_count, length, recipe.partition(":")[0].replace(" + ", "-"))
    if made.exists():
        return made
    draft = open_draft(synthetic_float_bundle(item_count, length))
    context = Context(
        validation=Queries(
            zipf_histories(item_count, _QUERIES, _SEED + 2), np.ones(_QUERIES, dtype=np.int64)
        ),
        seed=_SEED,
    )
    return save(apply(parse(recipe, METHODS), draft, context), made)


def synthetic_float_bundle(item_count: int, length: int) -> Path:
    """The float32 bundle that `synthetic_bundle` makes an int8 one of; kept beside it."""
    made = _place(item_count, length, "fp32")
    if made.exists():
        return made
    return write_synthetic(made, item_count, seed=_SEED, length=length)


def _place(item_count: int, length: int, kind: str) -> Path:
    # Another folder where the graphs of SASRec become others, so that old ones are not kept.
    return _ROOT / ".cache" / "bench-bundles-3" / "synthetic" / f"{item_count}x{length}-{kind}"


def _shipped(precision: str) -> Path:
    return max((_ROOT / "models" / "shipped" / "posts").glob(f"*-{precision}")).resolve()
