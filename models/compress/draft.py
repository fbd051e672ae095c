"""What compression methods work on: a bundle in memory, between two methods.

A draft keeps its graph in float32 and, beside it, the plan of how each weight will be stored
(`encodings`). Methods that change weights or structure (pruning, layer cutting, fine-tuning) change
the graph; methods that quantize change the plan. `lower` joins both once, at the end. So the order
of a recipe's steps matters only where it should, and fine-tuning after quantization can see the
rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from models.compress.rewriter import Rewriter
from models.dataset import Queries, padded
from models.graph import ATTENTION_WEIGHTS, ITEM_TABLE
from worker.bundle import open_bundle, write_bundle
from worker.errors import StreamrecError
from worker.manifest import CARRY, MODEL_FILE, Manifest, TensorSpec

#: Difference of a score from its golden value where sums are of integers: those differ in their
#: last bits between processors' instruction sets.
INTEGER_TOLERANCE = 0.25


class CompressionError(StreamrecError):
    """A method cannot be applied to this bundle, or a recipe is not one."""

    exit_code = 65


class Encoding(Protocol):
    """How one weight is stored, and what it is computed with."""

    @property
    def label(self) -> str:
        """For the manifest's `precision`: int8, int4, ..."""
        ...

    @property
    def exact(self) -> bool:
        """Whether products are of floats: the same on every processor but for rounding."""
        ...

    def rounded(self, weight: Any, xp: Any) -> Any:
        """What `weight` becomes; `xp` is numpy or jax.numpy."""
        ...

    def lower(self, rewriter: Rewriter, name: str, weight: NDArray[np.float32]) -> None:
        """Replace the float initializer `name` in the graph."""
        ...


class Late(Protocol):
    """A change of the graph that waits until it is lowered, so that methods before and after it in
    a recipe see the plain one."""

    def rewrite(self, draft: Draft) -> Draft:
        """The draft with the change made, in the graph or in the encodings."""
        ...


@dataclass(frozen=True)
class Weight:
    """A weight that methods may touch: a matrix, or the item table.

    `role`: `table` (rows looked up by the history), `linear` (the constant side of a product,
    `[in, out]`), or `other` (added, such as positions).
    """

    name: str
    role: str
    shape: tuple[int, ...]

    def belongs(self, parts: str) -> bool:
        """Whether one of the `|`-separated parts names it.

        A part is a role, `attention`, `recurrence`, `ffn`, a block such as `block0`, or a pattern
        of the name.
        """
        names = {self.role, self.name.split("_", 1)[0]}
        if any(f"_{p}_" in self.name for p in ATTENTION_WEIGHTS):
            names.add("attention")
        if any(f"_{p}_" in self.name for p in ("drive", "read")):
            names.add("recurrence")
        if any(f"_{p}_" in self.name for p in ("up", "down")):
            names.add("ffn")
        return any(
            part in names or part == "all" or fnmatchcase(self.name, part)
            for part in parts.split("|")
        )


@dataclass(frozen=True)
class Draft:
    """A bundle in memory. Immutable: a method returns another."""

    model: ModelProto
    items: tuple[str, ...]
    manifest: Manifest
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    #: Steps applied so far, as written.
    steps: tuple[str, ...] = ()
    #: The graph as it was opened: what a smaller model learns from.
    origin: ModelProto | None = None
    #: Changes made when it is lowered.
    late: tuple[Late, ...] = ()

    def weights(self, parts: str = "all") -> list[Weight]:
        """Matrices of the graph in order; those that `parts` names."""
        return [w for w in find_weights(self.model) if w.belongs(parts)]

    def value(self, name: str) -> NDArray[np.float32]:
        """A weight by name."""
        stored = next(w for w in self.model.graph.initializer if w.name == name)
        return np.array(numpy_helper.to_array(stored), dtype=np.float32)

    def with_values(self, values: Mapping[str, NDArray[np.float32]]) -> Draft:
        """The draft with other values of some weights, shapes kept."""
        model = copied(self.model)
        for stored in model.graph.initializer:
            if stored.name in values:
                stored.CopyFrom(numpy_helper.from_array(values[stored.name], stored.name))
        return replace(self, model=model)

    def encoded(self, names: Sequence[str], encoding: Encoding) -> Draft:
        """The draft with `encoding` for some weights."""
        return replace(self, encodings={**self.encodings, **dict.fromkeys(names, encoding)})

    @property
    def precision(self) -> str:
        """Storage of the weights in a word or two: `fp32`, `int8`, `int8+int4`."""
        matrices = self.weights("table|linear")
        labels = {self.encodings[w.name].label for w in matrices if w.name in self.encodings}
        if any(w.name not in self.encodings for w in matrices):
            labels.add("fp32")
        return "+".join(sorted(labels, key=lambda label: (-_bits(label), label))) or "fp32"


