"""Full static int8 of the linear layers: ranges of activations are fixed by calibration.

Done by `onnxruntime.quantization.quantize_static` (QDQ form). Against dynamic int8 it saves finding
each batch's range, and loses where live activations leave the calibrated one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from models.compress.draft import CompressionError, Context, Draft, feeds_for
from models.compress.rewriter import Rewriter
from models.compress.rows import Rows


class Static:
    """Left to onnxruntime's tool, which is run once for all weights that share this encoding."""

    label = "static8"
    exact = False

    def __init__(self, histories: NDArray[np.int64], method: CalibrationMethod) -> None:
        self._histories = histories
        self._method = method

    def rounded(self, weight: Any, xp: Any) -> Any:
        """What the weight becomes; what activations become is known at run time only."""
        return Rows(8, 0, True).rounded(weight, xp)

    def lower(self, rewriter: Rewriter, name: str, weight: NDArray[np.float32]) -> None:
        """Leave the weight to the tool."""
        rewriter.leave_to(self._quantize, name)

    def _quantize(self, model: ModelProto, names: list[str]) -> ModelProto:
        nodes = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in names]
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "static.onnx"
            quantize_static(
                model,
                target,
                _Reader(model, self._histories),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=nodes,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=self._method,
                extra_options={"QuantizeBias": False},
            )
            return onnx.load(target)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, model: ModelProto, histories: NDArray[np.int64]) -> None:
        self._batches: Iterator[dict[str, Any]] = iter(
            feeds_for(model, histories[start : start + 32])
            for start in range(0, len(histories), 32)
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def static(
    draft: Draft,
    context: Context,
    *,
    histories: int = 128,
    range: str = "minmax",
    parts: str = "linear",
) -> Draft:
    """Linear layers in static int8, calibrated on validation histories.

    Args:
        histories: how many to calibrate on.
        range: `minmax`, `percentile` or `entropy`.
    """
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    if range not in methods:
        raise CompressionError(f"static: range {range!r} must be one of {', '.join(methods)}")
    found = context.histories(draft.manifest.max_length, histories)
    names = [weight.name for weight in draft.weights(parts) if weight.role == "linear"]
    return draft.encoded(names, Static(found, methods[range]))
