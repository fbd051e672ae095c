"""ONNX graphs under construction, and the parts that the graphs of all our models share.

The item table is stored once, for looking items up and for scoring them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from models.family import Params
from worker.errors import StreamrecError
from worker.manifest import STATE, TensorSpec

T = TypeVar("T")

OPSET = 21
#: Names that compression and `read_params` look for.
ITEM_TABLE = "item_table"
INPUT_SCALE = "input_scale"
LOOKUP_NODE = "look_up_items"
SCORE_NODE = "score_items"
#: What a position asks for, is found by, and gives: the trained projection in three pieces.
ATTENTION_PARTS = ("query", "key", "value")
#: Earlier releases kept some of them together, by these names.
ATTENTION_TOGETHER = {"qkv": ATTENTION_PARTS, "key_value": ATTENTION_PARTS[1:]}
#: What names of all weights of attention have in them.
ATTENTION_WEIGHTS = (*ATTENTION_PARTS, *ATTENTION_TOGETHER, "out")

_KINDS = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}


class ForeignGraphError(StreamrecError):
    """The graph was not made by `export`, or no longer is what it made."""

    exit_code = 66


class Graph:
    """An ONNX graph under construction; methods add a node and return its output's name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer."""
        self.weights.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def add(
        self,
        op: str,
        *inputs: str,
        name: str | None = None,
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node with one output."""
        name = name or f"{op}_{len(self.nodes)}"
        output = output or f"{name}_out"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, value: NDArray[Any]) -> str:
        """Add a small unnamed constant."""
        return self.weight(f"constant_{len(self.weights)}", value)

    def integers(self, *values: int) -> str:
        """Add a small int64 vector."""
        return self.constant(np.array(values, dtype=np.int64))

    def look_up(self, table: Any, scale: float, ids: str = "history") -> str:
        """Vectors of the items `ids`, float32 `[*ids, width]`, times `scale`."""
        self.weight(ITEM_TABLE, floats(table))
        found = self.add("Gather", ITEM_TABLE, ids, axis=0, name=LOOKUP_NODE)
        return self.add("Mul", found, self.weight(INPUT_SCALE, floats([scale])))

    def linear(self, x: str, weight: Any, bias: Any, name: str) -> str:
        """A product with a weight `[in, out]`, plus a bias `[out]`."""
        w = self.weight(f"{name}_weight", floats(weight))
        b = self.weight(f"{name}_bias", floats(bias))
        return self.add("Add", self.add("MatMul", x, w, name=f"{name}_matmul"), b)

    def norm(self, x: str, layer: Params, name: str, output: str | None = None) -> str:
        """Layer normalization along the last axis."""
        scale = self.weight(f"{name}_scale", floats(layer["scale"]))
        shift = self.weight(f"{name}_shift", floats(layer["bias"]))
        return self.add("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-6, output=output)

    def feed_forward(self, x: str, block: Params, name: str) -> str:
        """`x` plus what the position-wise part of a block makes of it."""
        y = self.norm(x, block["norm2"], f"{name}_norm2")
        y = self.linear(y, block["up"]["w"], block["up"]["b"], f"{name}_up")
        y = self.add("Gelu", y)
        y = self.linear(y, block["down"]["w"], block["down"]["b"], f"{name}_down")
        return self.add("Add", x, y)

    def rank(self, item_count: int) -> None:
        """From the user's state, the tensor `STATE`, to the outputs `items` and `scores`."""
        transposed = self.add("Transpose", ITEM_TABLE, perm=[1, 0])
        logits = self.add("MatMul", STATE.name, transposed, name=SCORE_NODE)
        # Column 0 is padding: leave it out, and count from 1 again after TopK.
        end, one = self.integers(item_count + 1), self.integers(1)
        candidates = self.add("Slice", logits, one, end, one)
        self.nodes.append(
            helper.make_node("TopK", [candidates, "k"], ["scores", "places"], axis=1, name="top_k")
        )
        self.add("Add", "places", one, name="item_indexes", output="items")

    def finish(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        facts: Mapping[str, str] | None = None,
    ) -> bytes:
        """The graph, checked and serialized; `facts` are kept as metadata."""

        def value(spec: TensorSpec) -> Any:
            return helper.make_tensor_value_info(spec.name, _KINDS[spec.dtype], spec.shape)

        model: ModelProto = helper.make_model(
            helper.make_graph(
                self.nodes, name, [value(i) for i in inputs], [value(o) for o in outputs],
                self.weights,
            ),
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="streamrec",
            ir_version=10,
        )  # fmt: skip
        helper.set_model_props(model, dict(facts or {}))
        checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString())


class Weights:
    """Weights of a finished graph by name."""

    def __init__(self, model: ModelProto) -> None:
        self._stored = {w.name: w for w in model.graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def integers(self, prefix: str) -> NDArray[np.int64]:
        """The first weight whose name begins so."""
        found = next(w for name, w in self._stored.items() if name.startswith(prefix))
        return np.array(numpy_helper.to_array(found), dtype=np.int64)

    def value(self, name: str) -> NDArray[np.float32]:
        """A float32 weight.

        Raises:
            ForeignGraphError: there is none of that name.
        """
        stored = self._stored.get(name)
        if stored is None or stored.data_type != TensorProto.FLOAT:
            raise ForeignGraphError(
                f"the graph has no float32 weight {name!r}: methods that change a model's"
                " structure need a float32 bundle from `streamrec models train`"
            )
        return np.array(numpy_helper.to_array(stored), dtype=np.float32)

    def linear(self, name: str) -> Params:
        """What `Graph.linear` stored."""
        return {"w": self.value(f"{name}_weight"), "b": self.value(f"{name}_bias")}

    def norm(self, name: str) -> Params:
        """What `Graph.norm` stored."""
        return {"scale": self.value(f"{name}_scale"), "bias": self.value(f"{name}_shift")}


def names_today(name: str) -> list[str]:
    """Weights that hold what weight `name`, of this or an earlier release, holds."""
    for together, parts in ATTENTION_TOGETHER.items():
        if name.endswith(f"_{together}_weight"):
            return [name.replace(f"_{together}_", f"_{part}_") for part in parts]
    return [name]


def plan_today(plan: Mapping[str, T]) -> dict[str, T]:
    """What is planned for weights, of this or an earlier release, by their names of today."""
    return {new: kind for name, kind in plan.items() for new in names_today(name)}


def floats(value: Any) -> NDArray[np.float32]:
    """As a float32 array."""
    return np.asarray(value, dtype=np.float32)
