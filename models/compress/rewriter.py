"""Change an ONNX graph: swap a float weight for its stored form and the nodes that read it.

What only unpacks constants runs once: ONNX Runtime folds nodes of constants while it loads a graph.
So a weight may lie on disk in four bits, or as a bitmap and its non-zero values, and be computed
with as int8 or float32, at no cost per request but that of loading.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

#: int4 tensors need it.
MIN_OPSET = 21


#: Rewrites a whole graph, given the names of the weights to act on.
Tool = Callable[[ModelProto, list[str]], ModelProto]


class Rewriter:
    """A graph under change. Owns `model`."""

    def __init__(self, model: ModelProto) -> None:
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        if opset < MIN_OPSET:
            model = version_converter.convert_version(model, MIN_OPSET)
        model.ir_version = max(model.ir_version, 10)
        self.model = model
        self._unpacking: list[NodeProto] = []
        self._quantized: dict[str, tuple[str, str, str]] = {}
        self._tools: dict[Tool, list[str]] = {}

    @property
    def nodes(self) -> list[NodeProto]:
        """Nodes in order."""
        return list(self.model.graph.node)

    def consumers(self, name: str) -> list[NodeProto]:
        """Nodes that read a tensor."""
        return [node for node in self.model.graph.node if name in node.input]

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer."""
        stored = numpy_helper.from_array(np.ascontiguousarray(value), name)
        self.model.graph.initializer.append(stored)
        return name

    def remove_weight(self, name: str) -> None:
        """Take an initializer out."""
        weights = self.model.graph.initializer
        weights.remove(next(w for w in weights if w.name == name))

    def unpack(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node that works on constants, before all others."""
        self._unpacking.append(
            helper.make_node(op, inputs, [output], name=f"unpack_{output}", **attributes)
        )
        return output

    def replace(self, old: NodeProto, new: list[NodeProto]) -> None:
        """Put nodes in the place of one."""
        nodes = self.nodes
        place = next(n for n, node in enumerate(nodes) if node is old or node == old)
        nodes[place : place + 1] = new
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def store_floats(self, name: str, value: NDArray[np.float32]) -> None:
        """Keep a float32 weight, as a bitmap and its non-zero values where that is smaller."""
        if not _sparse_pays(value, 32):
            return
        self.remove_weight(name)
        self._bitmap(name, value, lambda kept, at: self.weight(at, kept))

    def store_integers(self, name: str, value: NDArray[np.int8], bits: int) -> str:
        """Add an int8 tensor `name`, stored in 8 or 4 bits a value, sparse where smaller."""

        def dense(kept: NDArray[np.int8], at: str) -> str:
            if bits == 8:
                return self.weight(at, kept)
            packed = self.weight(f"{at}_int4", kept.astype(ml_dtypes.int4))
            return self.unpack("Cast", [packed], at, to=TensorProto.INT8)

        if _sparse_pays(value, bits):
            return self._bitmap(name, value, dense)
        return dense(value, name)

    def _bitmap(self, name: str, value: NDArray[Any], store: Any) -> str:
        """Store one bit a value, and the values that are not zero.

        Unpacking: the n-th set bit stands for the n-th value, so a running count of the bits,
        zero where a bit is not set, is an index into the values with a zero before them.
        """
        flat = value.reshape(-1)
        zero = np.zeros(1, dtype=value.dtype)
        values = store(np.concatenate([zero, flat[flat != 0]]), f"{name}_values")
        bits = self.weight(f"{name}_bits", np.packbits(flat != 0, bitorder="little")[:, None])
        powers = self.weight(f"{name}_powers", (1 << np.arange(8)).astype(np.uint8))
        ends = [
            self.weight(f"{name}_{part}", np.array(at, dtype=np.int64))
            for part, at in (("start", [0]), ("end", [flat.size]), ("flat", [-1]))
        ]
        shape = self.weight(f"{name}_shape", np.array(value.shape, dtype=np.int64))
        axis = self.weight(f"{name}_axis", np.array(0, dtype=np.int64))

        def step(op: str, *inputs: str, **attributes: Any) -> str:
            output = f"{name}_{op.lower()}_{len(self._unpacking)}"
            return self.unpack(op, list(inputs), output, **attributes)

        one_each = step("BitwiseAnd", bits, powers)
        mask = step("Cast", one_each, to=TensorProto.BOOL)
        mask = step("Cast", mask, to=TensorProto.INT32)
        mask = step("Slice", step("Reshape", mask, ends[2]), ends[0], ends[1])
        index = step("Mul", step("CumSum", mask, axis), mask)
        return self.unpack("Reshape", [step("Gather", values, index), shape], name)

    def integer_product(
        self, node: NodeProto, weight: str, scale: str, *, transposed: bool = False
    ) -> None:
        """Compute a MatMul with an int8 weight: activations become uint8, by batch, at run time.

        Args:
            weight: int8 `[in, out]` (`[out, in]` where `transposed`).
            scale: float32 `[1, out]` or `[out]`.
        """
        left, output, base = node.input[0], node.output[0], node.name or node.output[0]
        make = helper.make_node
        new: list[NodeProto] = []
        if left not in self._quantized:
            parts = (f"{left}_q", f"{left}_q_scale", f"{left}_q_zero")
            new.append(make("DynamicQuantizeLinear", [left], list(parts), name=f"{left}_quantize"))
            self._quantized[left] = parts
        q, q_scale, q_zero = self._quantized[left]
        if transposed:
            weight = self.unpack("Transpose", [weight], f"{base}_weight_t", perm=[1, 0])
        new += [
            make("MatMulInteger", [q, weight, q_zero], [f"{base}_int"], name=f"{base}_int"),
            make("Cast", [f"{base}_int"], [f"{base}_float"], to=TensorProto.FLOAT),
            make("Mul", [q_scale, scale], [f"{base}_scale"]),
            make("Mul", [f"{base}_float", f"{base}_scale"], [output], name=f"{base}_rescale"),
        ]
        self.replace(node, new)

    def leave_to(self, tool: Tool, name: str) -> None:
        """Have `tool` change weight `name` at the end, together with the others left to it."""
        self._tools.setdefault(tool, []).append(name)

    def finish(self) -> bytes:
        """The graph, checked and serialized."""
        nodes = [*self._unpacking, *self.model.graph.node]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        for tool, names in self._tools.items():
            self.model = tool(self.model, names)
        graph = self.model.graph
        used = {name for node in graph.node for name in node.input}
        kept = [w for w in graph.initializer if w.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        # Types and shapes noted for the float weights no longer hold.
        del graph.value_info[:]
        onnx.checker.check_model(self.model)
        return bytes(self.model.SerializeToString())


def _sparse_pays(value: NDArray[Any], bits: int) -> bool:
    """Whether a bitmap and the non-zero values are smaller; a graph needs 400 bytes to unpack."""
    stored = math.ceil(value.size / 8) + np.count_nonzero(value) * bits / 8 + 1500
    return bool(stored < value.size * bits / 8)
