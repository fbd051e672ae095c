"""From histories to candidates: what a bundle reads, and its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.bundle import Bundle
from worker.cold_items import ColdIndex
from worker.history import History
from worker.session import MAX_RUN_ROWS

#: Longest piece that a recurrent model is fed from its carry; a longer one is as well made anew.
MAX_STEPS = 16


class Candidates:
    """Candidates of one batch of users: indexes and scores, both `[batch, k]`, best first.

    Args:
        items: model indexes; those above `bundle.manifest.item_count` are places in `cold`.
        complete: whether the model gives nothing beyond these.
    """

    def __init__(
        self,
        bundle: Bundle,
        items: NDArray[np.int64],
        scores: NDArray[np.float32],
        *,
        complete: bool,
        cold: Sequence[str] = (),
    ) -> None:
        self._names = bundle.items
        self.items = items
        self.scores = scores
        self.cold = cold
        self.complete = complete

    def of(self, row: int) -> Iterator[tuple[str, float]]:
        """Item ids and scores of one user, best first."""
        names, cold, known = self._names, self.cold, len(self._names)
        for index, score in zip(self.items[row].tolist(), self.scores[row].tolist(), strict=True):
            yield names[index - 1] if index <= known else cold[index - known - 1], score


@dataclass(slots=True)
class Run:
    """Users that are scored together.

    `rows` are their places in the batch; `history` is int64 `[rows, length]`, padded with 0 on the
    left; `carry` is float32 `[rows, width]`, None for a model that has none.
    """

    rows: NDArray[np.int64]
    history: NDArray[np.int64]
    carry: NDArray[np.float32] | None = None

    def only(self, kept: NDArray[np.int64]) -> Run:
        """The run for some of its users, by their places in it."""
        carry = None if self.carry is None else self.carry[kept]
        return Run(self.rows[kept], self.history[kept], carry)


@dataclass(slots=True)
class Inputs:
    """What the model reads of a batch of users."""

    #: Model indexes of each user's whole history, int32 `[batch, history length]`; 0 where the
    #: model does not know an item.
    windows: NDArray[np.int32]
    #: Runs for all users that the model can score, of at most `MAX_RUN_ROWS`.
    runs: list[Run]


def model_inputs(histories: Sequence[History], bundle: Bundle) -> Inputs:
    """What `bundle` reads of `histories`, all of one length and at least one.

    A user whose known history is shorter than the manifest's `min_length` is in no run.
    """
    manifest, index = bundle.manifest, bundle.index
    catalogue, version = manifest.catalogue, manifest.reference
    fresh: list[list[int] | None] = [
        history.refresh_window(index, bundle.items, catalogue, version) for history in histories
    ]
    windows = np.frombuffer(b"".join([history.window for history in histories]), dtype=np.int32)
    windows = windows.reshape(len(histories), -1)
    known = windows != 0
    counts = known.sum(axis=1)
    able = counts >= max(1, manifest.min_length)
    if manifest.carry_width is None:
        return Inputs(windows, _whole(bundle, windows, known, counts, able))
    stepped = np.array(
        [
            history.carry is not None and new is not None and 0 < len(new) <= MAX_STEPS
            for history, new in zip(histories, fresh, strict=True)
        ]
    )
    runs: list[Run] = []
    rows = np.flatnonzero(able & stepped)
    if len(rows):
        steps = [fresh[row] or [] for row in rows.tolist()]
        pieces = np.zeros((len(rows), max(map(len, steps))), dtype=np.int64)
        for place, items in enumerate(steps):
            pieces[place, -len(items) :] = items
        carries = b"".join([histories[row].carry or b"" for row in rows.tolist()])
        carry = np.frombuffer(carries, dtype=np.float32).reshape(len(rows), -1)
        runs += _parts(Run(rows, pieces, carry))
    runs += _whole(bundle, windows, known, counts, able & ~stepped)
    for history in histories:
        # Until the run is through: one that fails must not leave a carry behind its window.
        history.carry = None
    return Inputs(windows, runs)


def _whole(
    bundle: Bundle,
    windows: NDArray[np.int32],
    known: NDArray[np.bool_],
    counts: NDArray[np.int64],
    chosen: NDArray[np.bool_],
) -> list[Run]:
    """Runs that read the whole histories of the `chosen` users."""
    manifest, rows = bundle.manifest, np.flatnonzero(chosen)
    if manifest.any_length:
        # Short histories together, so that little padding is computed.
        rows = rows[np.argsort(counts[rows], kind="stable")]
    packed = _packed(windows[rows], known[rows], counts[rows], manifest.max_length)
    carry = None if manifest.carry_width is None else bundle.fresh_carry(len(rows))
    runs = list(_parts(Run(rows, packed, carry)))
    if manifest.any_length:
        for run in runs:
            longest = min(manifest.max_length, int(counts[run.rows].max()))
            run.history = run.history[:, -longest:]
    return runs


def _packed(
    windows: NDArray[np.int32], known: NDArray[np.bool_], counts: NDArray[np.int64], length: int
) -> NDArray[np.int64]:
    """The last `length` known items of each row, int64 `[batch, length]`, padded on the left."""
    rows, width = windows.shape
    packed = np.zeros((rows, length), dtype=np.int64)
    taken = min(length, width)
    packed[:, length - taken :] = windows[:, width - taken :]
    # Where an unknown item lies between known ones, those close up.
    broken = np.flatnonzero((known.argmax(axis=1) != width - counts) & (counts > 0))
    for row in broken:
        items = windows[row][known[row]][-length:]
        packed[row] = 0
        packed[row, length - len(items) :] = items
    return packed


def _parts(run: Run) -> Iterator[Run]:
    for start in range(0, len(run.rows), MAX_RUN_ROWS):
        yield run.only(np.arange(start, min(start + MAX_RUN_ROWS, len(run.rows))))


def score(
    bundle: Bundle, run: Run, count: int, cold: ColdIndex | None = None
) -> tuple[Candidates, NDArray[np.float32] | None]:
    """The `count` best candidates of each user of a run, and their next carry.

    With `cold`, up to as many cold items come in between them, by score.
    """
    known, most = bundle.manifest.item_count, bundle.manifest.most
    kept, complete = min(count, most), count >= most
    if run.carry is not None:
        items, scores, carry = bundle.advance(run.history, run.carry, kept)
        return Candidates(bundle, items, scores, complete=complete), carry
    if cold is None:
        items, scores = bundle.score(run.history, kept)
        return Candidates(bundle, items, scores, complete=complete), None
    items, scores, states = bundle.score_with_states(run.history, kept)
    places, cold_scores = cold.best(states, len(cold) if complete else count)
    items = np.concatenate([items, places + (known + 1)], axis=1)
    scores = np.concatenate([scores, cold_scores], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    if not complete:
        # Below the model's last candidate an item of the catalogue may be missing.
        order = order[:, :kept]
    candidates = Candidates(
        bundle,
        np.take_along_axis(items, order, axis=1),
        np.take_along_axis(scores, order, axis=1),
        complete=complete,
        cold=cold.items,
    )
    return candidates, None
