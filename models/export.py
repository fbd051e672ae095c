"""Parameters of any of our models as an ONNX graph that keeps the bundle contract, and back."""

from __future__ import annotations

from onnx import ModelProto

from models import family, lrurec, lrurec_export, sasrec, sasrec_export
from models.family import Params


def export(params: Params, shape: family.Shape) -> bytes:
    """The model as serialized ONNX, float32.

    Raises:
        TypeError: no export is written for this kind of model.
    """
    if isinstance(shape, sasrec.Shape):
        return sasrec_export.export(params, shape)
    if isinstance(shape, lrurec.Shape):
        return lrurec_export.export(params, shape)
    raise TypeError(f"no export for a {shape.title}")


def read_params(model: ModelProto) -> tuple[Params, family.Shape]:
    """Parameters and shape of a float32 graph that `export` made.

    Raises:
        ForeignGraphError: the graph is another model's, or its weights are no longer float32.
    """
    if model.graph.name == lrurec_export.NAME:
        return lrurec_export.read_params(model)
    return sasrec_export.read_params(model)
