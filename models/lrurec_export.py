"""LRURec's parameters as an ONNX graph that keeps the bundle contract (docs/recurrent.md).

The recurrence is a `Scan` over the items given, so that one new item costs one step. In the last
block nobody asks for earlier positions: only its states pass over them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from models.family import Params
from models.graph import INPUT_SCALE, ITEM_TABLE, ForeignGraphError, Graph, Weights, floats
from models.lrurec import Shape, recurrence
from worker.manifest import CARRY, INPUTS, NEXT_CARRY, OUTPUTS, STATE, carry_spec

NAME = "lrurec"
#: The metadata that says how many items of a history are read: no weight depends on it.
_LENGTH = "max_length"
#: Constants of a block's `Scan`, float32 `[2, channels]`: what the real and the imaginary part of a
#: state is multiplied by, and the other part.
_SAME, _CROSS = "lambda_less_one", "lambda_cross"


def export(params: Params, shape: Shape) -> bytes:
    """The model as serialized ONNX, float32."""
    graph = Graph()
    x = graph.look_up(params["items"], shape.input_scale)
    real = graph.add("Greater", "history", graph.integers(0))
    real = graph.add("Cast", real, to=TensorProto.FLOAT)
    real = graph.add("Unsqueeze", real, graph.integers(2, 3))
    next_carries: list[str] = []
    place = 0
    for number, block in enumerate(params["blocks"]):
        name = f"block{number}"
        size = np.shape(block["read"]["w"])[0]
        at = [graph.integers(value) for value in (place, place + size, 1)]
        carry = graph.add("Slice", CARRY, *at)
        place += size
        last_only = number == len(params["blocks"]) - 1
        normed = graph.norm(x, block["norm1"], f"{name}_norm1")
        last, states = _recurrence(graph, normed, carry, real, block, name, last_only=last_only)
        next_carries.append(last)
        if last_only:
            x = graph.add("Gather", x, graph.constant(np.array(-1)), axis=1)
            states = last
        x = graph.add(
            "Add", x, graph.linear(states, block["read"]["w"], block["read"]["b"], f"{name}_read")
        )
        x = graph.feed_forward(x, block, name)
    graph.add("Concat", *next_carries, axis=1, output=NEXT_CARRY)
    graph.norm(x, params["norm"], "norm", output=STATE.name)
    graph.rank(len(params["items"]) - 1)
    return graph.finish(
        NAME,
        [*INPUTS, carry_spec(CARRY, place)],
        [*OUTPUTS, STATE, carry_spec(NEXT_CARRY, place)],
        {_LENGTH: str(shape.length)},
    )


def read_params(model: ModelProto) -> tuple[Params, Shape]:
    """Parameters and shape of a float32 graph that `export` made: its inverse, up to rounding.

    Raises:
        ForeignGraphError: the graph is another model's, or its weights are no longer float32.
    """
    weights = Weights(model)
    scans = {node.name: node for node in model.graph.node if node.op_type == "Scan"}
    facts = {fact.key: fact.value for fact in model.metadata_props}
    blocks: list[Params] = []
    while f"block{len(blocks)}_recurrence" in scans:
        name = f"block{len(blocks)}"
        block = _read_recurrence(scans[f"{name}_recurrence"])
        drive, gamma = weights.linear(f"{name}_drive"), _twice(recurrence(block)[2])
        block["drive"] = {"w": drive["w"] / gamma, "b": drive["b"] / gamma}
        block |= {part: weights.linear(f"{name}_{part}") for part in ("read", "up", "down")}
        blocks.append(block | {n: weights.norm(f"{name}_{n}") for n in ("norm1", "norm2")})
    table = weights.value(ITEM_TABLE)
    if not blocks or _LENGTH not in facts:
        raise ForeignGraphError("the graph has no recurrent blocks of `streamrec models train`")
    shape = Shape(
        item_count=len(table) - 1,
        length=int(facts[_LENGTH]),
        width=table.shape[1],
        blocks=len(blocks),
        input_scale=float(weights.value(INPUT_SCALE)[0]),
        channels=len(blocks[0]["nu"]),
    )
    return {"items": table, "blocks": blocks, "norm": weights.norm("norm")}, shape


def _recurrence(
    graph: Graph, x: str, carry: str, real: str, block: Params, name: str, *, last_only: bool
) -> tuple[str, str]:
    """The state after the last item, float32 `[batch, 2 channels]`, and those after each item,
    `[batch, length, 2 channels]`, unless they are not asked for. Real parts come first."""
    channels = np.shape(block["nu"])[0]
    gamma = _twice(recurrence(block)[2])
    drive = block["drive"]
    driven = graph.linear(x, drive["w"] * gamma, drive["b"] * gamma, f"{name}_drive")
    driven = graph.add("Reshape", driven, graph.integers(0, 0, 2, channels))
    start = graph.add("Reshape", carry, graph.integers(0, 2, channels))
    last, states = f"{name}_last", f"{name}_states"
    graph.nodes.append(
        helper.make_node(
            "Scan", [start, driven, real], [last] if last_only else [last, states],
            name=f"{name}_recurrence", body=_step(block, last_only=last_only), num_scan_inputs=2,
            scan_input_axes=[1, 1], **({} if last_only else {"scan_output_axes": [1]}),
        )
    )  # fmt: skip
    flat = graph.add("Reshape", last, graph.integers(0, 2 * channels))
    if last_only:
        return flat, ""
    return flat, graph.add("Reshape", states, graph.integers(0, 0, 2 * channels))


def _step(block: Params, *, last_only: bool) -> Any:
    """One item: `state <- lambda * state + driven`, written as a change of the state, which is
    multiplied by 0 at padding: an exact no-op, and several times faster than to choose by Where."""
    channels = np.shape(block["nu"])[0]
    re, im, _ = (floats(part) for part in recurrence(block))
    weights = [
        numpy_helper.from_array(np.stack([re, re]) - np.float32(1.0), _SAME),
        numpy_helper.from_array(np.stack([-im, im]), _CROSS),
        numpy_helper.from_array(np.array([1, 0]), "swapped"),
    ]
    make = helper.make_node
    nodes = [
        make("Mul", ["state", _SAME], ["same"]),
        make("Gather", ["state", "swapped"], ["other"], axis=1),
        make("Mul", ["other", _CROSS], ["cross"]),
        make("Add", ["same", "cross"], ["turned"]),
        make("Add", ["turned", "driven"], ["moved"]),
        make("Mul", ["moved", "real"], ["change"]),
        make("Add", ["state", "change"], ["next_state"]),
    ]
    shape = ["batch", 2, channels]

    def value(name: str, dims: list[Any] | None = None) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims or shape)

    outputs = [value("next_state")]
    if not last_only:
        nodes.append(make("Identity", ["next_state"], ["shown"]))
        outputs.append(value("shown"))
    inputs = [value("state"), value("driven"), value("real", ["batch", 1, 1])]
    return helper.make_graph(nodes, "step", inputs, outputs, weights)


def _read_recurrence(scan: Any) -> Params:
    body = next(attribute.g for attribute in scan.attribute if attribute.name == "body")
    stored = {w.name: numpy_helper.to_array(w).astype(np.float64) for w in body.initializer}
    re, im = stored[_SAME][0] + 1.0, stored[_CROSS][1]
    # Zero, and no turn at all, have no logarithm: take the next best.
    modulus = np.maximum(np.hypot(re, im), 1e-30)
    turn = np.arctan2(im, re) % (2.0 * math.pi)
    turn = np.where(turn > 0.0, turn, 2.0 * math.pi)
    return {"nu": floats(np.log(-np.log(modulus))), "theta": floats(np.log(turn))}


def _twice(gamma: Any) -> Any:
    """For real and imaginary parts, side by side."""
    return np.tile(floats(gamma), 2)
