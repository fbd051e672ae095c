"""A model bundle: a directory with `model.onnx`, `items.txt`, `manifest.json` and, for items that
the model has not seen, `text.onnx` (docs/bundle.md).

`open_bundle` refuses what breaks the contract with the first problem; `check_bundle` lists them
all. Both are used by the worker and by models/, and need no training code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from worker.errors import BundleError
from worker.events import MAX_ID_LENGTH, parse_surface
from worker.text import SCHEME, TextEncoder, TextSpec

FORMAT_VERSION = 1
MODEL_FILE = "model.onnx"
ITEMS_FILE = "items.txt"
TEXT_FILE = "text.onnx"
MANIFEST_FILE = "manifest.json"

MAX_MANIFEST_BYTES = 4 << 20
#: Largest single file that is opened. A damaged or hostile bundle must not fill memory.
MAX_FILE_BYTES = 4 << 30


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, dtype and shape of a model input or output; named dimensions are free."""

    name: str
    dtype: str
    shape: list[str | int]


class FileSpec(msgspec.Struct, frozen=True):
    """What a file must be."""

    sha256: str
    bytes: int


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
    def most(self) -> int:
        """The largest `k` that the model takes."""
        return self.item_count if self.max_k is None else min(self.max_k, self.item_count)

    @property
    def carry_width(self) -> int | None:
        """Numbers that a user's carry has; None where the model is not recurrent."""
        return _carry_width(self.inputs)

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
_ORT_TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32"}


def carry_spec(name: str, width: int) -> TensorSpec:
    """The tensor `CARRY` or `NEXT_CARRY` of a recurrent model."""
    return TensorSpec(name, "float32", ["batch", width])


def _carry_width(inputs: Sequence[TensorSpec]) -> int | None:
    for spec in inputs:
        width = spec.shape[-1] if spec.name == CARRY and spec.shape else None
        if isinstance(width, int):
            return width
    return None


