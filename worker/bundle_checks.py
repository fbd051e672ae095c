"""The checks that a bundle must pass before it serves, and the list of what is wrong with one.

Cheap ones come first, and nothing of a file is used before its checksum was compared. A check may
rest on an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from worker.bundle_files import BundleFiles, read_manifest_bytes
from worker.errors import BundleError, Refusal
from worker.item_ids import read_item_ids
from worker.manifest import (
    CARRY,
    ITEMS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    NEXT_CARRY,
    SIGNATURE_FILE,
    STATE,
    TEXT_FILE,
    TEXT_INPUTS,
    TEXT_OUTPUTS,
    check_manifest,
    decode_manifest,
    wanted_tensors,
)
from worker.memory import check_budget
from worker.session import (
    MAX_RUN_ROWS,
    check_tensors,
    first_line,
    fresh_carry,
    load_session,
    run_model,
)
from worker.signing import MAX_SIGNATURE_BYTES, check_signature
from worker.text import SCHEME, TextEncoder
from worker.weights import check_onnx

#: Items int64 and scores float32 `[batch, k]`.
_Lists = tuple[NDArray[np.int64], NDArray[np.float32]]
#: Problems after which no file may be looked into.
_UNTRUSTED = {
    Refusal.PATH,
    Refusal.SYMLINK,
    Refusal.MISSING,
    Refusal.FILES,
    Refusal.CHECKSUM,
    Refusal.MEMORY,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a bundle, in words."""

    level: Literal["error", "warning"]
    #: A `Refusal`, or what a warning is about.
    check: str
    message: str


def check_bundle(path: Path) -> list[Finding]:
    """Everything that is wrong with a bundle, for `streamrec validate`."""
    findings: list[Finding] = []
    try:
        with BundleFiles(path) as files:
            checks = Checks(files, path)
            for check in checks.in_order():
                try:
                    check()
                except _NotLoadedError:
                    continue  # why is among the findings
                except BundleError as error:
                    findings.append(Finding("error", error.reason.value, str(error)))
                    if error.reason in _UNTRUSTED:
                        return findings
    except BundleError as error:
        return [Finding("error", error.reason.value, str(error))]
    manifest = checks.manifest
    if not manifest.golden:
        findings.append(
            Finding("warning", "golden", "no golden outputs: a swap cannot tell a spoiled model")
        )
    if not manifest.metrics:
        findings.append(Finding("warning", "metrics", "no offline metrics are recorded"))
    return findings


class _NotLoadedError(Exception):
    """A check rests on a model that an earlier one refused."""


