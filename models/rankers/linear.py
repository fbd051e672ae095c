"""Make linear rankers smaller: fewer features, or coefficients in 8 or 4 bits.

A model of a few features gains nothing: the nodes that make it possible weigh more than what they
save. Both functions give the model back as it is where they would not shrink it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from models.rankers.compact import same_outputs
from models.rankers.graph import (
    LINEAR_OPS,
    NodeBuilder,
    attributes,
    class_labels,
    is_float,
    raise_opset,
    ranker_nodes,
    set_attributes,
    to_bytes,
    values_at,
    with_nodes,
)


@dataclass(frozen=True)
class Linear:
    """Score = rows x weights^T + intercepts: float32 `[outputs, features]` and `[outputs]`."""

    weights: NDArray[np.float32]
    intercepts: NDArray[np.float32]


def read_linear(node: NodeProto) -> Linear:
    """The weights of a LinearRegressor or LinearClassifier node."""
    given = attributes(node)
    coefficients = np.array(given["coefficients"], dtype=np.float32)
    outputs = int(given.get("targets", 1))
    if node.op_type == "LinearClassifier":
        labels = len(class_labels(given))
        outputs = max(1, len(given.get("intercepts") or [0] * labels))
    intercepts = given.get("intercepts") or [0.0] * outputs
    return Linear(coefficients.reshape(outputs, -1), np.array(intercepts, dtype=np.float32))


def prune_features(model: ModelProto, rows: NDArray[Any], share: float) -> ModelProto:
    """Leave out `share` of the features: those whose weight moves the score least on `rows`.

    What they add on average goes to the intercept. A Gather picks the features that stay.
    """
    smallest = model
    for index_type in (np.int32, np.uint16):
        replaced: dict[str, list[NodeProto]] = {}
        weights: list[Any] = []
        for node in ranker_nodes(model, LINEAR_OPS):
            linear = read_linear(node)
            found = values_at(model, node.input[0], rows).astype(np.float64)
            moves = np.abs(linear.weights).max(axis=0) * found.std(axis=0)
            drop = int(len(moves) * share)
            if drop == 0 or len(moves) > np.iinfo(index_type).max:
                continue
            order = np.argsort(moves, kind="stable")
            gone, kept = np.sort(order[:drop]), np.sort(order[drop:])
            shift = linear.weights[:, gone] @ found[:, gone].mean(axis=0)
            build = NodeBuilder(node.output[0])
            index = build.weight(kept.astype(index_type))
            if index_type is not np.int32:
                index = build.add("Cast", index, to=TensorProto.INT32)
            picked = build.add("Gather", node.input[0], index, axis=1)
            fewer = set_attributes(
                node,
                (),
                coefficients=linear.weights[:, kept].ravel().tolist(),
                intercepts=(linear.intercepts + shift).tolist(),
            )
            fewer.input[0] = picked
            replaced[node.output[0]] = [*build.nodes, fewer]
            weights += build.weights
        pruned = with_nodes(model, replaced, weights)
        raise_opset(pruned, "", 13)
        if len(to_bytes(pruned)) < len(to_bytes(smallest)):
            smallest = pruned
    return smallest


def quantize_coefficients(model: ModelProto, rows: NDArray[Any], bits: int) -> ModelProto:
    """Store coefficients as int8 or int4 with one scale per output.

    ONNX Runtime turns them to float32 when it loads the model, so a run costs what a MatMul costs;
    activations stay float32, since features come in all ranges.
    """
    replaced: dict[str, list[NodeProto]] = {}
    rounded: dict[str, list[NodeProto]] = {}
    weights: list[Any] = []
    for node in ranker_nodes(model, LINEAR_OPS):
        linear = read_linear(node)
        given = attributes(node)
        if not is_float(model, node.input[0], rows):
            return model
        largest = 2 ** (bits - 1) - 1
        scale = np.abs(linear.weights).max(axis=1, keepdims=True) / largest
        scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
        levels = np.clip(np.rint(linear.weights / scale), -largest, largest).astype(np.int8)
        build = NodeBuilder(node.output[0])
        columns = _integers(levels.T, bits)
        table = build.add("Cast", build.weight(columns), to=TensorProto.FLOAT)
        table = build.add("Mul", table, build.weight(scale.T))
        raw = build.add("MatMul", node.input[0], table)
        out = node.output[-1]
        transform = given.get("post_transform", b"NONE").decode()
        raw = build.add(
            "Add", raw, build.weight(linear.intercepts), out=out if transform == "NONE" else ""
        )
        try:
            build.transform(raw, transform, out)
            if node.op_type == "LinearClassifier":
                build.best_label(raw, class_labels(given), node.output[0])
        except ValueError:
            return model
        key = node.output[0]
        replaced[key] = build.nodes
        rounded[key] = [
            set_attributes(node, (), coefficients=(levels * scale).ravel().astype(float).tolist())
        ]
        weights += build.weights
    quantized = with_nodes(model, replaced, weights)
    raise_opset(quantized, "", 13 if bits == 8 else 21)
    quantized.ir_version = max(quantized.ir_version, 10)
    smaller = len(to_bytes(quantized)) < len(to_bytes(model))
    return (
        quantized
        if smaller and same_outputs(with_nodes(model, rounded), quantized, rows)
        else model
    )


def _integers(values: NDArray[np.int8], bits: int) -> Any:
    if bits == 8:
        return values
    flat = values.ravel()
    flat = np.append(flat, np.zeros(len(flat) % 2, np.int8)).astype(np.uint8) & 0xF
    packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
    return helper.make_tensor("", TensorProto.INT4, values.shape, packed.tobytes(), raw=True)
