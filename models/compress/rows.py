"""Symmetric quantization with one scale a channel: an item's row, or an output of a linear layer.

`int8` and `int4` products are of integers (W8A8: activations are quantized by batch at run time,
as onnxruntime's quantize_dynamic does). The item table is kept once and serves look-up and scoring;
onnxruntime's tool would store it twice, can't store four bits that are computed as eight, and
can't tie. Weight-only storage (`weights`) is expanded to float32 while loading: it saves disk, not
time. Four bits are stored as int4 tensors and computed as int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from models.compress.draft import CompressionError, Context, Draft
from models.compress.rewriter import Rewriter


@dataclass(frozen=True)
class Rows:
    """One scale a channel.

    Args:
        bits: 8 or 4, as stored.
        axis: 1 where each row of the weight is a channel (the item table), 0 where each column is.
        integer: whether products are of integers.
        head: so many first rows are stored in 8 bits whatever the rest is; items are numbered by
            popularity, so these are the ones asked for most.
    """

    bits: int
    axis: int
    integer: bool
    head: int = 0

    @property
    def label(self) -> str:
        """int8, int4, or w8, w4 where only storage is quantized."""
        return f"{'int' if self.integer else 'w'}{self.bits}"

    @property
    def exact(self) -> bool:
        """Whether products are of floats."""
        return not self.integer

    @property
    def _levels(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def scale(self, weight: Any, xp: Any) -> Any:
        """float32, one a channel, keeping both axes."""
        if self.head:
            parts = (
                self._tight.scale(weight[: self.head], xp),
                self._rest.scale(weight[self.head :], xp),
            )
            return xp.concatenate(parts)
        top = self._levels
        largest = xp.abs(weight).max(axis=self.axis, keepdims=True)
        scale = xp.where(largest > 0, largest / top, 1.0)
        if self.bits == 8:
            return _stored(scale, xp)
        # In four bits the largest value costs more than it is worth: try narrower ranges and take
        # the one with the least squared error, channel by channel.
        best, best_error = scale, None
        for share in (1.0, 0.92, 0.85, 0.78, 0.7, 0.62):
            tried = scale * share
            error = ((_round(weight, tried, top, xp) - weight) ** 2).sum(self.axis, keepdims=True)
            if best_error is None:
                best_error = error
            else:
                better = error < best_error
                best = xp.where(better, tried, best)
                best_error = xp.where(better, error, best_error)
        return _stored(best, xp)

    @property
    def _tight(self) -> Rows:
        return Rows(8, self.axis, self.integer)

    @property
    def _rest(self) -> Rows:
        return Rows(self.bits, self.axis, self.integer)

    def rounded(self, weight: Any, xp: Any) -> Any:
        """What the weight becomes, float32."""
        if self.head:
            head, rest = weight[: self.head], weight[self.head :]
            return xp.concatenate([self._tight.rounded(head, xp), self._rest.rounded(rest, xp)])
        return _round(weight, self.scale(weight, xp), self._levels, xp)

    def integers(self, weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """int8 values and their scales: `weight ~ integers * scale`."""
        scale = self.scale(weight, np)
        top = np.full((len(weight), 1), self._levels)
        top[: self.head] = 127
        return np.clip(np.rint(weight / scale), -top, top).astype(np.int8), scale

    def lower(self, rewriter: Rewriter, name: str, weight: NDArray[np.float32]) -> None:
        """Store integers and scales; expand them, or compute with them."""
        integers, scale = self.integers(weight)
        rewriter.remove_weight(name)
        stored, scales = self.store(rewriter, name, integers, scale)
        rest = rewriter.consumers(name)
        if self.integer:
            rest = [node for node in rest if not _lower_node(rewriter, node, name, stored, scale)]
        if rest:
            as_float = rewriter.unpack("Cast", [stored], f"{name}_float", to=TensorProto.FLOAT)
            rewriter.unpack("Mul", [as_float, scales], name)

    def store(
        self,
        rewriter: Rewriter,
        name: str,
        integers: NDArray[np.int8],
        scale: NDArray[np.float32],
    ) -> tuple[str, str]:
        """Add `integers`, int8 once loaded, and their scales, float32; names of both."""
        if self.head:
            parts = [
                rewriter.store_integers(f"{name}_head", integers[: self.head], 8),
                rewriter.store_integers(f"{name}_rest", integers[self.head :], self.bits),
            ]
            stored = rewriter.unpack("Concat", parts, f"{name}_int", axis=0)
        else:
            stored = rewriter.store_integers(f"{name}_int", integers, self.bits)
        half = rewriter.weight(f"{name}_scales_half", scale.astype(np.float16))
        return stored, rewriter.unpack("Cast", [half], f"{name}_scales", to=TensorProto.FLOAT)


def _lower_node(
    rewriter: Rewriter, node: Any, name: str, stored: str, scale: NDArray[np.float32]
) -> bool:
    """Compute `node` with integers; False where there is no way to."""
    scales = f"{name}_scales"
    if node.op_type == "Gather" and node.input[0] == name and scale.shape[1] == 1:
        rows, output = node.name or node.output[0], node.output[0]
        make = helper.make_node
        rewriter.replace(
            node,
            [
                make("Gather", [stored, node.input[1]], [f"{rows}_int"], axis=0),
                make("Gather", [scales, node.input[1]], [f"{rows}_scale"], axis=0),
                make("Cast", [f"{rows}_int"], [f"{rows}_float"], to=TensorProto.FLOAT),
                make("Mul", [f"{rows}_float", f"{rows}_scale"], [output], name=rows),
            ],
        )
        return True
    if node.op_type == "Transpose" and scale.shape[1] == 1:
        products = rewriter.consumers(node.output[0])
        if not all(p.op_type == "MatMul" and p.input[1] == node.output[0] for p in products):
            return False
        flat = rewriter.weight(f"{name}_scales_flat", np.array([1, -1]))
        row = rewriter.unpack("Reshape", [scales, flat], f"{name}_scales_row")
        for product in products:
            rewriter.integer_product(product, stored, row, transposed=True)
        rewriter.replace(node, [])
        return True
    if node.op_type == "MatMul" and node.input[1] == name and scale.shape[0] == 1:
        rewriter.integer_product(node, stored, scales)
        return True
    return False


def _stored(scale: Any, xp: Any) -> Any:
    """As float16 keeps it, but never so small that it would lose bits."""
    return xp.maximum(scale, 2.0**-14).astype(np.float16).astype(np.float32)


def _round(weight: Any, scale: Any, top: int, xp: Any) -> Any:
    return xp.clip(xp.round(weight / scale), -top, top) * scale


def _encoded(draft: Draft, parts: str, bits: int, *, integer: bool, head: float = 0.0) -> Draft:
    if not 0.0 <= head < 1.0:
        raise CompressionError(f"head={head} must be at least 0 and below 1")
    for weight in draft.weights(parts):
        # Positions are added: there is no product to compute with integers.
        rows = weight.role != "linear"
        first = int(weight.shape[0] * head) if weight.role == "table" else 0
        encoding = Rows(bits, 1 if rows else 0, integer and weight.role != "other", first)
        draft = draft.encoded([weight.name], encoding)
    return draft


def int8(draft: Draft, context: Context, *, parts: str = "all") -> Draft:
    """Weights in 8 bits, products of integers; `parts` makes it partial (see Weight.belongs)."""
    return _encoded(draft, parts, 8, integer=True)


def int4(draft: Draft, context: Context, *, parts: str = "all", head: float = 0.0) -> Draft:
    """Weights in 4 bits on disk, expanded to int8 while loading, products of integers.

    `head`: share of the item table's rows, the most popular, kept in 8 bits.
    """
    return _encoded(draft, parts, 4, integer=True, head=head)


def weights(draft: Draft, context: Context, *, bits: int = 8, parts: str = "all") -> Draft:
    """Weights in 8 or 4 bits on disk, expanded to float32 while loading."""
    return _encoded(draft, parts, bits, integer=False)
