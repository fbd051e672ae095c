"""Full dynamic int8 quantization of an exported SASRec graph.

Linear layers go through `onnxruntime.quantization` (weights int8 per channel, activations uint8 per
batch at run time). The item table is quantized here, by row, since ONNX Runtime's tool would store
it twice: one int8 copy serves look-up (dequantized rows) and scoring (integer product, rescaled per
item).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from models.export import ITEM_TABLE, LOOKUP_NODE, SCORE_NODE


def quantize_int8(model: bytes) -> bytes:
    """int8 form of `model`, a graph from models/export.py."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[SCORE_NODE],
            extra_options={"MatMulConstBOnly": True},
        )
        quantized = onnx.load(target)
    _quantize_table(quantized)
    onnx.checker.check_model(quantized)
    return bytes(quantized.SerializeToString())


def quantize_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 `[rows, width]` and scale float32 `[rows, 1]`, symmetric: `table ~ int8 * scale`."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
    return np.clip(np.rint(table / scale), -127, 127).astype(np.int8), scale


def _quantize_table(model: ModelProto) -> None:
    graph = model.graph
    stored = next(w for w in graph.initializer if w.name == ITEM_TABLE)
    rows, scale = quantize_rows(numpy_helper.to_array(stored))
    graph.initializer.remove(stored)
    graph.initializer.extend(
        [
            numpy_helper.from_array(rows, ITEM_TABLE),
            numpy_helper.from_array(scale, "item_scale"),
            numpy_helper.from_array(scale.reshape(1, -1), "item_scale_row"),
        ]
    )
    nodes = []
    for node in graph.node:
        if node.name == LOOKUP_NODE:
            nodes += [
                helper.make_node("Gather", [ITEM_TABLE, "history"], ["rows_int8"], axis=0),
                helper.make_node("Gather", ["item_scale", "history"], ["rows_scale"], axis=0),
                helper.make_node("Cast", ["rows_int8"], ["rows_float"], to=onnx.TensorProto.FLOAT),
                helper.make_node("Mul", ["rows_float", "rows_scale"], list(node.output)),
            ]
        elif node.name == SCORE_NODE:
            state, items = node.input
            nodes += [
                helper.make_node(
                    "DynamicQuantizeLinear", [state], ["state_int8", "state_scale", "state_zero"]
                ),
                helper.make_node(
                    "MatMulInteger", ["state_int8", items, "state_zero"], ["product_int32"]
                ),
                helper.make_node(
                    "Cast", ["product_int32"], ["product_float"], to=onnx.TensorProto.FLOAT
                ),
                helper.make_node("Mul", ["state_scale", "item_scale_row"], ["product_scale"]),
                helper.make_node("Mul", ["product_float", "product_scale"], list(node.output)),
            ]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    # Shapes and types that the tool inferred for the float table no longer hold.
    del graph.value_info[:]
