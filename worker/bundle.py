"""A model bundle: a directory with `model.onnx`, `items.txt`, `manifest.json` and, for items that
the model has not seen, `text.onnx` (docs/bundle.md).

Needs no training code. What a bundle must be is checked in worker/bundle_checks.py.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from worker.bundle_checks import Checks
from worker.bundle_files import BundleFiles, write_durably
from worker.errors import BundleError, Refusal
from worker.manifest import (
    FORMAT_VERSION,
    ITEMS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    NEXT_CARRY,
    STATE,
    TEXT_FILE,
    FileSpec,
    Golden,
    Manifest,
    carry_width_of,
    contract,
    encode_manifest,
)
from worker.session import MAX_RUN_ROWS, first_line, fresh_carry, graph_inputs, run_model
from worker.text import TextEncoder


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

    def own(self, item: str) -> str:
        """The catalogue's own string for `item`; itself where the model does not know it."""
        at = self.index.get(item)
        return item if at is None else self.items[at - 1]

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
        return fresh_carry(batch, width)

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
        return run_model(
            self.session,
            outputs,
            history,
            k,
            carry_width=self.manifest.carry_width,
            carry=carry,
        )


def open_bundle(
    path: Path,
    *,
    intra_op_threads: int = 1,
    verify: bool = True,
    warmup_batches: Sequence[int] = (1,),
    memory_budget_bytes: int | None = None,
    public_keys: Sequence[bytes] = (),
    beside: Sequence[Bundle] = (),
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
        warmup_batches: batch sizes to run once, so that the first real batch is not the slow one;
            larger ones than `worker.session.MAX_RUN_ROWS` as that.
        memory_budget_bytes: refuse a bundle that is expected to take more; None opens any.
        public_keys: refuse a bundle that none of them signed (`worker.signing.parse_public_key`);
            none given: signatures are not looked at.
        beside: bundles that are open; item ids that are one of theirs are shared with it, which
            saves the time and the memory of another copy.

    Raises:
        BundleError: the first thing that is wrong, and what to do about it; `reason` names it.
        ExtraMissingError: `public_keys` are given, and the extra `signed` is not installed.
    """
    with BundleFiles(path) as files:
        checks = Checks(
            files,
            path,
            intra_op_threads=intra_op_threads,
            verify=verify,
            memory_budget_bytes=memory_budget_bytes,
            public_keys=public_keys,
            indexes={bundle.manifest.catalogue: bundle.index for bundle in beside},
        )
        for check in checks.in_order():
            try:
                check()
            except BundleError as error:
                raise BundleError(f"{path}: {error.reason}: {error}", error.reason) from None
    shared = (one.items for one in beside if one.index is checks.index)
    items = next(shared, None) or tuple(checks.index)
    bundle = Bundle(checks.manifest, path, checks.session, items, checks.text)
    # What the cached property would make at the first batch is there already.
    vars(bundle)["index"] = checks.index
    try:
        _warm_up(bundle, warmup_batches)
    except Exception as error:
        raise BundleError(
            f"{path}: the model fails on batches of {list(warmup_batches)}: {first_line(error)}",
            Refusal.CONTRACT,
        ) from None
    return bundle


def _warm_up(bundle: Bundle, batches: Sequence[int]) -> None:
    k = min(10, bundle.manifest.most)
    for size in sorted({min(size, MAX_RUN_ROWS) for size in batches}):
        bundle.score(np.ones((size, bundle.manifest.max_length), dtype=np.int64), k)
        if bundle.manifest.carry_width is not None:
            bundle.score(np.ones((size, 1), dtype=np.int64), k)


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
        carry_width = carry_width_of(graph_inputs(model))
        inputs, outputs = contract(carry_width, state=text_model is not None)
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
        write_durably(building / MANIFEST_FILE, encode_manifest(manifest))
        if golden_histories is not None:
            made, scores = open_bundle(building, verify=False).score(golden_histories, golden_k)
            golden = Golden(
                golden_histories.tolist(), golden_k, made.tolist(), scores.astype(float).tolist()
            )
            manifest = msgspec.structs.replace(manifest, golden=[golden])
            write_durably(building / MANIFEST_FILE, encode_manifest(manifest))
        open_bundle(building)
        building.chmod(0o755)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return directory
