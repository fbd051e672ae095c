"""SASRec's parameters as an ONNX graph that keeps the bundle contract (docs/bundle.md).

The last block computes its last position only: nobody asks for the others. Histories may be
shorter than the model's length: positions count from the end.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto, numpy_helper

from models.family import Params
from models.graph import (
    ATTENTION_PARTS,
    INPUT_SCALE,
    ITEM_TABLE,
    ForeignGraphError,
    Graph,
    Weights,
    floats,
)
from models.sasrec import Shape
from worker.manifest import INPUTS, OUTPUTS, STATE

NAME = "sasrec"
POSITIONS = "positions"
HEAD_SPLIT = "head_split"
#: Added to the attention scores of what may not be seen: weights of e^-60 (9e-27) beside those of
#: what may, nothing in float32. Not less, as is usual: from -87 on they would be denormal numbers,
#: with which ONNX Runtime's softmax takes eight times as long, a fifth of the whole model.
BLOCKED = -60.0


def export(params: Params, shape: Shape) -> bytes:
    """The model as serialized ONNX, float32."""
    graph = Graph()
    # Positions come first, [length, batch, width]: so the transposes that attention wants before
    # its products are of the kind that ONNX Runtime makes part of them, and the last position is
    # one piece of memory. A history takes a sixth less time.
    ids = graph.add("Transpose", "history", perm=[1, 0])
    x = graph.look_up(params["items"], shape.input_scale, ids)
    positions = graph.weight(POSITIONS, floats(params["positions"]))
    # Of positions and of what may see what, the last `length` count.
    start = graph.add("Neg", graph.add("Shape", "history", start=1, end=2))
    end = graph.integers(shape.length)
    placed = graph.add("Slice", positions, start, end, graph.integers(0))
    x = graph.add("Add", x, graph.add("Unsqueeze", placed, graph.integers(1)))
    real = graph.add("Greater", "history", graph.integers(0))
    padding = graph.add("Where", real, graph.constant(_f(0.0)), graph.constant(_f(BLOCKED)))
    padding = graph.add("Unsqueeze", padding, graph.integers(1, 2))
    # Nobody may look ahead. Made by nodes of constants, which are folded while loading: stored, it
    # would be larger than the weights of a block.
    square = graph.weight("causal_shape", np.array([shape.length, shape.length]))
    causal = graph.add("ConstantOfShape", square, value=numpy_helper.from_array(_f(BLOCKED)))
    causal = graph.add("Trilu", causal, graph.weight("causal_from", np.array(1)), upper=1)
    if len(params["blocks"]) > 1:
        for axis in (0, 1):
            causal = graph.add("Slice", causal, start, end, graph.integers(axis))
    for number, block in enumerate(params["blocks"]):
        last_only = number == len(params["blocks"]) - 1
        mask = padding
        if not last_only:
            # The last position may look at everything: there the causal mask is all zeros.
            mask = graph.add("Min", padding, causal)
        x = _block(graph, x, block, mask, shape, f"block{number}", last_only=last_only)
    x = graph.norm(x, params["norm"], "norm")
    # The user's state, which a text encoder's vectors are scored against (docs/text.md).
    graph.add("Squeeze", x, graph.integers(0), name="user_state", output=STATE.name)
    graph.rank(len(params["items"]) - 1)
    return graph.finish(NAME, INPUTS, [*OUTPUTS, STATE])


def read_params(model: ModelProto) -> tuple[Params, Shape]:
    """Parameters and shape of a float32 graph that `export` made: its inverse.

    Raises:
        ForeignGraphError: the graph is another model's, or its weights are no longer float32.
    """
    weights = Weights(model)
    blocks: list[Params] = []
    while f"block{len(blocks)}_out_weight" in weights:
        name = f"block{len(blocks)}"
        earlier = (("qkv",), ("query", "key_value"))
        stored = next(
            (at for at in earlier if f"{name}_{at[-1]}_weight" in weights), ATTENTION_PARTS
        )
        parts = [weights.linear(f"{name}_{part}") for part in stored]
        qkv = {key: np.concatenate([part[key] for part in parts], -1) for key in ("w", "b")}
        blocks.append({"qkv": qkv} | {n: weights.norm(f"{name}_{n}") for n in ("norm1", "norm2")})
        blocks[-1] |= {part: weights.linear(f"{name}_{part}") for part in ("out", "up", "down")}
    table, positions = weights.value(ITEM_TABLE), weights.value(POSITIONS)
    if not blocks:
        raise ForeignGraphError("the graph has no attention blocks of `streamrec models train`")
    shape = Shape(
        item_count=len(table) - 1,
        length=len(positions),
        width=table.shape[1],
        blocks=len(blocks),
        input_scale=float(weights.value(INPUT_SCALE)[0]),
        head_width=int(weights.integers(HEAD_SPLIT)[-1]),
    )
    return {
        "items": table, "positions": positions, "blocks": blocks, "norm": weights.norm("norm")
    }, shape  # fmt: skip


def _block(
    graph: Graph, x: str, block: Params, mask: str, shape: Shape, name: str, *, last_only: bool
) -> str:
    weights, biases = np.asarray(block["qkv"]["w"]), np.asarray(block["qkv"]["b"])
    head_width = shape.head_width
    width = weights.shape[1] // 3  # of all heads together
    heads = width // head_width
    normed = graph.norm(x, block["norm1"], f"{name}_norm1")
    asked = normed
    if last_only:
        last = graph.integers(-1)
        asked = graph.add("Gather", normed, last, axis=0)
        x = graph.add("Gather", x, last, axis=0)
    split = graph.weight(f"{HEAD_SPLIT}_{name}", np.array([0, 0, heads, head_width]))

    def by_head(tensor: str, part: str, order: list[int]) -> str:
        start = ATTENTION_PARTS.index(part) * width
        own = slice(start, start + width)
        made = graph.linear(tensor, weights[:, own], biases[own], f"{name}_{part}")
        return graph.add("Transpose", graph.add("Reshape", made, split), perm=order)

    q = by_head(asked, "query", [1, 2, 0, 3])
    k = by_head(normed, "key", [1, 2, 3, 0])
    v = by_head(normed, "value", [1, 2, 0, 3])
    weighted = graph.add("MatMul", q, k)
    weighted = graph.add("Mul", weighted, graph.constant(_f(1.0 / math.sqrt(head_width))))
    weighted = graph.add("Softmax", graph.add("Add", weighted, mask), axis=-1)
    mixed = graph.add("Transpose", graph.add("MatMul", weighted, v), perm=[2, 0, 1, 3])
    mixed = graph.add("Reshape", mixed, graph.integers(0, 0, width))
    x = graph.add(
        "Add", x, graph.linear(mixed, block["out"]["w"], block["out"]["b"], f"{name}_out")
    )
    return graph.feed_forward(x, block, name)


def _f(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)
