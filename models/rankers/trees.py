"""Four ways to make a forest smaller. Each is a pure function of a forest and calibration rows.

Rows are float `[rows, features]`, as they come to the ensemble. A step of size "nothing" gives
the very same forest back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.rankers.errors import RecipeError
from models.rankers.forest import LEAF, MODES, Forest, combine

_LLOYD_ROUNDS = 20


def prune_trees(forest: Forest, rows: NDArray[Any], share: float) -> Forest:
    """Drop `share` of the trees: again and again the one whose loss leaves the sum of the others
    best correlated with the full score on `rows`.

    What stays is scaled and shifted by least squares to the full score, so that a random forest's
    mean stays a mean.

    Raises:
        RecipeError: the trees are not summed or averaged.
    """
    drop = int(len(forest.roots) * share)
    if drop == 0:
        return forest
    forest = _summed(forest)
    parts = forest.value[forest.leaf_of(rows)].astype(np.float64)  # [rows, trees, targets]
    parts -= parts.mean(axis=0)
    flat = parts.transpose(0, 2, 1).reshape(-1, len(forest.roots))
    gram = flat.T @ flat
    with_full = gram.sum(axis=1)
    kept = np.ones(len(gram), dtype=bool)
    with_kept = with_full.copy()
    for _ in range(drop):
        places = np.flatnonzero(kept)
        shared = with_full[places].copy()
        shared = shared.sum() - shared
        own = with_kept[places]
        power = own.sum() - 2 * own + np.diag(gram)[places]
        fit = np.where(power > 0, shared**2 / np.maximum(power, 1e-300), 0.0)
        gone = places[fit.argmax()]
        kept[gone] = False
        with_kept -= gram[gone]
    power = float(gram[np.ix_(kept, kept)].sum())
    scale = float(with_full[kept].sum()) / power if power > 0 else 1.0
    smaller = replace(forest, roots=forest.roots[kept]).tidied()
    dtype = forest.value.dtype
    smaller = replace(smaller, value=(smaller.value * scale).astype(dtype))
    shift = (forest.score(rows) - smaller.score(rows)).mean(axis=0, dtype=np.float64)
    return add_base(smaller, shift)


def collapse_splits(forest: Forest, rows: NDArray[Any], share: float) -> Forest:
    """Turn subtrees into leaves until `share` of the splits is gone, least costly first.

    Cost-complexity pruning (Breiman et al., "Classification and Regression Trees", 1984) over all
    trees at once: the cost of a collapse is the squared change of the leaf value summed over
    calibration rows, so what no row reaches goes first. A new leaf holds its rows' mean.
    `collapse_bound` says how far a score can move.
    """
    aim = forest.splits - int(forest.splits * share)
    if aim == forest.splits:
        return forest
    mean, spread = _below(forest, rows)
    low, high = 0.0, float(spread.max()) + 1.0
    # The smallest price per leaf that removes enough.
    for _ in range(60):
        price = (low + high) / 2
        if _splits_left(forest, spread, price) > aim:
            low = price
        else:
            high = price
    return forest.as_leaves(_worth_collapsing(forest, spread, high), mean)


def collapse_bound(before: Forest, after: Forest) -> float:
    """The most that `collapse_splits` can have moved any score of any row, known from the trees
    alone: the sum over trees of the largest distance of a leaf from the leaf that replaced it.
    """
    worst = np.zeros(len(before.mode))
    pairs = [(before.roots, after.roots)]
    while pairs:
        old, new = pairs.pop()
        inner = ~before.leaves[old]
        ends = after.leaves[new]
        moved = np.abs(before.value[old].astype(np.float64) - after.value[new]).max(axis=1)
        worst[old] = np.where(inner, 0.0, moved)
        if inner.any():
            old, new, ends = old[inner], new[inner], ends[inner]
            for side in ("true", "false"):
                pairs.append(
                    (getattr(before, side)[old], np.where(ends, new, getattr(after, side)[new]))
                )
    for level in reversed(before.levels()):
        split = level[~before.leaves[level]]
        worst[split] = np.maximum(worst[before.true[split]], worst[before.false[split]])
    aggregate = "MAX" if before.aggregate == "MIN" else before.aggregate
    return float(combine(worst[before.roots][None, :, None], aggregate)[0, 0])


def quantize_thresholds(forest: Forest, rows: NDArray[Any], bits: int) -> Forest:
    """Let each feature have at most `2**bits` thresholds, quantiles of those in use; then drop
    splits that what was asked above them already decides.

    Thresholds in use say more than the rows do: they lie where the trees look closely. Lossless
    where a feature has no more than `2**bits` thresholds.
    """
    del rows
    threshold = forest.threshold.copy()
    inner = ~forest.leaves
    for feature in np.unique(forest.feature[inner]):
        nodes = np.flatnonzero(inner & (forest.feature == feature))
        values, place, counts = np.unique(threshold[nodes], return_inverse=True, return_counts=True)
        if len(values) <= 2**bits:
            continue
        middle = counts.cumsum() - counts / 2
        wanted = (np.arange(2**bits) + 0.5) / 2**bits * counts.sum()
        levels = np.unique(_nearest(middle, wanted))
        threshold[nodes] = values[levels][_nearest(middle[levels], middle)][place]
    return drop_decided(replace(forest, threshold=threshold))


def quantize_leaves(forest: Forest, rows: NDArray[Any], bits: int) -> Forest:
    """Let each target have at most `2**bits` leaf values.

    Levels minimize the squared error (Lloyd, "Least squares quantization in PCM", 1982), leaves
    weighted by the rows that reach them and one. Lossless where there are no more values.
    """
    leaves = forest.leaves
    weight = forest.reach(rows) + 1.0
    value = forest.value.copy()
    for target in range(value.shape[1]):
        # Zero stays zero: it says that the leaf does not speak of this target.
        nodes = np.flatnonzero(leaves & (value[:, target] != 0))
        values, place = np.unique(value[nodes, target], return_inverse=True)
        if len(values) <= 2**bits:
            continue
        weights = np.bincount(place, weights=weight[nodes])
        value[nodes, target] = _lloyd(
            np.asarray(values, np.float64), weights.astype(np.float64), 2**bits
        )[place]
    return replace(forest, value=value)


def drop_decided(forest: Forest) -> Forest:
    """Cut splits whose answer follows from the splits above them. Lossless, also for NaN."""
    true, false = forest.true.tolist(), forest.false.tolist()
    mode, feature = forest.mode.tolist(), forest.feature.tolist()
    threshold, missing = forest.threshold.tolist(), forest.missing.tolist()
    roots = forest.roots.tolist()
    simple = {MODES.index("BRANCH_LEQ"), MODES.index("BRANCH_LT")}
    # A path knows, per test form, where its answers begin to be yes, and end to be no.
    stack: list[tuple[int, dict[Any, tuple[float, float]], list[int], int]] = [
        (root, {}, roots, tree) for tree, root in enumerate(roots)
    ]
    while stack:
        node, known, parent, slot = stack.pop()
        while mode[node] in simple:
            form = (feature[node], mode[node], missing[node])
            no, yes = known.get(form, (-np.inf, np.inf))
            if threshold[node] >= yes:
                node = true[node]
            elif threshold[node] <= no:
                node = false[node]
            else:
                break
        parent[slot] = node
        if mode[node] == LEAF:
            continue
        below_true = below_false = known
        if mode[node] in simple:
            form = (feature[node], mode[node], missing[node])
            no, yes = known.get(form, (-np.inf, np.inf))
            below_true = known | {form: (no, threshold[node])}
            below_false = known | {form: (threshold[node], yes)}
        stack.append((true[node], below_true, true, node))
        stack.append((false[node], below_false, false, node))
    return replace(
        forest, roots=np.array(roots), true=np.array(true), false=np.array(false)
    ).tidied()


def add_base(forest: Forest, shift: NDArray[np.float64]) -> Forest:
    """Add `shift` `[targets]` to the score: to the leaves of the smallest tree that speaks of that
    target alone, since TreeEnsemble has no base values; else to the base value."""
    value, base = forest.value.copy(), forest.base.copy()
    tree, leaves = forest.tree_of(), forest.leaves
    sizes = np.bincount(tree[leaves], minlength=len(forest.roots))
    for target, amount in enumerate(shift):
        others = np.delete(value, target, axis=1).any(axis=1) | base.any()
        mixed = np.bincount(tree[others & leaves], minlength=len(sizes)) > 0
        if forest.aggregate != "SUM" or mixed.all():
            base[target] += amount
            continue
        smallest = np.where(mixed, sizes.max() + 1, sizes).argmin()
        value[leaves & (tree == smallest), target] += value.dtype.type(amount)
    return replace(forest, value=value, base=base)


def _summed(forest: Forest) -> Forest:
    if forest.aggregate == "AVERAGE":
        value = (forest.value / len(forest.roots)).astype(forest.value.dtype)
        return replace(forest, aggregate="SUM", value=value)
    if forest.aggregate != "SUM":
        raise RecipeError(
            f"prune: the trees are combined by {forest.aggregate}, not summed: leave prune out"
        )
    return forest


def _below(forest: Forest, rows: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean `[nodes, targets]` of the leaves below each node, weighted by rows, and the sum
    `[nodes]` of their squared distances from it."""
    # Where no row comes by, leaves count alike, and next to nothing.
    weight = np.where(forest.leaves, forest.reach(rows) + 1e-6, 0.0)
    mean = forest.value.astype(np.float64)
    spread = np.zeros(len(weight))
    for level in reversed(forest.levels()):
        inner = level[~forest.leaves[level]]
        one, two = forest.true[inner], forest.false[inner]
        weight[inner] = weight[one] + weight[two]
        part = (weight[two] / weight[inner])[:, None]
        gap = mean[two] - mean[one]
        mean[inner] = mean[one] + part * gap
        spread[inner] = spread[one] + spread[two] + weight[one] * part[:, 0] * (gap**2).sum(axis=1)
    return mean, spread


