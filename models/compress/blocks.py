"""Block-wise 4 or 8 bits with ONNX Runtime's MatMulNBits and GatherBlockQuantized (CPU).

One scale for every `block` weights along the inputs. The weight stays packed in memory too, and
products unpack it as they go: smallest in memory, good at batch 1, slow at batches. The item table
is stored once for both operators, which share their layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from models.compress.draft import CompressionError, Context, Draft
from models.compress.rewriter import Rewriter

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Blocks:
    """Symmetric blocks; `axis` 1 where rows are channels (the item table), 0 where columns are."""

    bits: int
    block: int
    axis: int

    @property
    def label(self) -> str:
        """block4 or block8."""
        return f"block{self.bits}"

    @property
    def exact(self) -> bool:
        """MatMulNBits computes with floats, or with int8, as the processor allows."""
        return False

    def rounded(self, weight: Any, xp: Any) -> Any:
        """What the weight becomes, float32."""
        rows = weight if self.axis else weight.T
        blocks = rows.reshape(rows.shape[0], -1, self.block)
        scale = self._scale(blocks, xp)
        top = 2 ** (self.bits - 1)
        back = xp.clip(xp.round(blocks / scale), -top, top - 1) * scale
        back = back.reshape(rows.shape)
        return back if self.axis else back.T

    def _scale(self, blocks: Any, xp: Any) -> Any:
        largest = xp.abs(blocks).max(axis=2, keepdims=True)
        return xp.where(largest > 0, largest / (2 ** (self.bits - 1) - 1), 1.0).astype(np.float32)

    def lower(self, rewriter: Rewriter, name: str, weight: NDArray[np.float32]) -> None:
        """Pack, and put the two operators in the place of MatMul and Gather."""
        rows = weight if self.axis else weight.T
        count, inner = rows.shape
        blocks = rows.reshape(count, -1, self.block)
        scale = self._scale(blocks, np)
        top = 2 ** (self.bits - 1)
        codes = (np.clip(np.rint(blocks / scale), -top, top - 1) + top).astype(np.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        rewriter.remove_weight(name)
        packed = rewriter.weight(f"{name}_packed", codes.reshape(count, -1))
        scales = rewriter.weight(f"{name}_scales", scale.reshape(count, -1))
        shape = rewriter.weight(f"{name}_shape", np.array(codes.shape, dtype=np.int64))
        flat = rewriter.weight(f"{name}_flat", np.array([-1], dtype=np.int64))
        side = rewriter.unpack("Reshape", [packed, shape], f"{name}_blocks")
        row = rewriter.unpack("Reshape", [scales, flat], f"{name}_scales_flat")
        _import(rewriter)

        def product(node: Any) -> None:
            rewriter.replace(
                node,
                [
                    helper.make_node(
                        "MatMulNBits", [node.input[0], side, row], list(node.output),
                        name=node.name, domain=_DOMAIN, K=inner, N=count, bits=self.bits,
                        block_size=self.block, accuracy_level=4,
                    )
                ],
            )  # fmt: skip

        for node in rewriter.consumers(name):
            if node.op_type == "MatMul" and not self.axis:
                product(node)
            elif node.op_type == "Gather" and self.axis:
                found = helper.make_node(
                    "GatherBlockQuantized", [packed, node.input[1], scales], list(node.output),
                    name=node.name, domain=_DOMAIN, gather_axis=0, quantize_axis=1,
                    block_size=self.block, bits=self.bits,
                )  # fmt: skip
                rewriter.replace(node, [found])
            elif node.op_type == "Transpose" and self.axis:
                for score in rewriter.consumers(node.output[0]):
                    product(score)
                rewriter.replace(node, [])
            else:
                raise CompressionError(
                    f"blocks: {node.op_type} reads {name}: leave it out by parts"
                )


def blocks(
    draft: Draft, context: Context, *, bits: int = 4, block: int = 32, parts: str = "table|linear"
) -> Draft:
    """Block-wise weights, unpacked as they are multiplied."""
    if bits not in {4, 8} or block not in {16, 32, 64, 128, 256}:
        raise CompressionError("blocks: bits must be 4 or 8, block 16, 32, 64, 128 or 256")
    for weight in draft.weights(parts):
        axis = 0 if weight.role == "linear" else 1
        if weight.role == "other" or weight.shape[axis] % block:
            continue  # nothing to multiply, or no whole blocks: stays as it is
        draft = draft.encoded([weight.name], Blocks(bits, block, axis))
    return draft


def _import(rewriter: Rewriter) -> None:
    if not any(o.domain == _DOMAIN for o in rewriter.model.opset_import):
        rewriter.model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
