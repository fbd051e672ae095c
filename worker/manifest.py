"""What a bundle says about itself: `manifest.json`, and the tensors that its model must have.

No I/O; the fields are described in docs/bundle.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from worker.errors import BundleError, Refusal
from worker.events import parse_surface
from worker.text import TextSpec

FORMAT_VERSION = 1
MODEL_FILE = "model.onnx"
ITEMS_FILE = "items.txt"
TEXT_FILE = "text.onnx"
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"

MAX_MANIFEST_BYTES = 4 << 20
#: Most items of a model: histories hold indexes as int32, and `items.txt` could not name more.
MAX_ITEMS = 1 << 30
#: What a name or version may be where it is no more than a directory's name.
_SAFE = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]{1,128}")
#: What a published one may be: no separator of NAME@VERSION, of a path or URL, or of settings.
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, dtype and shape of a model input or output; named dimensions are free."""

    name: str
    dtype: str
    shape: list[str | int]


class FileSpec(msgspec.Struct, frozen=True):
    """What a file must be."""

    sha256: str
    bytes: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Golden(msgspec.Struct, frozen=True):
    """Inputs with the outputs that the maker of the bundle saw.

    `history` is `[batch, length]`, `items` and `scores` are `[batch, k]`.
    """

    history: list[list[int]]
    k: int
    items: list[list[int]]
    scores: list[list[float]]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle says about itself."""

    format_version: int
    name: str
    version: str
    surface: str
    #: RFC 3339.
    created_at: str
    #: fp32, int8, ...
    precision: str
    #: How it was made and compressed, for people.
    recipe: str
    #: Length of the padded history that the model reads.
    max_length: int
    #: Shortest known history worth scoring; below it the fallback serves.
    min_length: int = 1
    item_count: int
    #: Most items that one run gives, where that is less than `item_count`: approximate retrieval.
    max_k: int | None = None
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    files: dict[str, FileSpec]
    #: Offline figures by name, such as `ndcg@10`.
    metrics: dict[str, float] = {}
    parents: list[str] = []
    provenance: dict[str, str] = {}
    golden: list[Golden] = []
    #: Largest difference of a score from its golden value.
    golden_tolerance: float = 1e-3
    #: How `text.onnx` wants its input; None where the bundle has none.
    text: TextSpec | None = None
    #: Whether histories may be cut to less than `max_length` where that cuts padding only.
    any_length: bool = False

    @property
    def reference(self) -> str:
        """`<name>@<version>`, as lists, settings and logs name a model."""
        return f"{self.name}@{self.version}"

    @property
    def catalogue(self) -> str:
        """Names the list of item ids: bundles of one catalogue number their items alike."""
        return self.files[ITEMS_FILE].sha256

    @property
    def most(self) -> int:
        """The largest `k` that the model takes."""
        return self.item_count if self.max_k is None else min(self.max_k, self.item_count)

    @property
    def carry_width(self) -> int | None:
        """Numbers that a user's carry has; None where the model is not recurrent."""
        return carry_width_of(self.inputs)

    def created(self) -> datetime:
        """`created_at`, parsed; naive times are UTC."""
        parsed = datetime.fromisoformat(self.created_at)
        return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


INPUTS = [
    TensorSpec("history", "int64", ["batch", "length"]),
    TensorSpec("k", "int64", [1]),
]
OUTPUTS = [
    TensorSpec("items", "int64", ["batch", "k"]),
    TensorSpec("scores", "float32", ["batch", "k"]),
]
#: A further output, wanted where there is a text encoder: an item's score is its vector times this.
STATE = TensorSpec("state", "float32", ["batch", "width"])
#: A further input and output of recurrent models: what is kept of a user between runs.
CARRY, NEXT_CARRY = "carry", "next_carry"
TEXT_INPUTS = [TensorSpec("grams", "int64", ["n", "grams"])]
TEXT_OUTPUTS = [TensorSpec("vectors", "float32", ["n", "width"])]


def is_safe(part: str) -> bool:
    """Whether `part` may be a name or version: no path, nothing that steers a terminal or log."""
    return _SAFE.fullmatch(part) is not None