def _worth_collapsing(
    forest: Forest, spread: NDArray[np.float64], price: float
) -> NDArray[np.bool_]:
    """bool `[nodes]`: inner nodes that cost less as a leaf, where each leaf costs `price`."""
    cost = np.full(len(spread), price)
    chosen = np.zeros(len(spread), dtype=bool)
    for level in reversed(forest.levels()):
        inner = level[~forest.leaves[level]]
        apart = cost[forest.true[inner]] + cost[forest.false[inner]]
        chosen[inner] = spread[inner] + price <= apart
        cost[inner] = np.minimum(spread[inner] + price, apart)
    return chosen


def _splits_left(forest: Forest, spread: NDArray[np.float64], price: float) -> int:
    chosen = _worth_collapsing(forest, spread, price)
    left, here = 0, forest.roots
    while len(here):
        inner = here[~forest.leaves[here] & ~chosen[here]]
        left += len(inner)
        here = np.concatenate([forest.true[inner], forest.false[inner]])
    return left


def _nearest(sorted_values: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """int64 `[wanted]`: place of the nearest of `sorted_values`."""
    between = (sorted_values[1:] + sorted_values[:-1]) / 2
    return np.searchsorted(between, wanted).astype(np.int64)


def _lloyd(
    values: NDArray[np.float64], weights: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """float64 `[values]`: the level of each of the sorted `values`."""
    levels = values[np.linspace(0, len(values) - 1, count).round().astype(int)]
    for _ in range(_LLOYD_ROUNDS):
        place = _nearest(levels, values)
        total = np.bincount(place, weights=weights, minlength=len(levels))
        sums = np.bincount(place, weights=weights * values, minlength=len(levels))
        levels = np.where(total > 0, sums / np.maximum(total, 1e-300), levels)
    return np.asarray(levels[_nearest(levels, values)])