def _contract(carry_width: int | None, *, state: bool) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a model; `state`: whether it has the output `STATE`."""
    inputs, outputs = [*INPUTS], [*OUTPUTS]
    if state:
        outputs.append(STATE)
    if carry_width is not None:
        inputs.append(carry_spec(CARRY, carry_width))
        outputs.append(carry_spec(NEXT_CARRY, carry_width))
    return inputs, outputs


@dataclass(frozen=True)
class Bundle:
    """An open bundle. Immutable: a swap replaces the whole of it."""

    manifest: Manifest
    path: Path
    session: ort.InferenceSession
    #: Item ids; the item of model index i is `items[i - 1]`.
    items: tuple[str, ...]
    #: Gives items that the model does not know a vector; None where the bundle has no such part.
    text: TextEncoder | None = None

    @cached_property
    def index(self) -> dict[str, int]:
        """Model index by item id."""
        return {item: position for position, item in enumerate(self.items, start=1)}

    def fresh_carry(self, batch: int) -> NDArray[np.float32]:
        """Carries of users of whom nothing was read yet: zeros float32 `[batch, carry_width]`.

        Raises:
            BundleError: the model is not recurrent.
        """
        width = self.manifest.carry_width
        if width is None:
            raise BundleError(
                f"{self.manifest.reference} keeps nothing of a user between"
                " runs: give `score` the whole history"
            )
        return np.zeros((batch, width), dtype=np.float32)

    def score(
        self, history: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `k` best items of the whole catalogue for each history.

        Args:
            history: int64 `[batch, length]`, model indexes, padded with 0 on the left; `length` is
                `max_length`, or less where the manifest allows `any_length`.
            k: at most `manifest.most`.

        Returns:
            Model indexes int64 `[batch, k]` and scores float32 `[batch, k]`, best first.
        """
        items, scores = self._run(["items", "scores"], history, None, k)
        return items, scores

    def score_with_states(
        self, history: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """As `score`, and the users' states float32 `[batch, width]`; for bundles with `text`."""
        items, scores, states = self._run(["items", "scores", STATE.name], history, None, k)
        return items, scores, states

    def advance(
        self, history: NDArray[np.int64], carry: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """The `k` best items after more of each history; for recurrent bundles.

        Args:
            history: int64 `[batch, length]`, what came since `carry`, oldest first, padded with 0
                on the left; at least one item a row.
            carry: float32 `[batch, carry_width]`, of the run before; `fresh_carry` at first.
            k: at most `manifest.most`.

        Returns:
            Model indexes int64 `[batch, k]`, scores float32 `[batch, k]`, best first, and the next
            carry float32 `[batch, carry_width]`.
        """
        items, scores, moved = self._run(["items", "scores", NEXT_CARRY], history, carry, k)
        return items, scores, moved

    def advance_with_states(
        self, history: NDArray[np.int64], carry: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """As `advance`, and the users' states float32 `[batch, width]`; for bundles with `text`."""
        items, scores, moved, states = self._run(
            ["items", "scores", NEXT_CARRY, STATE.name], history, carry, k
        )
        return items, scores, moved, states

    def _run(
        self,
        outputs: list[str],
        history: NDArray[np.int64],
        carry: NDArray[np.float32] | None,
        k: int,
    ) -> list[Any]:
        feeds: dict[str, Any] = {"history": history, "k": np.array([k], dtype=np.int64)}
        if self.manifest.carry_width is not None:
            feeds[CARRY] = self.fresh_carry(len(history)) if carry is None else carry
        return list(self.session.run(outputs, feeds))


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a bundle, in words."""

    level: Literal["error", "warning"]
    check: str
    message: str


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the bundle at `path`.

    Raises:
        BundleError: it is missing, too large, not JSON, or not of the manifest's form.
    """
    file = path / MANIFEST_FILE
    if not path.is_dir():
        raise BundleError(f"{path} is not a directory; a bundle is one (docs/bundle.md)")
    return decode_manifest(_read_file(file, MAX_MANIFEST_BYTES), file)


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
                f" {FORMAT_VERSION}: publish the model again with a matching release"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        manifest.created()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not a manifest: {error}") from None
    return manifest


class _Head(msgspec.Struct):
    format_version: int


def open_bundle(
    path: Path,
    *,
    intra_op_threads: int = 1,
    verify: bool = True,
    warmup_batches: Sequence[int] = (1,),
) -> Bundle:
    """Open, check and warm up a bundle.

    Session options, which suit one scoring thread per worker:

    - `intra_op_threads`: threads of one run. 1 gives the most throughput per core, since nothing
      is handed between threads; more shorten a large batch's latency while cores are idle.
    - sequential execution, one inter-op thread: the graph is a chain with nothing to run beside.
    - no spinning: idle inference threads must not take the core of the event loop.
    - all graph optimizations; the CPU arena stays on, since batches come in a few sizes.

    Args:
        verify: compare checksums and golden outputs.
        warmup_batches: batch sizes to run once, so that the first real batch is not the slow one.

    Raises:
        BundleError: the first thing that is wrong, and what to do about it.
    """
    checks = _Checks(path, intra_op_threads=intra_op_threads)
    for name, check in checks.in_order(verify):
        try:
            check()
        except _BrokenError as problem:
            raise BundleError(f"{path}: {name}: {problem}") from None
    bundle = checks.bundle()
    k = min(10, bundle.manifest.most)
    for size in warmup_batches:
        bundle.score(np.ones((size, bundle.manifest.max_length), dtype=np.int64), k)
        if bundle.manifest.carry_width is not None:
            bundle.score(np.ones((size, 1), dtype=np.int64), k)
    return bundle


def session_options(intra_op_threads: int) -> ort.SessionOptions:
    """How every bundle is run; why so is in `open_bundle`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what fails is raised; nothing is printed
    return options


def check_bundle(path: Path) -> list[Finding]:
    """Everything that is wrong with a bundle, for `streamrec validate`."""
    try:
        checks = _Checks(path, intra_op_threads=1)
    except BundleError as error:
        return [Finding("error", "manifest", str(error))]
    findings: list[Finding] = []
    for name, check in checks.in_order(verify=True):
        try:
            check()
        except _BrokenError as problem:
            findings.append(Finding("error", name, str(problem)))
            if name == "files":
                # The listing cannot be trusted: nothing that it names may be opened.
                return findings
    manifest = checks.manifest
    if not manifest.golden:
        findings.append(
            Finding("warning", "golden", "no golden outputs: a swap cannot tell a spoiled model")
        )
    if not manifest.metrics:
        findings.append(Finding("warning", "metrics", "no offline metrics are recorded"))
    return findings


def write_bundle(
    directory: Path,
    *,
    model: bytes,
    items: Sequence[str],
    text_model: bytes | None = None,
    golden_histories: NDArray[np.int64] | None = None,
    golden_k: int = 10,
    **manifest_fields: Any,
) -> Path:
    """Write a bundle that appears at `directory` whole or not at all.

    Files go to a sibling directory first, the manifest last; one rename puts it in place.

    Args:
        text_model: `text.onnx`; then the field `text` of the manifest is needed too.
        golden_histories: int64 `[batch, length]` to record golden outputs for.
        manifest_fields: fields of `Manifest` other than those derived from the files.

    Raises:
        BundleError: the directory exists, or the bundle breaks the contract.
    """
    if directory.exists():
        raise BundleError(f"{directory} exists; versions are never overwritten")
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        parts = {MODEL_FILE: model, ITEMS_FILE: "".join(f"{item}\n" for item in items).encode()}
        if text_model is not None:
            parts[TEXT_FILE] = text_model
        for name, data in parts.items():
            write_durably(building / name, data)
        carry_width = _carry_width(_graph_inputs(building / MODEL_FILE))
        inputs, outputs = _contract(carry_width, state=text_model is not None)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            item_count=len(items),
            inputs=inputs,
            outputs=outputs,
            files={
                name: FileSpec(hashlib.sha256(data).hexdigest(), len(data))
                for name, data in parts.items()
            },
            **{"any_length": carry_width is not None, **manifest_fields},
        )
        write_durably(building / MANIFEST_FILE, _pretty(manifest))
        if golden_histories is not None:
            made, scores = open_bundle(building, verify=False).score(golden_histories, golden_k)
            golden = Golden(
                golden_histories.tolist(), golden_k, made.tolist(), scores.astype(float).tolist()
            )
            manifest = msgspec.structs.replace(manifest, golden=[golden])
            write_durably(building / MANIFEST_FILE, _pretty(manifest))
        open_bundle(building)
        building.chmod(0o755)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return directory


def _graph_inputs(model: Path) -> list[TensorSpec]:
    """Inputs of a graph, types as ONNX Runtime names them; none where it does not load, which is
    left to the checks."""
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception:
        return []
    return [
        TensorSpec(
            node.name, _ORT_TYPES.get(node.type, node.type), [dim or "" for dim in node.shape]
        )
        for node in session.get_inputs()
    ]


def _pretty(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that outlives a power cut."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


#: Items int64 and scores float32 `[batch, k]`.
_Lists = tuple[NDArray[np.int64], NDArray[np.float32]]


class _BrokenError(Exception):
    """A check failed; the message says how."""


class _Checks:
    """The contract, check by check. A later check may rest on an earlier one."""

    def __init__(self, path: Path, *, intra_op_threads: int) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._threads = intra_op_threads
        self._items: tuple[str, ...] | None = None
        self._session: ort.InferenceSession | None = None
        self._text: TextEncoder | None = None

    def in_order(self, verify: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "manifest", self._check_manifest
        yield "files", self._check_files
        if verify:
            yield "checksum", self._check_checksums
        yield "items", self._check_items
        yield "model", self._check_model
        yield "signature", self._check_signature
        yield "outputs", self._check_outputs
        yield "length", self._check_length
        yield "carry", self._check_carry
        yield "text", self._check_text
        if verify:
            yield "golden", self._check_golden

    def bundle(self) -> Bundle:
        assert self._items is not None and self._session is not None
        return Bundle(self.manifest, self.path, self._session, self._items, self._text)

    def _check_manifest(self) -> None:
        manifest = self.manifest
        try:
            parse_surface(manifest.surface)
        except ValueError as error:
            raise _BrokenError(str(error)) from None
        if not 1 <= manifest.min_length <= manifest.max_length <= 100_000:
            raise _BrokenError(
                f"min_length {manifest.min_length} and max_length {manifest.max_length} must be"
                " between 1 and 100000, the first not above the second"
            )
        if manifest.item_count < 1:
            raise _BrokenError(f"item_count is {manifest.item_count}; a model needs items")
        if manifest.max_k is not None and not 1 <= manifest.max_k <= manifest.item_count:
            raise _BrokenError(
                f"max_k is {manifest.max_k}; leave it out, or give 1 to item_count,"
                f" {manifest.item_count}"
            )
        inputs, outputs = self._wanted()
        for kind, declared, wanted in (
            ("inputs", manifest.inputs, inputs),
            ("outputs", manifest.outputs, outputs),
        ):
            if [(t.name, t.dtype) for t in declared] != [(t.name, t.dtype) for t in wanted]:
                raise _BrokenError(
                    f"{kind} are {_signature(declared)}; the contract is {_signature(wanted)}"
                )

    def _check_files(self) -> None:
        for required in (MODEL_FILE, ITEMS_FILE):
            if required not in self.manifest.files:
                raise _BrokenError(f"the manifest lists no {required}")
        root = self.path.resolve()
        for name, spec in self.manifest.files.items():
            if Path(name).name != name or name in {"", ".", "..", MANIFEST_FILE}:
                raise _BrokenError(f"file name {name!r} is not a plain name inside the bundle")
            file = self.path / name
            if file.is_symlink() or (file.exists() and file.resolve().parent != root):
                raise _BrokenError(f"{name} is a link out of the bundle; bundles hold plain files")
            if not file.is_file():
                raise _BrokenError(f"{name} is listed in the manifest and missing")
            size = file.stat().st_size
            if size != spec.bytes:
                raise _BrokenError(f"{name} has {size} bytes, the manifest says {spec.bytes}")
            if size > MAX_FILE_BYTES:
                raise _BrokenError(f"{name} has {size} bytes; at most {MAX_FILE_BYTES} are opened")
        listed = {*self.manifest.files, MANIFEST_FILE, "manifest.sig"}
        unlisted = sorted(entry.name for entry in self.path.iterdir() if entry.name not in listed)
        if unlisted:
            raise _BrokenError(f"not listed in the manifest: {', '.join(unlisted)}")

    def _check_checksums(self) -> None:
        for name, spec in self.manifest.files.items():
            with _reading(self.path / name) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != spec.sha256.lower():
                raise _BrokenError(f"{name} is not the file that was published (sha256 {found})")

    def _check_items(self) -> None:
        try:
            text = (self.path / ITEMS_FILE).read_bytes().decode("utf-8")
        except OSError as error:
            raise _BrokenError(f"{ITEMS_FILE} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise _BrokenError(f"{ITEMS_FILE} is not UTF-8 at byte {error.start}") from None
        # Not splitlines(): an item id may hold other separators, such as U+2028.
        items = tuple(text.removesuffix("\n").split("\n"))
        if len(items) != self.manifest.item_count:
            raise _BrokenError(
                f"{ITEMS_FILE} has {len(items)} lines, item_count is {self.manifest.item_count}"
            )
        seen: set[str] = set()
        for number, item in enumerate(items, start=1):
            if not 0 < len(item) <= MAX_ID_LENGTH:
                raise _BrokenError(
                    f"{ITEMS_FILE} line {number}: an item id has 1 to {MAX_ID_LENGTH} characters,"
                    f" this one {len(item)}"
                )
            if item in seen:
                raise _BrokenError(f"{ITEMS_FILE} line {number}: {item!r} comes twice")
            seen.add(item)
        self._items = items

    def _check_model(self) -> None:
        self._session = self._load(MODEL_FILE)

    def _load(self, name: str) -> ort.InferenceSession:
        options = session_options(self._threads)
        try:
            return ort.InferenceSession(
                str(self.path / name), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise _BrokenError(f"ONNX Runtime does not load {name}: {_first_line(error)}") from None

    def _check_signature(self) -> None:
        inputs, outputs = self._wanted()
        _check_tensors("the model", self._loaded(), inputs, outputs)
        history = next(n for n in self._loaded().get_inputs() if n.name == "history")
        if self.manifest.any_length and isinstance(history.shape[1], int):
            raise _BrokenError(
                f"the manifest says any_length, but the model reads {history.shape[1]} items: leave"
                " it out, or export the model with a free length"
            )
        if self.manifest.carry_width is not None and not self.manifest.any_length:
            raise _BrokenError("with a carry, the length of histories must be free (any_length)")

    def _wanted(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """What the manifest must declare, and the model have."""
        state = any(spec.name == STATE.name for spec in self.manifest.outputs)
        return _contract(self.manifest.carry_width, state=state)

    def _check_outputs(self) -> None:
        """Run histories of one item, of all padding but one, and full ones, in two batch sizes."""
        manifest = self.manifest
        for batch in (1, 3):
            history = np.zeros((batch, manifest.max_length), dtype=np.int64)
            history[:, -1] = np.arange(batch) % manifest.item_count + 1
            history[-1, :] = np.arange(manifest.max_length) % manifest.item_count + 1
            self._check_lists(history, min(10, manifest.most))
        self._check_lists(history, manifest.most)
        if manifest.most == manifest.item_count:
            self._check_nothing_beyond(history)

    def _check_lists(self, history: NDArray[np.int64], k: int) -> None:
        batch, count = len(history), self.manifest.item_count
        items, scores = self._run(history, k)
        if items.shape != (batch, k) or scores.shape != (batch, k):
            raise _BrokenError(
                f"for batch {batch} and k {k} the outputs are {items.shape} and {scores.shape}"
            )
        if not np.isfinite(scores).all():
            raise _BrokenError(
                f"scores for k {k} are not all finite (NaN or infinite weights, or fewer"
                " items than `max_k` says?)"
            )
        if items.min() < 1 or items.max() > count:
            raise _BrokenError(
                f"item indexes run from {items.min()} to {items.max()};"
                f" the catalogue has 1 to {count}"
            )
        if (np.diff(scores, axis=1) > 0).any():
            raise _BrokenError("scores do not descend")
        if (np.diff(np.sort(items, axis=1), axis=1) == 0).any():
            raise _BrokenError("an item comes twice in one list")

    def _check_nothing_beyond(self, history: NDArray[np.int64]) -> None:
        count = self.manifest.item_count
        try:
            _, scores = self._run(history, count + 1)
        except _BrokenError:
            return
        # What has no score is a filler, no item.
        if not np.isneginf(scores[:, -1]).all():
            raise _BrokenError(f"the model has more items than item_count, {count}")

    def _probes(self) -> list[NDArray[np.int64]]:
        """Histories int64 `[batch, max_length]` to compare two ways of running by."""
        manifest = self.manifest
        made = np.zeros((2, manifest.max_length), dtype=np.int64)
        made[0] = np.arange(manifest.max_length) * 7 % manifest.item_count + 1
        made[1, -1] = manifest.item_count
        golden = [np.array(golden.history, dtype=np.int64) for golden in manifest.golden]
        shape = (manifest.max_length,)
        return [made, *(tensor for tensor in golden if tensor.shape[1:] == shape and len(tensor))]

    def _check_length(self) -> None:
        """Cut padding changes nothing."""
        if not self.manifest.any_length:
            return
        k = min(10, self.manifest.most)
        for history in self._probes():
            known = history[:, -max(1, self.manifest.max_length // 2) :]
            padded = np.zeros_like(history)
            padded[:, -known.shape[1] :] = known
            self._compare(self._run(padded, k), self._run(known, k), "without its padding")

    def _check_carry(self) -> None:
        """A history read in pieces gives what it gives whole, and padding moves nothing."""
        if self.manifest.carry_width is None:
            return
        k = min(10, self.manifest.most)
        for history in self._probes():
            length = history.shape[1]
            whole = self._run(history, k)
            for cut in {length // 2, length - 1} - {0}:
                # The second half of a padded row may be all that there is of it.
                _, _, carry = self._advance(history[:, :cut], None, k)
                items, scores, after = self._advance(history[:, cut:], carry, k)
                self._compare(whole, (items, scores), f"read in pieces of {cut} and the rest")
                apart = np.zeros((len(history), 2 * (length - cut)), dtype=np.int64)
                apart[:, 1::2] = history[:, cut:]
                items, scores, _ = self._advance(apart, carry, k)
                self._compare(whole, (items, scores), "with padding between its items")
                nothing = np.zeros((len(history), 3), dtype=np.int64)
                if not np.array_equal(self._advance(nothing, after, k)[2], after):
                    raise _BrokenError(f"padding changes {NEXT_CARRY}: 0 must leave it as it was")

    def _advance(
        self, history: NDArray[np.int64], carry: NDArray[np.float32] | None, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        bundle = Bundle(self.manifest, self.path, self._loaded(), self._items or ())
        carry = bundle.fresh_carry(len(history)) if carry is None else carry
        try:
            items, scores, after = bundle.advance(history, carry, k)
        except Exception as error:
            raise _BrokenError(
                f"the model fails on a history {list(history.shape)} with a {CARRY}:"
                f" {_first_line(error)}"
            ) from None
        if after.shape != carry.shape or not np.isfinite(after).all():
            raise _BrokenError(
                f"{NEXT_CARRY} is {list(after.shape)}, or not all finite; it must be"
                f" {list(carry.shape)} of finite numbers"
            )
        return items, scores, after

    def _compare(self, one: _Lists, other: _Lists, how: str) -> None:
        """Whether two ways of running give the same scores, up to the manifest's tolerance.

        Lists may differ by items where scores are close, and where retrieval is approximate.
        """
        tolerance = self.manifest.golden_tolerance
        same = one[0][:, :, None] == other[0][:, None, :]
        apart = np.abs(one[1][:, :, None] - other[1][:, None, :])
        worst = float(apart[same].max(initial=0.0))
        if not worst <= tolerance:
            raise _BrokenError(
                f"a history {how} has scores that differ by up to {worst:.4g}; the manifest allows"
                f" {tolerance:g} (golden_tolerance)"
            )
        if same.sum() < one[0].size / 2:
            raise _BrokenError(f"a history {how} keeps {same.sum()} of {one[0].size} items")

    def _check_text(self) -> None:
        """The optional text encoder: its vectors must fit the model's states."""
        spec = self.manifest.text
        if (spec is None) != (TEXT_FILE not in self.manifest.files):
            raise _BrokenError(
                f"{TEXT_FILE} and the manifest's `text` belong together, and one of them is missing"
            )
        if spec is None:
            return
        if spec.scheme != SCHEME:
            raise _BrokenError(
                f"{TEXT_FILE} reads {spec.scheme!r}, this release makes {SCHEME!r}: run"
                " `streamrec models text` again, or a matching release"
            )
        if all(spec.name != STATE.name for spec in self.manifest.outputs):
            raise _BrokenError(f"with {TEXT_FILE}, the model needs the output {STATE.name!r}")
        encoder = TextEncoder(spec, self._load(TEXT_FILE))
        _check_tensors(TEXT_FILE, encoder.session, TEXT_INPUTS, TEXT_OUTPUTS)
        history = np.zeros((2, self.manifest.max_length), dtype=np.int64)
        history[:, -1] = (1, self.manifest.item_count)
        bundle = Bundle(self.manifest, self.path, self._loaded(), self._items or (), encoder)
        try:
            states = bundle.score_with_states(history, 1)[2]
            # The last gram must be in the table, and a text without any must do no harm.
            edge = np.array([[spec.buckets, 0], [0, 0], [1, spec.buckets]])
            (found,) = encoder.session.run(["vectors"], {"grams": edge})
            vectors = np.concatenate([found, encoder.encode(["", "a text", "テキスト"])])
        except Exception as error:
            raise _BrokenError(
                f"{TEXT_FILE} or the model's state fails: {_first_line(error)}"
            ) from None
        if states.shape != (2, vectors.shape[1]) or vectors.shape[0] != 6:
            raise _BrokenError(
                f"states of 2 users are {states.shape}, vectors of 6 texts {vectors.shape}; the"
                " contract is [batch, width] and [n, width], of one width"
            )
        if not (np.isfinite(states).all() and np.isfinite(vectors).all()):
            raise _BrokenError("states or text vectors are not all finite")
        self._text = encoder

    def _check_golden(self) -> None:
        tolerance = self.manifest.golden_tolerance
        for golden in self.manifest.golden:
            try:
                history = np.array(golden.history, dtype=np.int64)
                items = np.array(golden.items, dtype=np.int64)
                scores = np.array(golden.scores, dtype=np.float32)
            except (ValueError, OverflowError) as error:
                raise _BrokenError(f"golden outputs are not tensors: {error}") from None
            if history.ndim != 2 or items.shape != scores.shape or golden.k < 1:
                raise _BrokenError("golden outputs are not [batch, length] and [batch, k]")
            found_items, found_scores = self._run(history, golden.k)
            if found_items.shape != items.shape:
                raise _BrokenError(
                    f"golden items are {items.shape}, the model gives {found_items.shape}"
                )
            worst = float(np.abs(found_scores - scores).max(initial=0.0))
            if not worst <= tolerance:
                raise _BrokenError(
                    f"scores differ from the golden ones by up to {worst:.4g}; the manifest allows"
                    f" {tolerance:g}: the weights or the item order changed after publishing"
                )
            if _misplaced((items, scores), (found_items, found_scores), tolerance):
                raise _BrokenError("items differ from the golden ones where scores are far apart")

    def _run(
        self, history: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        bundle = Bundle(self.manifest, self.path, self._loaded(), self._items or ())
        try:
            return bundle.score(history, k)
        except Exception as error:
            raise _BrokenError(
                f"the model fails on a history {list(history.shape)} with k {k}:"
                f" {_first_line(error)}"
            ) from None

    def _loaded(self) -> ort.InferenceSession:
        if self._session is None:
            raise _BrokenError("not checked, since the model was not loaded")
        return self._session


def _misplaced(expected: _Lists, found: _Lists, tolerance: float) -> bool:
    """Whether items differ otherwise than by changing places where scores are within tolerance."""
    scores = expected[1]
    gaps = np.abs(np.diff(scores, axis=1, prepend=np.inf, append=-np.inf))
    close = np.minimum(gaps[:, :-1], gaps[:, 1:]) <= 2 * tolerance
    close[:, -1] = True  # the one after the last is not known
    return bool(((expected[0] != found[0]) & ~close).any())


def _check_tensors(
    name: str,
    session: ort.InferenceSession,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    """All of `outputs` must be there, and no input but `inputs`."""
    for kind, found, wanted in (
        ("inputs", session.get_inputs(), inputs),
        ("outputs", session.get_outputs(), outputs),
    ):
        by_name = {node.name: node for node in found}
        for spec in wanted:
            node = by_name.pop(spec.name, None)
            if node is None:
                raise _BrokenError(f"{name} has no {kind[:-1]} {spec.name!r}")
            if _ORT_TYPES.get(node.type) != spec.dtype or len(node.shape) != len(spec.shape):
                raise _BrokenError(
                    f"{kind[:-1]} {spec.name} is {node.type} {node.shape};"
                    f" the contract is {_signature([spec])}"
                )
        if by_name and kind == "inputs":
            raise _BrokenError(f"{name} wants inputs beyond the contract: {', '.join(by_name)}")


def _signature(tensors: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{tensor.name} {tensor.dtype} {tensor.shape}" for tensor in tensors)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _read_file(path: Path, limit: int) -> bytes:
    with _reading(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BundleError(f"{path} has more than {limit} bytes; that is no manifest")
    return cast(bytes, data)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise BundleError(
            f"{path} is missing: the directory is no bundle, or was not written to the end"
        ) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None


def metric_summary(metrics: Mapping[str, float]) -> str:
    """Metrics on one line, for listings."""
    return " ".join(f"{name}={value:.4f}" for name, value in sorted(metrics.items()))
