"""Store the same forest in fewer bytes: the `TreeEnsemble` operator of ai.onnx.ml 5.

TreeEnsembleRegressor and TreeEnsembleClassifier spell out a mode string, a tree id, a node id and
a hit rate per node, and know leaves as nodes with further lists of weights. TreeEnsemble keeps
modes in a byte each and leaves apart, and lets nodes and leaves be shared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from models.rankers.errors import RankerError
from models.rankers.forest import Forest, read_forest, shared_attributes, write_forest
from models.rankers.graph import (
    ML,
    TREE_OPS,
    NodeBuilder,
    attributes,
    class_labels,
    feed,
    is_float,
    open_session,
    raise_opset,
    ranker_nodes,
    run,
    to_bytes,
    with_nodes,
)
from models.rankers.svm import read_svm

#: Largest relative difference of outputs that counts as the same model: float32 sums in another
#: order.
SAME = 1e-5
_RELABELLED = ("LabelEncoder", "CategoryMapper", "DictVectorizer")


def compact(model: ModelProto, rows: NDArray[Any]) -> ModelProto:
    """The smallest form of `model` that gives the same outputs on `rows` up to float32 rounding.

    Tried are: as it is; trees without attributes that say nothing; TreeEnsemble; for an
    SVMRegressor with a linear kernel its weights instead of its support vectors.
    """
    best = model
    for form in (_stripped, _as_tree_ensemble, _as_linear):
        try:
            tried = form(model, rows)
            smaller = len(to_bytes(tried)) < len(to_bytes(best))
            if smaller and same_outputs(model, tried, rows):
                best = tried
        except (ValueError, RankerError):
            continue  # this form cannot hold this model
    return best


def same_outputs(one: ModelProto, two: ModelProto, rows: NDArray[Any]) -> bool:
    """Whether two models give the same on `rows`, up to float32 rounding.

    A label may differ where its scores tie.
    """
    names = [output.name for output in one.graph.output]
    results = []
    for model in (one, two):
        try:
            session = open_session(to_bytes(model))
        except Exception:
            return False
        results.append(run(session, names, feed(model, rows)))
    return all(_same(a, b) for a, b in zip(*results, strict=True))


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, list):
        if [list(row) for row in one] != [list(row) for row in two]:
            return False
        one, two = (np.array([list(row.values()) for row in x]) for x in (one, two))
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if one.dtype.kind != "f":
        return float((one != two).mean()) <= 0.001 if one.size else True
    return bool(np.allclose(one, two, rtol=SAME, atol=SAME * float(np.abs(one).max(initial=1e-30))))


def _stripped(model: ModelProto, rows: NDArray[Any]) -> ModelProto:
    nodes = ranker_nodes(model, TREE_OPS)
    return with_nodes(model, {n.output[0]: [write_forest(n, read_forest(n))] for n in nodes})


def _as_linear(model: ModelProto, rows: NDArray[Any]) -> ModelProto:
    replaced = {}
    for node in ranker_nodes(model, ("SVMRegressor",)):
        machine = read_svm(node)
        if machine.kernel == "LINEAR" and not attributes(node).get("one_class"):
            replaced[node.output[0]] = [
                helper.make_node(
                    "LinearRegressor",
                    list(node.input),
                    list(node.output),
                    domain=ML,
                    coefficients=(machine.alphas @ machine.vectors).ravel().tolist(),
                    intercepts=machine.rho.tolist(),
                )
            ]
    return with_nodes(model, replaced)


def _as_tree_ensemble(model: ModelProto, rows: NDArray[Any]) -> ModelProto:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get(ML, 1) < 4 and any(n.op_type in _RELABELLED for n in model.graph.node):
        raise ValueError("these operators mean something else in ai.onnx.ml 5")
    replaced: dict[str, list[NodeProto]] = {}
    weights: list[Any] = []
    for node in ranker_nodes(model, TREE_OPS):
        if not is_float(model, node.input[0], rows):
            raise ValueError("TreeEnsemble wants thresholds of its input's type")
        build = NodeBuilder(node.output[0])
        _rewrite(build, node, read_forest(node), _used(model))
        replaced[node.output[0]] = build.nodes
        weights += build.weights
    changed = with_nodes(model, replaced, weights)
    raise_opset(changed, ML, 5)
    raise_opset(changed, "", 13)
    return changed


def _rewrite(build: NodeBuilder, node: NodeProto, forest: Forest, used: set[str]) -> None:
    """Add what gives the outputs of `node`, whose trees are `forest`."""
    if node.op_type == "TreeEnsemble":
        build.nodes.append(write_forest(node, forest))
        return
    given = attributes(node)
    transform = given.get("post_transform", b"NONE").decode()
    out = node.output[-1]
    if node.op_type == "TreeEnsembleRegressor":
        build.transform(
            _raw(build, node, forest, out if transform == "NONE" else ""), transform, out
        )
        return
    labels = class_labels(given)
    label = node.output[0]
    if len(labels) != 2 or len(set(given["class_ids"])) != 1:
        if forest.value.shape[1] != len(labels):
            raise ValueError("a class without leaves")
        build.transform(
            _raw(build, node, forest, out if transform == "NONE" else ""), transform, out
        )
        if label in used:
            build.best_label(out, labels, label)
        return
    # Two classes, one of them spoken of: ONNX Runtime makes up the other's score.
    column = given["class_ids"][0]
    forest = replace(forest, value=forest.value[:, [column]], base=forest.base[[column]])
    raw = _raw(build, node, forest, "")
    positive = not (forest.value < 0).any()
    if positive:
        other = build.add("Sub", build.weight(np.ones(1, np.float32)), raw)
        build.add("Concat", other, raw, out=out, axis=1)
    else:
        both = build.add("Concat", build.add("Neg", raw), raw, axis=1)
        build.transform(both, transform, out)
    if label in used:
        build.binary_label(raw, 0.5 if positive else 0.0, labels, label)


def _raw(build: NodeBuilder, node: NodeProto, forest: Forest, out: str) -> str:
    """Add the scores before the transform, `[rows, targets]`; return what they are called."""
    base = forest.base
    trees = replace(forest, base=np.zeros_like(base))
    raw = build.add(
        "TreeEnsemble",
        node.input[0],
        out="" if base.any() else out,
        domain=ML,
        **shared_attributes(trees),
    )
    return build.add("Add", raw, build.weight(base), out=out) if base.any() else raw


def _used(model: ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.input} | {
        output.name for output in model.graph.output
    }
