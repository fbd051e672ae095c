"""float16 storage, expanded to float32 while loading: half the disk at no loss that shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from models.compress.draft import Context, Draft
from models.compress.rewriter import Rewriter


@dataclass(frozen=True)
class Half:
    """IEEE float16."""

    label: str = "fp16"
    exact: bool = True

    def rounded(self, weight: Any, xp: Any) -> Any:
        """What the weight becomes, float32."""
        return weight.astype(np.float16).astype(np.float32)

    def lower(self, rewriter: Rewriter, name: str, weight: NDArray[np.float32]) -> None:
        """Store as float16."""
        rewriter.remove_weight(name)
        stored = rewriter.weight(f"{name}_half", weight.astype(np.float16))
        rewriter.unpack("Cast", [stored], name, to=TensorProto.FLOAT)


def half(draft: Draft, context: Context, *, parts: str = "all") -> Draft:
    """Weights in float16 on disk, float32 in memory and in products."""
    return draft.encoded([weight.name for weight in draft.weights(parts)], Half())
