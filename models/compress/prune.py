"""Pruning by magnitude: the smallest weights become zero (Han et al., NeurIPS 2015).

Zeros make a file smaller only where they are not stored: the rewriter keeps a weight as a bitmap
and its other values wherever that is smaller, whatever encoding the values have. In memory, and in
time, a pruned weight costs what a dense one does: ONNX Runtime has no sparse products on CPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.compress.draft import CompressionError, Context, Draft


def prune(
    draft: Draft,
    context: Context,
    *,
    sparsity: float = 0.5,
    scope: str = "global",
    parts: str = "all",
    below: float = 0.0,
) -> Draft:
    """Zero a share of the weights.

    Args:
        sparsity: share of zeros, in 0..1.
        scope: `global` ranks the weights of all parts together, each in units of its own matrix's
            standard deviation, since tables and layers have different scales; `layer` takes the
            same share of each.
        parts: which weights.
        below: instead of a share, zero what is smaller than so many standard deviations of its
            matrix.
    """
    if not 0.0 <= sparsity < 1.0:
        raise CompressionError(f"prune: sparsity {sparsity} must be at least 0 and below 1")
    if scope not in {"global", "layer"}:
        raise CompressionError(f"prune: scope {scope!r} must be global or layer")
    values = {weight.name: draft.value(weight.name) for weight in draft.weights(parts)}
    relative = {name: np.abs(value) / (value.std() or 1.0) for name, value in values.items()}
    if not values:
        raise CompressionError(f"prune: no weight belongs to parts {parts!r}")
    every = np.concatenate([value.reshape(-1) for value in relative.values()])
    for name, size in relative.items():
        ranked = every if scope == "global" else size
        bound = below if below > 0.0 else _quantile(ranked, sparsity)
        values[name] = np.where(size < bound, np.float32(0.0), values[name])
    return draft.with_values(values)


def _quantile(sizes: NDArray[np.floating[Any]], share: float) -> float:
    place = int(sizes.size * share)
    return float(np.partition(sizes.reshape(-1), place)[place])