def carry_spec(name: str, width: int) -> TensorSpec:
    """The tensor `CARRY` or `NEXT_CARRY` of a recurrent model."""
    return TensorSpec(name, "float32", ["batch", width])


def carry_width_of(inputs: Sequence[TensorSpec]) -> int | None:
    """Width of the input `CARRY`; None where there is no such input."""
    for spec in inputs:
        width = spec.shape[-1] if spec.name == CARRY and spec.shape else None
        if isinstance(width, int):
            return width
    return None


def contract(carry_width: int | None, *, state: bool) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a model; `state`: whether it has the output `STATE`."""
    inputs, outputs = [*INPUTS], [*OUTPUTS]
    if state:
        outputs.append(STATE)
    if carry_width is not None:
        inputs.append(carry_spec(CARRY, carry_width))
        outputs.append(carry_spec(NEXT_CARRY, carry_width))
    return inputs, outputs


def signature(tensors: Sequence[TensorSpec]) -> str:
    """Tensors on one line, for messages."""
    return ", ".join(f"{tensor.name} {tensor.dtype} {tensor.shape}" for tensor in tensors)


def wanted_tensors(manifest: Manifest) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs that `manifest` must declare, and its model have."""
    state = any(spec.name == STATE.name for spec in manifest.outputs)
    return contract(manifest.carry_width, state=state)


def check_manifest(manifest: Manifest) -> None:
    """Whether its fields agree with each other and with the contract.

    Raises:
        BundleError: they do not; the first problem.
    """
    for what, part in (("name", manifest.name), ("version", manifest.version)):
        if not is_safe(part):
            raise BundleError(
                f"{what} {part[:200]!r} must be 1 to 128 printable characters without / and \\, and"
                " not begin with a dot",
                Refusal.IDENTITY,
            )
    try:
        parse_surface(manifest.surface)
    except ValueError as error:
        raise BundleError(str(error), Refusal.IDENTITY) from None
    problem = _number_problem(manifest)
    if problem:
        raise BundleError(problem, Refusal.MANIFEST)
    inputs, outputs = wanted_tensors(manifest)
    for kind, declared, wanted in (
        ("inputs", manifest.inputs, inputs),
        ("outputs", manifest.outputs, outputs),
    ):
        if [(t.name, t.dtype) for t in declared] != [(t.name, t.dtype) for t in wanted]:
            raise BundleError(
                f"{kind} are {signature(declared)}; the contract is {signature(wanted)}",
                Refusal.CONTRACT,
            )


def _number_problem(manifest: Manifest) -> str | None:
    if not 1 <= manifest.min_length <= manifest.max_length <= 100_000:
        return (
            f"min_length {manifest.min_length} and max_length {manifest.max_length} must be"
            " between 1 and 100000, the first not above the second"
        )
    if not 1 <= manifest.item_count <= MAX_ITEMS:
        return f"item_count is {manifest.item_count}; a model has 1 to {MAX_ITEMS} items"
    if manifest.max_k is not None and not 1 <= manifest.max_k <= manifest.item_count:
        return (
            f"max_k is {manifest.max_k}; leave it out, or give 1 to item_count,"
            f" {manifest.item_count}"
        )
    if not manifest.golden_tolerance >= 0:
        return f"golden_tolerance is {manifest.golden_tolerance}; it must not be negative"
    return None


def decode_manifest(data: bytes, file: Path | str) -> Manifest:
    """Parse a manifest; `file` is for the message.

    Raises:
        BundleError: it is not JSON, or not of the manifest's form.
    """
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.format_version != FORMAT_VERSION:
            raise BundleError(
                f"{file}: format_version {head.format_version}; this release reads"
                f" {FORMAT_VERSION}: publish the model again with a matching release",
                Refusal.FORMAT,
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        manifest.created()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not a manifest: {error}", Refusal.MANIFEST) from None
    return manifest


class _Head(msgspec.Struct):
    format_version: int


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON that people can read."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def metric_summary(metrics: Mapping[str, float]) -> str:
    """Metrics on one line, for listings."""
    return " ".join(f"{name}={value:.4f}" for name, value in sorted(metrics.items()))
