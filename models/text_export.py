"""A fitted text encoder as an ONNX graph, and the output `state` for graphs that lack it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, checker, helper

from models.graph import SCORE_NODE, Graph
from models.text import Encoder, TextError
from worker.manifest import STATE

OPSET = 20


def export_text(encoder: Encoder, *, int8: bool = True) -> bytes:
    """The encoder as serialized ONNX: `grams` int64 `[n, grams]` -> `vectors` float32 `[n, width]`.

    Args:
        int8: store the table by row in int8 with a float32 scale, a quarter of the size.
    """
    graph = Graph()
    rows = encoder.rows * np.float32(encoder.gain)
    rows[0] = 0.0
    if int8:
        largest = np.abs(rows).max(axis=1, keepdims=True)
        scale = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
        table = np.rint(rows / scale).astype(np.int8)
        found = _gather(graph, "rows", table)
        found = graph.add("Cast", found, to=TensorProto.FLOAT)
        found = graph.add("Mul", found, _gather(graph, "scales", scale))
    else:
        found = _gather(graph, "rows", rows)
    grams_axis = graph.constant(np.array([1]))
    summed = graph.add("ReduceSum", found, grams_axis, keepdims=0)
    weight = _gather(graph, "idf_squared", (encoder.idf**2)[:, None])
    length = graph.add("ReduceSum", weight, grams_axis, keepdims=0)
    # A text without grams has sum and length 0: it gets the mean item.
    length = graph.add("Max", length, graph.constant(np.full(1, 1e-12, dtype=np.float32)))
    scaled = graph.add("Div", summed, graph.add("Sqrt", length))
    graph.nodes.append(
        helper.make_node("Add", [scaled, graph.weight("base", encoder.base)], ["vectors"])
    )
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "text",
            [helper.make_tensor_value_info("grams", TensorProto.INT64, ["n", "grams"])],
            [
                helper.make_tensor_value_info(
                    "vectors", TensorProto.FLOAT, ["n", encoder.base.shape[0]]
                )
            ],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="streamrec",
        ir_version=10,
    )
    checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _gather(graph: Graph, name: str, table: NDArray[Any]) -> str:
    return graph.add("Gather", graph.weight(name, table), "grams", axis=0)


def with_state(model: bytes) -> bytes:
    """`model` with the output `state`; graphs that `models.export` made before it had one get it.

    Raises:
        TextError: the graph has none, and it is not known where it would be.
    """
    graph = onnx.load_from_string(model)
    if any(output.name == STATE.name for output in graph.graph.output):
        return model
    source = None
    for node in graph.graph.node:
        # Before quantization, and as the first release's int8 graphs have it.
        if node.name == SCORE_NODE or "state_int8" in node.output:
            source = node.input[0]
    if source is None:
        raise TextError(
            f"model.onnx has no output {STATE.name!r} and was not made by `streamrec models"
            " train`: add that output (docs/bundle.md)"
        )
    graph.graph.node.append(helper.make_node("Identity", [source], [STATE.name]))
    graph.graph.output.append(
        helper.make_tensor_value_info(STATE.name, TensorProto.FLOAT, ["batch", "width"])
    )
    checker.check_model(graph)
    return bytes(graph.SerializeToString())
