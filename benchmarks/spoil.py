"""Copies of a bundle that are spoiled as a training or publishing mistake would: each opens, and
only what users do with its lists shows that it is bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from worker.bundle import write_bundle
from worker.bundle_files import read_manifest
from worker.manifest import ITEMS_FILE, MODEL_FILE

_SCORES = "scores_of_model"

Change = Callable[[onnx.ModelProto, list[str]], list[str]]


def copied(source: Path, target: Path, change: Change | None = None) -> Path:
    """Write the bundle `source` again at `target`, after `change` of its graph and item ids.

    Golden outputs are recorded anew: a spoiled model agrees with itself.
    """
    manifest = read_manifest(source)
    fields = json.loads((source / "manifest.json").read_bytes())
    model = onnx.load_model_from_string((source / MODEL_FILE).read_bytes())
    items = (source / ITEMS_FILE).read_text(encoding="utf-8").splitlines()
    if change is not None:
        items = change(model, items)
    histories = [history for golden in manifest.golden for history in golden.history]
    kept = (
        "name", "surface", "created_at", "precision", "recipe", "max_length", "min_length",
        "any_length", "metrics", "golden_tolerance",
    )  # fmt: skip
    return write_bundle(
        target,
        model=model.SerializeToString(),
        items=items,
        golden_histories=np.array(histories, dtype=np.int64),
        version=target.name,
        parents=[source.name],
        **{name: fields[name] for name in kept if name in fields},
    )


def permuted(model: onnx.ModelProto, items: list[str]) -> list[str]:
    """Rows of the largest weight, the item table, in another order."""
    weights = model.graph.initializer
    at = max(range(len(weights)), key=lambda n: int(np.prod(weights[n].dims)))
    table = numpy_helper.to_array(weights[at])
    axis = int(np.argmax(table.shape))
    order = np.random.default_rng(7).permutation(table.shape[axis])
    weights[at].CopyFrom(
        numpy_helper.from_array(np.take(table, order, axis=axis), weights[at].name)
    )
    return items


def off_by_one(model: onnx.ModelProto, items: list[str]) -> list[str]:
    """Each index means the item of the next."""
    return [*items[1:], items[0]]


def slowed(steps: int, width: int = 256) -> Change:
    """The same scores after `steps` products of matrices for each history."""

    def change(model: onnx.ModelProto, items: list[str]) -> list[str]:
        graph = model.graph
        scores = next(one for one in graph.output if one.name == "scores")
        for node in graph.node:
            for at, name in enumerate(node.output):
                if name == "scores":
                    node.output[at] = _SCORES
        square = np.eye(width, dtype=np.float32)
        graph.initializer.extend(
            [
                numpy_helper.from_array(square, "waste_square"),
                numpy_helper.from_array(np.zeros((1, width), np.float32), "waste_row"),
                numpy_helper.from_array(np.array([0], np.int64), "waste_start"),
                numpy_helper.from_array(np.array([1], np.int64), "waste_one"),
                numpy_helper.from_array(np.array(0.0, np.float32), "waste_zero"),
            ]
        )
        node = helper.make_node
        nodes = [
            # [batch, 1], from the scores, so that it cannot be computed beforehand.
            node("Slice", [_SCORES, "waste_start", "waste_one", "waste_one"], ["waste_s"]),
            node("MatMul", ["waste_s", "waste_row"], ["waste_0"]),
        ]
        for step in range(steps):
            nodes.append(node("MatMul", [f"waste_{step}", "waste_square"], [f"waste_{step + 1}"]))
        nodes += [
            node("ReduceSum", [f"waste_{steps}", "waste_one"], ["waste_sum"], keepdims=1),
            node("Add", [_SCORES, "waste_sum"], [scores.name]),
        ]
        graph.node.extend(nodes)
        return items

    return change
