"""The end of a graph, from a user's state to ranked items, which methods for large catalogues
replace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from models.compress.draft import CompressionError, copied, feeds_for
from models.compress.rewriter import Rewriter
from worker.session import session_options

#: Histories whose states are computed at once.
_BATCH = 256


@dataclass(frozen=True)
class Tail:
    """Nodes `Transpose(table)`, `MatMul(state, .)`, `Slice` (no padding item), `TopK`, `Add(., 1)`.

    `table` and `state` are names of tensors: float32 `[1 + items, width]` and `[batch, width]`.
    """

    table: str
    state: str
    transpose: NodeProto
    score: NodeProto
    slice: NodeProto
    top: NodeProto
    add: NodeProto


class Nodes:
    """Nodes under construction for a graph; constants go into it at once."""

    def __init__(self, model: ModelProto, prefix: str) -> None:
        self._graph = model.graph
        self._prefix = prefix
        self._count = 0
        self._nodes: list[NodeProto] = []

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; its name."""
        name = self._name(op.lower())
        output = output or name
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def top(self, values: str, k: str, *, ranked: bool = True) -> tuple[str, str]:
        """Add TopK along axis 1; names of values and places."""
        name = self._name("topk")
        outputs = f"{name}_values", f"{name}_places"
        self._nodes.append(
            helper.make_node(
                "TopK", [values, k], list(outputs), name=name, axis=1, sorted=int(ranked)
            )
        )
        return outputs

    def constant(self, value: NDArray[Any]) -> str:
        """Add an initializer; its name."""
        name = self._name("constant")
        self._graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def integers(self, *values: int) -> str:
        """Add an int64 vector; its name."""
        return self.constant(np.array(values, dtype=np.int64))

    def taken(self) -> list[NodeProto]:
        """The nodes since the last call, in order."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def unpack_into(self, rewriter: Rewriter) -> None:
        """Hand the nodes since the last call over as work on constants, done while loading."""
        for node in self.taken():
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            rewriter.unpack(node.op_type, list(node.input), node.output[0], **attributes)

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self._prefix}_{kind}_{self._count}"


def find_tail(model: ModelProto, method: str) -> Tail:
    """The tail of a graph.

    Raises:
        CompressionError: it ends otherwise; `method` is for the message.
    """
    made_by = {output: node for node in model.graph.node for output in node.output}
    weights = {w.name: w for w in model.graph.initializer}

    def before(node: NodeProto, op: str, place: int = 0) -> NodeProto:
        found = made_by.get(node.input[place])
        if found is None or found.op_type != op:
            raise CompressionError(
                f"{method}: the graph must end as those of `streamrec models train` do: a product"
                " with the transposed item table, the padding item sliced off, TopK, plus 1"
                f" (no {op} before {node.op_type}); `tie` may help a graph of another exporter"
            )
        return found

    add = made_by.get("items")
    if add is None or add.op_type != "Add":
        raise CompressionError(f"{method}: the output `items` of the graph must be an Add of 1")
    top = before(add, "TopK")
    cut = before(top, "Slice")
    score = before(cut, "MatMul")
    transpose = before(score, "Transpose", 1)
    start = weights.get(cut.input[1])
    if transpose.input[0] not in weights or start is None or numpy_helper.to_array(start) != [1]:
        raise CompressionError(
            f"{method}: the scores must be those of a float32 item table, from item 1 on"
        )
    return Tail(transpose.input[0], score.input[0], transpose, score, cut, top, add)


def without(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Take nodes out of a graph."""
    kept = [node for node in model.graph.node if node not in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def states(model: ModelProto, tail: Tail, histories: NDArray[np.int64]) -> NDArray[np.float32]:
    """What the items are scored by, float32 `[batch, width]`, for int64 `[batch, length]`."""
    model = copied(model)
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info(tail.state, TensorProto.FLOAT, ["batch", None])
    )
    without(model, [tail.add, tail.top, tail.slice, tail.score, tail.transpose])
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    inputs = {node.name for node in session.get_inputs()}
    parts = []
    for start in range(0, len(histories), _BATCH):
        feeds = feeds_for(model, histories[start : start + _BATCH])
        (part,) = session.run(None, {name: feeds[name] for name in inputs})
        parts.append(part)
    return np.concatenate(parts)
