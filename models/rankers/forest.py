"""A tree ensemble as arrays: read it from any of ONNX's three operators, write it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from models.rankers.errors import RankerError
from models.rankers.graph import TREE_OPS, attributes, ranker_nodes, set_attributes, values_at
from models.rankers.graph import with_nodes as replaced

#: Codes of the `TreeEnsemble` operator of ai.onnx.ml 5.
MODES = (
    "BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ",
)  # fmt: skip
LEAF = 255
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
#: A graph that shares subtrees could unfold without end.
MAX_NODES = 50_000_000


@dataclass(frozen=True)
class Forest:
    """Trees side by side, node by node; a child always comes after its parent.

    `roots` int64 `[trees]`; per node `[nodes]`: `feature` int64, `threshold` float, `mode` uint8
    (index into `MODES`, or `LEAF`), `true` and `false` int64 (children; -1 in a leaf), `missing`
    bool (NaN takes the true branch); `value` float `[nodes, targets]` (zero but in leaves).
    """

    roots: NDArray[np.int64]
    feature: NDArray[np.int64]
    threshold: NDArray[Any]
    mode: NDArray[np.uint8]
    true: NDArray[np.int64]
    false: NDArray[np.int64]
    missing: NDArray[np.bool_]
    value: NDArray[Any]
    aggregate: str
    #: Added to the aggregate, float `[targets]`.
    base: NDArray[Any]

    @property
    def leaves(self) -> NDArray[np.bool_]:
        """bool `[nodes]`."""
        return np.asarray(self.mode == LEAF)

    @property
    def splits(self) -> int:
        """Number of inner nodes."""
        return int((~self.leaves).sum())

    def levels(self) -> list[NDArray[np.int64]]:
        """Nodes by depth, roots first."""
        found = []
        here = self.roots
        while len(here):
            found.append(here)
            inner = here[~self.leaves[here]]
            here = np.concatenate([self.true[inner], self.false[inner]])
        return found

    def tree_of(self) -> NDArray[np.int64]:
        """int64 `[nodes]`: place in `roots` of each node's tree."""
        tree = np.zeros(len(self.mode), dtype=np.int64)
        tree[self.roots] = np.arange(len(self.roots))
        for level in self.levels():
            inner = level[~self.leaves[level]]
            tree[self.true[inner]] = tree[self.false[inner]] = tree[inner]
        return tree

    def leaf_of(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        """int64 `[rows, trees]`: the leaf that each row reaches in each tree."""
        at = np.tile(self.roots, (len(rows), 1))
        while True:
            row, tree = np.nonzero(~self.leaves[at])
            if not len(row):
                return at
            node = at[row, tree]
            found = rows[row, self.feature[node]]
            yes = _holds(self.mode[node], found, self.threshold[node])
            yes |= self.missing[node] & np.isnan(found)
            at[row, tree] = np.where(yes, self.true[node], self.false[node])

    def score(self, rows: NDArray[Any]) -> NDArray[Any]:
        """float `[rows, targets]`, before any post transform."""
        values = self.value[self.leaf_of(rows)]
        return np.asarray(combine(values, self.aggregate) + self.base)

    def reach(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        """int64 `[nodes]`: how many rows pass each node."""
        counts = np.bincount(self.leaf_of(rows).ravel(), minlength=len(self.mode))
        for level in reversed(self.levels()):
            inner = level[~self.leaves[level]]
            counts[inner] = counts[self.true[inner]] + counts[self.false[inner]]
        return counts

    def as_leaves(self, nodes: NDArray[np.bool_], values: NDArray[Any]) -> Forest:
        """The forest with the nodes of the mask `[nodes]` made leaves of `values`
        `[nodes, targets]`; what hung below them is gone."""
        changed = replace(
            self,
            mode=np.where(nodes, LEAF, self.mode).astype(np.uint8),
            true=np.where(nodes, -1, self.true),
            false=np.where(nodes, -1, self.false),
            value=np.where(nodes[:, None], values.astype(self.value.dtype), self.value),
        )
        return changed.tidied()

    def tidied(self) -> Forest:
        """The forest without nodes that no root leads to."""
        order = np.concatenate([*self.levels(), np.zeros(0, dtype=np.int64)])
        place = np.full(len(self.mode) + 1, -1, dtype=np.int64)  # the last: -1 stays -1
        place[order] = np.arange(len(order))
        return replace(
            self,
            roots=place[self.roots],
            feature=self.feature[order],
            threshold=self.threshold[order],
            mode=self.mode[order],
            true=place[self.true[order]],
            false=place[self.false[order]],
            missing=self.missing[order],
            value=self.value[order],
        )


#: From a forest and the float rows `[rows, features]` that reach it to a forest.
Step = Callable[[Forest, NDArray[Any]], Forest]


def combine(values: NDArray[Any], aggregate: str) -> NDArray[Any]:
    """Trees' values `[rows, trees, targets]` to `[rows, targets]`."""
    if aggregate == "SUM":
        return np.asarray(values.sum(axis=1))
    if aggregate == "AVERAGE":
        return np.asarray(values.mean(axis=1))
    return np.asarray(values.min(axis=1) if aggregate == "MIN" else values.max(axis=1))


def on_forests(model: ModelProto, rows: NDArray[Any], step: Step) -> ModelProto:
    """The model with every tree ensemble in it changed by `step`.

    `step` sees the rows as they come to the ensemble, behind scalers and the like.
    """
    changed = {}
    for node in ranker_nodes(model, TREE_OPS):
        forest = step(read_forest(node), values_at(model, node.input[0], rows))
        changed[node.output[0]] = [write_forest(node, forest)]
    return replaced(model, changed)


def read_forest(node: NodeProto) -> Forest:
    """The forest in a TreeEnsemble, TreeEnsembleRegressor or TreeEnsembleClassifier node.

    Raises:
        RankerError: the node contradicts itself, or tests for set membership.
    """
    try:
        if node.op_type == "TreeEnsemble":
            forest = _read_shared(attributes(node))
        else:
            forest = _read_listed(node.op_type, attributes(node))
    except (KeyError, IndexError, ValueError) as error:
        raise RankerError(
            f"the trees in node {node.name or node.output[0]!r} contradict themselves ({error}):"
            " export the model again"
        ) from None
    return forest


def write_forest(node: NodeProto, forest: Forest) -> NodeProto:
    """A copy of `node` that holds `forest` instead, in as few bytes as the operator allows."""
    if node.op_type == "TreeEnsemble":
        return set_attributes(node, _GONE, **shared_attributes(forest))
    return set_attributes(node, _GONE, **_listed_attributes(node, forest))


#: Attributes that are left out where they say nothing.
_GONE = (
    "nodes_hitrates", "nodes_hitrates_as_tensor", "nodes_missing_value_tracks_true", "nodes_values",
    "nodes_values_as_tensor", "base_values", "base_values_as_tensor", "class_weights",
    "class_weights_as_tensor", "target_weights", "target_weights_as_tensor",
)  # fmt: skip


def _read_listed(op: str, given: dict[str, Any]) -> Forest:
    """Operators of ai.onnx.ml 1 and 3: all nodes in lists, leaves' weights in others."""

    def floats(name: str) -> NDArray[Any] | None:
        tensor = given.get(f"{name}_as_tensor")
        if tensor is not None:
            return np.asarray(tensor)
        return np.array(given[name], dtype=np.float32) if name in given else None

    prefix = "target" if op == "TreeEnsembleRegressor" else "class"
    trees = np.array(given["nodes_treeids"], dtype=np.int64)
    ids = np.array(given["nodes_nodeids"], dtype=np.int64)
    names = [text.decode() for text in given["nodes_modes"]]
    codes = {name: code for code, name in enumerate(MODES)} | {"LEAF": LEAF}
    mode = np.array([codes[name] for name in names], dtype=np.uint8)
    leaf = mode == LEAF
    place = {pair: at for at, pair in enumerate(zip(trees.tolist(), ids.tolist(), strict=True))}
    if len(place) != len(trees):
        raise ValueError("a node id comes twice in a tree")

    def children(name: str) -> NDArray[np.int64]:
        pairs = zip(trees.tolist(), given[name], leaf.tolist(), strict=True)
        return np.array([-1 if end else place[tree, child] for tree, child, end in pairs])

    true, false = children("nodes_truenodeids"), children("nodes_falsenodeids")
    is_child = np.zeros(len(trees), dtype=bool)
    below = np.concatenate([true[~leaf], false[~leaf]])
    is_child[below] = True
    roots = np.flatnonzero(~is_child)
    if len(below) != is_child.sum() or len(np.unique(trees[roots])) != len(roots):
        raise ValueError("a tree has several roots, or a node several parents")
    weights = floats(f"{prefix}_weights")
    threshold = floats("nodes_values")
    if weights is None or threshold is None:
        raise ValueError("no thresholds or no weights")
    targets = np.array(given[f"{prefix}_ids"], dtype=np.int64)
    if prefix == "target":
        count = int(given.get("n_targets", targets.max(initial=0) + 1))
    else:
        count = int(targets.max(initial=0)) + 1
    value = np.zeros((len(trees), count), dtype=weights.dtype)
    owners = zip(given[f"{prefix}_treeids"], given[f"{prefix}_nodeids"], strict=True)
    np.add.at(value, (np.array([place[owner] for owner in owners]), targets), weights)
    value[~leaf] = 0
    missing = given.get("nodes_missing_value_tracks_true") or [0] * len(trees)
    base = floats("base_values")
    forest = Forest(
        roots=roots,
        feature=np.array(given["nodes_featureids"], dtype=np.int64),
        threshold=threshold,
        mode=mode,
        true=true,
        false=false,
        missing=np.array(missing, dtype=bool),
        value=value,
        aggregate=given.get("aggregate_function", b"SUM").decode(),
        base=np.zeros(count, value.dtype) if base is None else np.resize(base, count),
    )
    return forest.tidied()


def _read_shared(given: dict[str, Any]) -> Forest:
    """The operator of ai.onnx.ml 5: inner nodes and leaves apart, both may be shared. Unfolds."""
    ints = {name: np.array(v, dtype=np.int64) for name, v in given.items() if isinstance(v, list)}
    if "membership_values" in given:
        raise RankerError(
            "the trees test for set membership (BRANCH_MEMBER), which is not supported: export the"
            " model with one split per category"
        )
    weights, splits = np.asarray(given["leaf_weights"]), np.asarray(given["nodes_splits"])
    count = int(given.get("n_targets", 1))
    inner_count = len(splits)
    # Children numbered through: inner nodes first, then leaves.
    kids = [
        ints[f"nodes_{way}nodeids"] + np.where(ints[f"nodes_{way}leafs"] != 0, inner_count, 0)
        for way in ("true", "false")
    ]
    missing = ints.get("nodes_missing_value_tracks_true", np.zeros(inner_count, np.int64)) != 0
    # A tree of one leaf is stored as a node with that leaf on both sides.
    alone = (kids[0] == kids[1]) & (kids[0] >= inner_count)
    here = np.where(alone[ints["tree_roots"]], kids[0][ints["tree_roots"]], ints["tree_roots"])
    levels, total, sides = [], 0, []
    while len(here):
        levels.append(here)
        total += len(here)
        if total > MAX_NODES:
            raise ValueError(f"unfolded, they have more than {MAX_NODES} nodes")
        inner = here < inner_count
        next_true, next_false = kids[0][here[inner]], kids[1][here[inner]]
        offsets = np.arange(inner.sum())
        true, false = np.full(len(here), -1), np.full(len(here), -1)
        true[inner] = total + offsets
        false[inner] = total + len(offsets) + offsets
        sides.append((true, false))
        here = np.concatenate([next_true, next_false])
    nodes = np.concatenate(levels)
    is_inner = nodes < inner_count
    at, leaf = np.where(is_inner, nodes, 0), np.where(is_inner, 0, nodes - inner_count)
    value = np.zeros((total, count), dtype=weights.dtype)
    value[np.arange(total), ints["leaf_targetids"][leaf]] = weights[leaf]
    value[is_inner] = 0
    modes = np.asarray(given["nodes_modes"], dtype=np.uint8)
    if (modes >= len(MODES)).any():
        raise ValueError("an unknown mode")
    return Forest(
        roots=np.arange(len(levels[0])),
        feature=np.where(is_inner, ints["nodes_featureids"][at], 0),
        threshold=np.where(is_inner, splits[at], 0).astype(splits.dtype),
        mode=np.where(is_inner, modes[at], LEAF).astype(np.uint8),
        true=np.concatenate([side[0] for side in sides]),
        false=np.concatenate([side[1] for side in sides]),
        missing=is_inner & missing[at],
        value=value,
        aggregate=AGGREGATES[int(given.get("aggregate_function", 1))],
        base=np.zeros(count, weights.dtype),
    )


def shared_attributes(forest: Forest) -> dict[str, Any]:
    """Attributes of `TreeEnsemble` (ai.onnx.ml 5) in which equal leaves are stored once, and equal
    subtrees of different trees too. ONNX Runtime refuses an inner node that a tree leads to twice.

    Raises:
        ValueError: a leaf has weights for several targets, or there is a base value.
    """
    if (np.count_nonzero(forest.value, axis=1) > 1).any() or forest.base.any():
        raise ValueError("the operator holds one weight per leaf and no base values")
    forest = drop_equal_sides(forest)
    tree = forest.tree_of().tolist()
    ends, tests = _leaf_keys(forest), _tests(forest)
    leaves: dict[Any, int] = {}
    inner: dict[Any, int] = {}
    in_tree: set[tuple[int, int]] = set()
    code = [0] * len(tree)  # ~leaf, or inner node
    for node in range(len(tree) - 1, -1, -1):  # children first
        if ends[node] is not None:
            code[node] = ~leaves.setdefault(ends[node], len(leaves))
            continue
        feature, threshold, mode, missing, true, false = tests[node]
        copy = 0
        while True:
            key = (feature, threshold, mode, missing, code[true], code[false], copy)
            code[node] = inner.setdefault(key, len(inner))
            if (tree[node], code[node]) not in in_tree:
                break
            copy += 1
        in_tree.add((tree[node], code[node]))
    # A tree of one leaf is stored as a node with that leaf on both sides.
    roots = [
        inner.setdefault((0, 0.0, 0, False, at, at, 0), len(inner)) if at < 0 else at
        for at in (code[root] for root in forest.roots.tolist())
    ]
    # Small numbers take fewer bytes: what is named most comes first.
    nodes = list(inner)
    named = [side for node in nodes for side in node[4:6]]
    leaf_order = _by_use([~side for side in named if side < 0], len(leaves))
    node_order = _by_use([side for side in named if side >= 0], len(inner))
    leaf_rank, node_rank = np.argsort(leaf_order).tolist(), np.argsort(node_order).tolist()
    nodes = [nodes[at] for at in node_order]
    stored = list(leaves)
    stored = [stored[at] for at in leaf_order]

    def children(place: int) -> list[int]:
        return [
            leaf_rank[~node[place]] if node[place] < 0 else node_rank[node[place]] for node in nodes
        ]

    dtype = forest.threshold.dtype
    found: dict[str, Any] = {
        "tree_roots": [node_rank[root] for root in roots],
        "nodes_featureids": [node[0] for node in nodes],
        "nodes_splits": numpy_helper.from_array(np.array([node[1] for node in nodes], dtype)),
        "nodes_modes": numpy_helper.from_array(np.array([node[2] for node in nodes], np.uint8)),
        "nodes_truenodeids": children(4),
        "nodes_falsenodeids": children(5),
        "nodes_trueleafs": [int(node[4] < 0) for node in nodes],
        "nodes_falseleafs": [int(node[5] < 0) for node in nodes],
        "leaf_targetids": [leaf[0] for leaf in stored],
        "leaf_weights": numpy_helper.from_array(np.array([leaf[1] for leaf in stored], dtype)),
        "n_targets": forest.value.shape[1],
        "aggregate_function": AGGREGATES.index(forest.aggregate),
    }
    if any(node[3] for node in nodes):
        found["nodes_missing_value_tracks_true"] = [int(node[3]) for node in nodes]
    return found


def drop_equal_sides(forest: Forest) -> Forest:
    """Cut splits that lead to the same on both sides. Lossless."""
    ends, tests = _leaf_keys(forest), _tests(forest)
    seen: dict[Any, int] = {}
    shape = [0] * len(ends)
    stands_for = list(range(len(ends)))
    for node in range(len(ends) - 1, -1, -1):  # children first
        key = ends[node]
        if key is None:
            *test, true, false = tests[node]
            if shape[true] == shape[false]:
                shape[node], stands_for[node] = shape[true], stands_for[true]
                continue
            key = (*test, shape[true], shape[false])
        shape[node] = seen.setdefault(key, len(seen))
    place = np.array([*stands_for, -1], dtype=np.int64)  # the last: -1 stays -1
    return replace(
        forest, roots=place[forest.roots], true=place[forest.true], false=place[forest.false]
    ).tidied()


def _leaf_keys(forest: Forest) -> list[tuple[Any, ...] | None]:
    """Per node: what a leaf says, target and weight pairs flattened; None for inner nodes."""
    target = np.abs(forest.value).argmax(axis=1)
    if (np.count_nonzero(forest.value, axis=1) > 1).any():
        keys = [tuple(row) for row in forest.value.tolist()]
    else:
        weight = forest.value[np.arange(len(target)), target]
        keys = list(zip(target.tolist(), weight.tolist(), strict=True))
    return [key if end else None for key, end in zip(keys, forest.leaves.tolist(), strict=True)]


def _tests(forest: Forest) -> list[tuple[Any, ...]]:
    """Per node: feature, threshold, mode, missing, true, false."""
    columns = ("feature", "threshold", "mode", "missing", "true", "false")
    return list(zip(*(getattr(forest, name).tolist() for name in columns), strict=True))


def _by_use(named: list[int], count: int) -> NDArray[np.int64]:
    uses = np.bincount(np.array(named, dtype=np.int64), minlength=count)
    return np.argsort(-uses, kind="stable")


def _listed_attributes(node: NodeProto, forest: Forest) -> dict[str, Any]:
    prefix = "target" if node.op_type == "TreeEnsembleRegressor" else "class"
    tree = forest.tree_of()
    order = np.argsort(tree, kind="stable")  # a tree's nodes together, its root first
    first = np.searchsorted(tree[order], np.arange(len(forest.roots)))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order)) - first[tree[order]]
    leaf = forest.leaves
    # A leaf of all zeros still needs an entry, of a target that others have too.
    weighted = forest.value != 0
    usual = int(weighted.any(axis=0).argmax())
    weighted[leaf & ~weighted.any(axis=1), usual] = True
    owner, target = np.nonzero(weighted & leaf[:, None])
    weights = forest.value[owner, target]
    found: dict[str, Any] = {
        "nodes_treeids": tree[order].tolist(),
        "nodes_nodeids": number[order].tolist(),
        "nodes_featureids": np.where(leaf, 0, forest.feature)[order].tolist(),
        "nodes_modes": ["LEAF" if m == LEAF else MODES[m] for m in forest.mode[order].tolist()],
        "nodes_truenodeids": np.where(leaf, 0, number[forest.true])[order].tolist(),
        "nodes_falsenodeids": np.where(leaf, 0, number[forest.false])[order].tolist(),
        f"{prefix}_treeids": tree[owner].tolist(),
        f"{prefix}_nodeids": number[owner].tolist(),
        f"{prefix}_ids": target.tolist(),
    }
    if forest.missing.any():
        found["nodes_missing_value_tracks_true"] = forest.missing[order].astype(int).tolist()
    threshold = np.where(leaf, 0, forest.threshold)[order]
    # A binary classifier whose leaves all speak of one class takes one base value.
    base = forest.base if prefix == "target" or (target != usual).any() else forest.base[[usual]]
    for name, numbers in (
        ("nodes_values", threshold),
        (f"{prefix}_weights", weights),
        ("base_values", base),
    ):
        if name == "base_values" and not numbers.any():
            continue
        if numbers.dtype == np.float64:
            found[f"{name}_as_tensor"] = numpy_helper.from_array(numbers)
        else:
            found[name] = numbers.tolist()
    return found


def _holds(mode: NDArray[np.uint8], found: NDArray[Any], threshold: NDArray[Any]) -> NDArray[Any]:
    answers = np.select(
        [mode == code for code in range(len(MODES))],
        [
            found <= threshold,
            found < threshold,
            found >= threshold,
            found > threshold,
            found == threshold,
            found != threshold,
        ],
    )
    return np.asarray(answers, dtype=bool)