@dataclass(frozen=True)
class Context:
    """What methods may look at beside the bundle. Those that need what is missing say so.

    The test queries are not among it: nothing may be chosen by them.
    """

    train: Sequence[NDArray[np.int64]] = ()
    validation: Queries | None = None
    seed: int = 7

    def histories(self, length: int, count: int) -> NDArray[np.int64]:
        """Histories int64 `[count, length]` to calibrate on.

        Raises:
            CompressionError: there are none.
        """
        found = list(self.validation.histories if self.validation is not None else self.train)
        if not found:
            raise CompressionError("this method looks at histories: give --events")
        rng = np.random.default_rng(self.seed)
        chosen = rng.choice(len(found), min(count, len(found)), replace=False)
        return padded([found[place] for place in chosen], length)

    def need_validation(self, method: str) -> Queries:
        """The validation queries.

        Raises:
            CompressionError: there are none.
        """
        if self.validation is None or not len(self.validation):
            raise CompressionError(
                f"{method} measures its loss on validation events: give --events"
            )
        return self.validation

    def need_train(self, method: str) -> Sequence[NDArray[np.int64]]:
        """The training sequences.

        Raises:
            CompressionError: there are none.
        """
        if not len(self.train):
            raise CompressionError(f"{method} needs training events: give --events")
        return self.train


def open_draft(path: Path) -> Draft:
    """Read a bundle for compression.

    Raises:
        BundleError: the bundle is broken.
        CompressionError: it is quantized already.
    """
    bundle = open_bundle(path)
    model = onnx.load(path / MODEL_FILE)
    if not find_weights(model):
        raise CompressionError(
            f"{path} holds no float32 matrices: compress the float32 bundle that it was made from"
            f" ({', '.join(bundle.manifest.parents) or 'no parents are recorded'})"
        )
    return Draft(model, bundle.items, bundle.manifest, origin=model)


def lower(draft: Draft) -> bytes:
    """The draft as serialized ONNX: every weight stored as planned, sparse where that is smaller.

    Raises:
        CompressionError: the result is no valid graph.
    """
    for change in draft.late:
        draft = change.rewrite(draft)
    rewriter = Rewriter(copied(draft.model))
    for weight in find_weights(draft.model):
        encoding = draft.encodings.get(weight.name)
        value = draft.value(weight.name)
        if encoding is not None:
            encoding.lower(rewriter, weight.name, value)
        else:
            rewriter.store_floats(weight.name, value)
    try:
        return rewriter.finish()
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CompressionError(f"{' + '.join(draft.steps)} gives no valid graph: {error}") from None


def save(
    draft: Draft,
    directory: Path,
    *,
    golden: NDArray[np.int64] | None = None,
    metrics: Mapping[str, float] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Write the draft as a bundle, whole or not at all.

    Args:
        golden: int64 `[batch, length]`, histories to record outputs for; the parent's without.
        metrics: offline figures.
        provenance: added to the parent's.
    """
    manifest = draft.manifest
    length = manifest.max_length
    if golden is None and manifest.golden:
        golden = np.array(manifest.golden[0].history, dtype=np.int64)
    exact = all(encoding.exact for encoding in draft.encodings.values())
    return write_bundle(
        directory,
        model=lower(draft),
        items=draft.items,
        golden_histories=golden[:, -length:] if golden is not None else None,
        golden_k=min(10, manifest.most),
        name=manifest.name,
        version=directory.name,
        surface=manifest.surface,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        precision=draft.precision,
        recipe=" + ".join(draft.steps) or manifest.recipe,
        max_length=length,
        min_length=min(manifest.min_length, length),
        max_k=manifest.max_k,
        any_length=manifest.any_length,
        parents=[manifest.version],
        provenance={**manifest.provenance, **(provenance or {})},
        golden_tolerance=manifest.golden_tolerance if exact else INTEGER_TOLERANCE,
        metrics=dict(metrics or {}),
    )


def find_weights(model: ModelProto) -> list[Weight]:
    """Float32 matrices of a graph, whoever exported it."""
    graph = model.graph
    stored = {
        w.name: tuple(w.dims)
        for w in graph.initializer
        if w.data_type == TensorProto.FLOAT and len(w.dims) == 2
    }
    roles = dict.fromkeys(stored, "other")
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            roles[node.input[1]] = "linear"
    ids = {"history"}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in ids:
            ids.update(node.output)
        if node.op_type == "Gather" and node.input[0] in stored and node.input[1] in ids:
            roles[node.input[0]] = "table"
    # A row or a column is a bias with a leading 1: nothing to gain.
    return [Weight(n, roles[n], s) for n, s in stored.items() if min(s) > 1 or n == ITEM_TABLE]


def graph_inputs(model: ModelProto) -> list[TensorSpec]:
    """Inputs of a graph, as a manifest names them."""
    kinds = {TensorProto.INT64: "int64", TensorProto.FLOAT: "float32"}
    return [
        TensorSpec(
            node.name,
            kinds.get(node.type.tensor_type.elem_type, "other"),
            [dim.dim_param or dim.dim_value for dim in node.type.tensor_type.shape.dim],
        )
        for node in model.graph.input
    ]


def feeds_for(model: ModelProto, histories: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Inputs of a graph for int64 `[batch, length]` of users of whom nothing is known yet."""
    feeds: dict[str, NDArray[Any]] = {"history": histories, "k": np.array([1])}
    for spec in graph_inputs(model):
        if spec.name == CARRY:
            feeds[CARRY] = np.zeros((len(histories), int(spec.shape[-1])), dtype=np.float32)
    return feeds


def copied(model: ModelProto) -> ModelProto:
    """A copy that may be changed."""
    other = ModelProto()
    other.CopyFrom(model)
    return other


def _bits(label: str) -> int:
    digits = "".join(c for c in label if c.isdigit())
    return int(digits) if digits else 0