class Checks:
    """The contract, check by check.

    Args:
        files: the open bundle.
        path: where it lies, for messages.
        intra_op_threads: of the sessions that are loaded.
        verify: compare checksums and golden outputs.
        memory_budget_bytes: most memory that it may take; None: any.
        public_keys: of whom one must have signed it, 32 bytes each; none: signatures are not
            looked at.
        indexes: of bundles that are open, by catalogue: a list of ids that is one of theirs is not
            read again.

    Raises:
        BundleError: there is no manifest, it is not trusted, or not one.
    """

    def __init__(
        self,
        files: BundleFiles,
        path: Path,
        *,
        intra_op_threads: int = 1,
        verify: bool = True,
        memory_budget_bytes: int | None = None,
        public_keys: Sequence[bytes] = (),
        indexes: Mapping[str, dict[str, int]] | None = None,
    ) -> None:
        self._files = files
        self._indexes = {} if indexes is None else indexes
        self._threads = intra_op_threads
        self._verify = verify
        self._memory_budget_bytes = memory_budget_bytes
        data = read_manifest_bytes(files, path)
        if public_keys:
            # Before it is parsed: what nobody vouches for is not read.
            try:
                check_signature(data, self._signatures(), public_keys)
            except BundleError as error:
                raise BundleError(f"{path}: {error}", error.reason) from None
        self.manifest = decode_manifest(data, path / MANIFEST_FILE)
        #: Model index by item id, in order.
        self.index: dict[str, int] = {}
        self.text: TextEncoder | None = None
        self._session: ort.InferenceSession | None = None

    def in_order(self) -> Iterator[Callable[[], None]]:
        """The checks. Each raises `BundleError` for the first problem that it finds."""
        yield self._check_manifest
        yield self._check_files
        if self._memory_budget_bytes is not None:
            yield self._check_memory
        if self._verify:
            yield self._check_checksums
        yield self._check_model
        yield self._check_items
        yield self._check_tensors
        yield self._check_outputs
        yield self._check_length
        yield self._check_carry
        yield self._check_text
        if self._verify:
            yield self._check_golden

    @property
    def session(self) -> ort.InferenceSession:
        """The model, once its check has passed."""
        if self._session is None:
            raise _NotLoadedError
        return self._session

    def _signatures(self) -> bytes | None:
        if not self._files.has(SIGNATURE_FILE):
            return None
        return self._files.whole(SIGNATURE_FILE, MAX_SIGNATURE_BYTES)

    def _check_manifest(self) -> None:
        check_manifest(self.manifest)

    def _check_files(self) -> None:
        self._files.check_listing(self.manifest)

    def _check_memory(self) -> None:
        assert self._memory_budget_bytes is not None
        check_budget(self.manifest, self._memory_budget_bytes, rows=MAX_RUN_ROWS)

    def _check_checksums(self) -> None:
        for name in self.manifest.files:
            for _ in self._chunks(name):
                pass

    def _chunks(self, name: str) -> Iterator[bytes]:
        return self._files.chunks(name, self.manifest.files[name], verify=self._verify)

    def _check_items(self) -> None:
        # After the model: while that loads, it takes more than it does later.
        known = self._indexes.get(self.manifest.catalogue)
        if known is not None and len(known) == self.manifest.item_count:
            self.index = known
        else:
            self.index = read_item_ids(self._chunks(ITEMS_FILE), self.manifest.item_count)

    def _check_model(self) -> None:
        self._session = self._load(MODEL_FILE)

    def _load(self, name: str) -> ort.InferenceSession:
        check_onnx(name, self._chunks(name))
        return load_session(
            name, self._chunks(name), self._threads, file_bytes=self.manifest.files[name].bytes
        )

    def _check_tensors(self) -> None:
        manifest = self.manifest
        inputs, outputs = wanted_tensors(manifest)
        check_tensors("the model", self.session, inputs, outputs)
        history = next(n for n in self.session.get_inputs() if n.name == "history")
        if manifest.any_length and isinstance(history.shape[1], int):
            raise BundleError(
                f"the manifest says any_length, but the model reads {history.shape[1]} items: leave"
                " it out, or export the model with a free length",
                Refusal.CONTRACT,
            )
        if manifest.carry_width is not None and not manifest.any_length:
            raise BundleError(
                "with a carry, the length of histories must be free (any_length)", Refusal.CONTRACT
            )

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
            raise BundleError(
                f"for batch {batch} and k {k} the outputs are {items.shape} and {scores.shape}",
                Refusal.CONTRACT,
            )
        if not np.isfinite(scores).all():
            raise BundleError(
                f"scores for k {k} are not all finite (NaN or infinite weights, or fewer"
                " items than `max_k` says?)",
                Refusal.WEIGHTS,
            )
        if items.min() < 1 or items.max() > count:
            raise BundleError(
                f"item indexes run from {items.min()} to {items.max()};"
                f" the catalogue has 1 to {count}",
                Refusal.ITEMS,
            )
        if (np.diff(scores, axis=1) > 0).any():
            raise BundleError("scores do not descend", Refusal.CONTRACT)
        if (np.diff(np.sort(items, axis=1), axis=1) == 0).any():
            raise BundleError("an item comes twice in one list", Refusal.CONTRACT)

    def _check_nothing_beyond(self, history: NDArray[np.int64]) -> None:
        count = self.manifest.item_count
        try:
            _, scores = self._run(history, count + 1)
        except BundleError:
            return
        # What has no score is a filler, no item.
        if not np.isneginf(scores[:, -1]).all():
            raise BundleError(f"the model has more items than item_count, {count}", Refusal.ITEMS)

    def _probes(self) -> list[NDArray[np.int64]]:
        """Histories int64 `[batch, max_length]` to compare two ways of running by."""
        manifest = self.manifest
        made = np.zeros((2, manifest.max_length), dtype=np.int64)
        made[0] = np.arange(manifest.max_length) * 7 % manifest.item_count + 1
        made[1, -1] = manifest.item_count
        golden = [history for history, _, _ in self._goldens()]
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
                    raise BundleError(
                        f"padding changes {NEXT_CARRY}: 0 must leave it as it was", Refusal.CONTRACT
                    )

    def _advance(
        self, history: NDArray[np.int64], carry: NDArray[np.float32] | None, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        assert self.manifest.carry_width is not None
        if carry is None:
            carry = fresh_carry(len(history), self.manifest.carry_width)
        items, scores, after = self._outputs(["items", "scores", NEXT_CARRY], history, k, carry)
        if after.shape != carry.shape or not np.isfinite(after).all():
            raise BundleError(
                f"{NEXT_CARRY} is {list(after.shape)}, or not all finite; it must be"
                f" {list(carry.shape)} of finite numbers",
                Refusal.CONTRACT,
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
            raise BundleError(
                f"a history {how} has scores that differ by up to {worst:.4g}; the manifest allows"
                f" {tolerance:g} (golden_tolerance)",
                Refusal.CONTRACT,
            )
        if same.sum() < one[0].size / 2:
            raise BundleError(
                f"a history {how} keeps {same.sum()} of {one[0].size} items", Refusal.CONTRACT
            )

    def _check_text(self) -> None:
        """The optional text encoder: its vectors must fit the model's states."""
        spec = self.manifest.text
        if (spec is None) != (TEXT_FILE not in self.manifest.files):
            raise BundleError(
                f"{TEXT_FILE} and the manifest's `text` belong together; one of them is missing",
                Refusal.CONTRACT,
            )
        if spec is None:
            return
        if spec.scheme != SCHEME:
            raise BundleError(
                f"{TEXT_FILE} reads {spec.scheme!r}, this release makes {SCHEME!r}: run"
                " `streamrec models text` again, or a matching release",
                Refusal.FORMAT,
            )
        if all(spec.name != STATE.name for spec in self.manifest.outputs):
            raise BundleError(
                f"with {TEXT_FILE}, the model needs the output {STATE.name!r}", Refusal.CONTRACT
            )
        encoder = TextEncoder(spec, self._load(TEXT_FILE))
        check_tensors(TEXT_FILE, encoder.session, TEXT_INPUTS, TEXT_OUTPUTS)
        history = np.zeros((2, self.manifest.max_length), dtype=np.int64)
        history[:, -1] = (1, self.manifest.item_count)
        (states,) = self._outputs([STATE.name], history, 1)
        try:
            # The last gram must be in the table, and a text without any must do no harm.
            edge = np.array([[spec.buckets, 0], [0, 0], [1, spec.buckets]])
            (found,) = encoder.session.run(["vectors"], {"grams": edge})
            vectors = np.concatenate([found, encoder.encode(["", "a text", "テキスト"])])
        except Exception as error:
            raise BundleError(
                f"{TEXT_FILE} fails: {first_line(error)}",
                Refusal.CONTRACT,
            ) from None
        if states.shape != (2, vectors.shape[1]) or vectors.shape[0] != 6:
            raise BundleError(
                f"states of 2 users are {states.shape}, vectors of 6 texts {vectors.shape}; the"
                " contract is [batch, width] and [n, width], of one width",
                Refusal.CONTRACT,
            )
        if not (np.isfinite(states).all() and np.isfinite(vectors).all()):
            raise BundleError("states or text vectors are not all finite", Refusal.WEIGHTS)
        self.text = encoder

    def _goldens(self) -> Iterator[tuple[NDArray[np.int64], int, _Lists]]:
        """Histories int64 `[batch, length]`, k, and the lists that they gave."""
        for golden in self.manifest.golden:
            try:
                history = np.array(golden.history, dtype=np.int64)
                items = np.array(golden.items, dtype=np.int64)
                scores = np.array(golden.scores, dtype=np.float32)
            except (ValueError, OverflowError) as error:
                raise BundleError(
                    f"golden outputs are not tensors: {error}", Refusal.GOLDEN
                ) from None
            shape = (len(history), golden.k)
            if history.ndim != 2 or not items.shape == scores.shape == shape or golden.k < 1:
                raise BundleError(
                    "golden outputs are not [batch, length] and [batch, k]", Refusal.GOLDEN
                )
            if len(history) > MAX_RUN_ROWS:
                raise BundleError(
                    f"a golden output has {len(history)} histories; split it by {MAX_RUN_ROWS}",
                    Refusal.GOLDEN,
                )
            yield history, golden.k, (items, scores)

    def _check_golden(self) -> None:
        tolerance = self.manifest.golden_tolerance
        for history, k, (items, scores) in self._goldens():
            found_items, found_scores = self._run(history, k)
            if not found_items.shape == found_scores.shape == items.shape:
                raise BundleError(
                    f"golden items are {items.shape}, the model gives {found_items.shape}",
                    Refusal.GOLDEN,
                )
            worst = float(np.abs(found_scores - scores).max(initial=0.0))
            if not worst <= tolerance:
                raise BundleError(
                    f"scores differ from the golden ones by up to {worst:.4g}; the manifest allows"
                    f" {tolerance:g}: the weights or the item order changed after publishing",
                    Refusal.GOLDEN,
                )
            if _misplaced((items, scores), (found_items, found_scores), tolerance):
                raise BundleError(
                    "items differ from the golden ones where scores are far apart", Refusal.GOLDEN
                )

    def _run(self, history: NDArray[np.int64], k: int) -> _Lists:
        items, scores = self._outputs(["items", "scores"], history, k)
        return items, scores

    def _outputs(
        self,
        names: Sequence[str],
        history: NDArray[np.int64],
        k: int,
        carry: NDArray[np.float32] | None = None,
    ) -> list[Any]:
        try:
            return run_model(
                self.session,
                names,
                history,
                k,
                carry_width=self.manifest.carry_width,
                carry=carry,
            )
        except _NotLoadedError:
            raise
        except Exception as error:
            given = "" if carry is None else f" and a {CARRY}"
            raise BundleError(
                f"the model fails on a history {list(history.shape)} with k {k}{given}:"
                f" {first_line(error)}",
                Refusal.CONTRACT,
            ) from None


def _misplaced(expected: _Lists, found: _Lists, tolerance: float) -> bool:
    """Whether items differ otherwise than by changing places where scores are within tolerance."""
    scores = expected[1]
    gaps = np.abs(np.diff(scores, axis=1, prepend=np.inf, append=-np.inf))
    close = np.minimum(gaps[:, :-1], gaps[:, 1:]) <= 2 * tolerance
    close[:, -1] = True  # the one after the last is not known
    return bool(((expected[0] != found[0]) & ~close).any())
