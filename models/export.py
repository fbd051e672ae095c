"""SASRec's parameters as an ONNX graph that keeps the bundle contract (docs/bundle.md).

The item table is stored once, for looking items up and for scoring them. The last block computes
its last position only: nobody asks for the others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from models.sasrec import Params, Shape
from worker.bundle import STATE
from worker.errors import StreamrecError

OPSET = 21
#: Names that compression and `read_params` look for.
ITEM_TABLE = "item_table"
POSITIONS = "positions"
INPUT_SCALE = "input_scale"
LOOKUP_NODE = "look_up_items"
SCORE_NODE = "score_items"
HEAD_SPLIT = "head_split"


class NotSasrecError(StreamrecError):
    """The graph was not made by `export`, or no longer is what it made."""

    exit_code = 66


class Graph:
    """An ONNX graph under construction; methods add a node and return its output's name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer."""
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output."""
        name = name or f"{op}_{len(self.nodes)}"
        output = f"{name}_out"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, value: NDArray[Any]) -> str:
        """Add a small unnamed constant."""
        return self.weight(f"constant_{len(self.weights)}", value)


def export(params: Params, shape: Shape) -> bytes:
    """The model as serialized ONNX, float32."""
    graph = Graph()
    table = np.array(params["items"], dtype=np.float32)
    graph.weight(ITEM_TABLE, table)
    positions = graph.weight(POSITIONS, np.asarray(params["positions"], dtype=np.float32))

    found = graph.add("Gather", ITEM_TABLE, "history", axis=0, name=LOOKUP_NODE)
    x = graph.add(
        "Mul", found, graph.weight(INPUT_SCALE, np.array([shape.input_scale], dtype=np.float32))
    )
    x = graph.add("Add", x, positions)
    real = graph.add("Greater", "history", graph.constant(np.zeros(1, np.int64)))
    padding = graph.add("Where", real, graph.constant(_f(0.0)), graph.constant(_f(-1e9)))
    padding = graph.add("Unsqueeze", padding, graph.constant(np.array([1, 2])))
    length = shape.length
    # Nobody may look ahead. Made by nodes of constants, which are folded while loading: stored, it
    # would be larger than the weights of a block.
    square = graph.weight("causal_shape", np.array([length, length]))
    blocked = numpy_helper.from_array(_f(-1e9))
    causal = graph.add("ConstantOfShape", square, value=blocked)
    causal = graph.add("Trilu", causal, graph.weight("causal_from", np.array(1)), upper=1)
    for number, block in enumerate(params["blocks"]):
        last_only = number == len(params["blocks"]) - 1
        mask = padding
        if not last_only:
            # The last position may look at everything: there the causal mask is all zeros.
            mask = graph.add("Add", padding, causal)
        x = _block(graph, x, block, mask, shape, f"block{number}", last_only=last_only)
    x = _norm(graph, x, params["norm"], "norm")
    # The user's state, which a text encoder's vectors are scored against (docs/text.md).
    axis = graph.constant(np.array([1]))
    graph.nodes.append(helper.make_node("Squeeze", [x, axis], [STATE.name], name="user_state"))
    x = STATE.name
    transposed = graph.add("Transpose", ITEM_TABLE, perm=[1, 0])
    logits = graph.add("MatMul", x, transposed, name=SCORE_NODE)
    # Column 0 is padding: leave it out, and count from 1 again after TopK.
    end = graph.constant(np.array([table.shape[0]]))
    one = graph.constant(np.array([1]))
    candidates = graph.add("Slice", logits, one, end, one)
    graph.nodes.append(
        helper.make_node("TopK", [candidates, "k"], ["scores", "places"], axis=1, name="top_k")
    )
    graph.nodes.append(helper.make_node("Add", ["places", one], ["items"], name="item_indexes"))

    def value(name: str, dtype: int, dims: list[str | int]) -> Any:
        return helper.make_tensor_value_info(name, dtype, dims)

    model: ModelProto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "sasrec",
            [
                value("history", TensorProto.INT64, ["batch", length]),
                value("k", TensorProto.INT64, [1]),
            ],
            [
                value("items", TensorProto.INT64, ["batch", "k_out"]),
                value("scores", TensorProto.FLOAT, ["batch", "k_out"]),
                value(STATE.name, TensorProto.FLOAT, ["batch", "width"]),
            ],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="streamrec",
        ir_version=10,
    )
    checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def read_params(model: ModelProto) -> tuple[Params, Shape]:
    """Parameters and shape of a float32 graph that `export` made: its inverse.

    Raises:
        NotSasrecError: the graph is another model's, or its weights are no longer float32.
    """
    weights = {w.name: w for w in model.graph.initializer}

    def value(name: str) -> NDArray[np.float32]:
        stored = weights.get(name)
        if stored is None or stored.data_type != TensorProto.FLOAT:
            raise NotSasrecError(
                f"the graph has no float32 weight {name!r}: methods that change a model's"
                " structure need a float32 bundle from `streamrec models train`"
            )
        return np.array(numpy_helper.to_array(stored), dtype=np.float32)

    def linear(name: str) -> dict[str, NDArray[np.float32]]:
        return {"w": value(f"{name}_weight"), "b": value(f"{name}_bias")}

    def norm(name: str) -> dict[str, NDArray[np.float32]]:
        return {"scale": value(f"{name}_scale"), "bias": value(f"{name}_shift")}

    blocks: list[Params] = []
    while f"block{len(blocks)}_out_weight" in weights:
        name = f"block{len(blocks)}"
        if f"{name}_qkv_weight" in weights:
            qkv = linear(f"{name}_qkv")
        else:
            parts = linear(f"{name}_query"), linear(f"{name}_key_value")
            qkv = {key: np.concatenate([part[key] for part in parts], -1) for key in ("w", "b")}
        blocks.append({"qkv": qkv, "norm1": norm(f"{name}_norm1"), "norm2": norm(f"{name}_norm2")})
        for part in ("out", "up", "down"):
            blocks[-1][part] = linear(f"{name}_{part}")
    table, positions = value(ITEM_TABLE), value(POSITIONS)
    if not blocks:
        raise NotSasrecError("the graph has no attention blocks of `streamrec models train`")
    split = next(w for w in weights.values() if w.name.startswith(HEAD_SPLIT))
    shape = Shape(
        item_count=len(table) - 1,
        length=len(positions),
        width=table.shape[1],
        blocks=len(blocks),
        head_width=int(numpy_helper.to_array(split)[-1]),
        input_scale=float(value(INPUT_SCALE)[0]),
    )
    return {
        "items": table, "positions": positions, "blocks": blocks, "norm": norm("norm")
    }, shape  # fmt: skip


def _block(
    graph: Graph, x: str, block: Params, mask: str, shape: Shape, name: str, *, last_only: bool
) -> str:
    weights, biases = np.asarray(block["qkv"]["w"]), np.asarray(block["qkv"]["b"])
    head_width = shape.head_width
    width = weights.shape[1] // 3  # of all heads together
    heads = width // head_width
    normed = _norm(graph, x, block["norm1"], f"{name}_norm1")
    asked = normed
    if last_only:
        last = graph.constant(np.array([-1]))
        asked = graph.add("Gather", normed, last, axis=1)
        x = graph.add("Gather", x, last, axis=1)
    if last_only:
        query = _linear(graph, asked, weights[:, :width], biases[:width], f"{name}_query")
        both = _linear(graph, normed, weights[:, width:], biases[width:], f"{name}_key_value")
    else:
        all3 = _linear(graph, normed, weights, biases, f"{name}_qkv")
        query = _part(graph, all3, 0, width)
        both = _part(graph, all3, width, 3 * width)
    split = graph.weight(f"{HEAD_SPLIT}_{name}", np.array([0, 0, heads, head_width]))

    def by_head(tensor: str, order: list[int]) -> str:
        return graph.add("Transpose", graph.add("Reshape", tensor, split), perm=order)

    q = by_head(query, [0, 2, 1, 3])
    k = by_head(_part(graph, both, 0, width), [0, 2, 3, 1])
    v = by_head(_part(graph, both, width, 2 * width), [0, 2, 1, 3])
    weighted = graph.add("MatMul", q, k)
    weighted = graph.add("Mul", weighted, graph.constant(_f(1.0 / math.sqrt(head_width))))
    weighted = graph.add("Softmax", graph.add("Add", weighted, mask), axis=-1)
    mixed = graph.add("Transpose", graph.add("MatMul", weighted, v), perm=[0, 2, 1, 3])
    mixed = graph.add("Reshape", mixed, graph.constant(np.array([0, 0, width])))
    out = block["out"]
    x = graph.add("Add", x, _linear(graph, mixed, out["w"], out["b"], f"{name}_out"))
    y = _norm(graph, x, block["norm2"], f"{name}_norm2")
    y = _linear(graph, y, block["up"]["w"], block["up"]["b"], f"{name}_up")
    y = graph.add("Gelu", y)
    y = _linear(graph, y, block["down"]["w"], block["down"]["b"], f"{name}_down")
    return graph.add("Add", x, y)


def _linear(graph: Graph, x: str, weight: Any, bias: Any, name: str) -> str:
    w = graph.weight(f"{name}_weight", np.asarray(weight, dtype=np.float32))
    b = graph.weight(f"{name}_bias", np.asarray(bias, dtype=np.float32))
    return graph.add("Add", graph.add("MatMul", x, w, name=f"{name}_matmul"), b)


def _norm(graph: Graph, x: str, layer: Params, name: str) -> str:
    scale = graph.weight(f"{name}_scale", np.asarray(layer["scale"], dtype=np.float32))
    bias = graph.weight(f"{name}_shift", np.asarray(layer["bias"], dtype=np.float32))
    return graph.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-6)


def _part(graph: Graph, x: str, start: int, end: int) -> str:
    at = [graph.constant(np.array([value])) for value in (start, end, 2)]
    return graph.add("Slice", x, *at)


def _f(value: float) -> NDArray[np.float32]:
    return np.array([value], dtype=np.float32)
