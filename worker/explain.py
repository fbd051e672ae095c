"""Which history items moved a recommended item's score, and by how much. No I/O.

Leave-one-out: the model scores the history once as it is and once without each of its items, all
in one batch through the very bundle that serves. This is the occlusion of Zeiler & Fergus (ECCV
2014) with history items in place of image patches: it needs no gradients, so it explains quantized
graphs as they are. What it can and cannot say: docs/explain.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.bundle import Bundle

#: Most that one run's scores may take; a large catalogue is explained in several runs.
MAX_BYTES = 64 << 20
#: What one score of a run takes at the peak: logit, item index, sorted score, the sort's own
#: memory, and the look-up of wanted items. Measured at 100,000 items.
BYTES_PER_SCORE = 30

ONE_ITEM = "the whole score rests on the one item of the history that the model knows"
NO_ITEM = "the model knows no item of the history"
NOT_IN_CATALOGUE = "the model's catalogue does not hold this item"
NOT_A_CANDIDATE = "without some history item it is not among the candidates that the model returns"


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """Scores of `items` with and without each item of `history`; NaN where there is none.

    `whole`: float32 `[items]`, after the whole history.
    `base`: float32 `[items]`, after its last item alone.
    `influence`: float32 `[history, items]`, `whole` less the score without that history item.
    """

    whole: NDArray[np.float32]
    base: NDArray[np.float32]
    influence: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Influence:
    """What one history item did to one recommended item."""

    item: str
    #: 1 for the newest item of the history.
    recency: int
    #: Score with it less score without it, in the unit of the model's scores.
    value: float
    #: Its part, 0 to 1, of all movement up and down by single history items.
    share: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one item has its score."""

    item: str
    #: After the whole history; None where the model gives none.
    score: float | None
    #: After the last history item alone: the shortest history that every model can score.
    base: float | None
    #: Oldest history item first; empty where `note` says why.
    influences: tuple[Influence, ...]
    note: str | None

    def raised(self, count: int) -> list[Influence]:
        """The `count` history items that raised the score most, most first."""
        up = [one for one in self.influences if one.value > 0]
        return sorted(up, key=lambda one: (-one.value, one.recency))[:count]

    def lowered(self, count: int) -> list[Influence]:
        """The `count` history items that lowered the score most, most first."""
        down = [one for one in self.influences if one.value < 0]
        return sorted(down, key=lambda one: (one.value, one.recency))[:count]


def explain(bundle: Bundle, history: Sequence[str], items: Sequence[str]) -> list[Explanation]:
    """Explain the scores of `items` after `history`.

    Args:
        history: item ids, oldest first. As when serving, the model reads the last
            `manifest.max_length` of those that it knows.
        items: distinct item ids.

    Returns:
        One explanation for each of `items`, in their order.
    """
    known = [
        (len(history) - place, bundle.index[item])
        for place, item in enumerate(history)
        if item in bundle.index
    ][-bundle.manifest.max_length :]
    wanted = [item for item in items if item in bundle.index]
    if not known:
        return [_unexplained(item, NO_ITEM) for item in items]
    made = leave_one_out(
        bundle,
        np.array([index for _, index in known], dtype=np.int64),
        np.array([bundle.index[item] for item in wanted], dtype=np.int64),
    )
    recencies = [recency for recency, _ in known]
    column = {item: number for number, item in enumerate(wanted)}
    return [
        _explanation(item, history, recencies, made, column[item])
        if item in column
        else _unexplained(item, NOT_IN_CATALOGUE)
        for item in items
    ]


def leave_one_out(
    bundle: Bundle, history: NDArray[np.int64], items: NDArray[np.int64]
) -> LeaveOneOut:
    """Score `items` after `history` and after each history that lacks one item of it.

    The gap that an item leaves closes; no older item moves in at the far end, so that a difference
    is due to one item alone. Where the catalogue is too large for one run, each run scores the
    whole history again: dynamically quantized models round by what else is in the batch, so scores
    of two runs are not compared.

    Args:
        history: int64 `[history]`, model indexes, oldest first, 1 to `manifest.max_length` of them.
        items: int64 `[items]`, distinct model indexes.
    """
    count = bundle.manifest.most
    whole_history, *others = _variants(history, bundle.manifest.max_length)
    per_run = max(1, MAX_BYTES // (BYTES_PER_SCORE * count) - 1)
    whole = np.empty(len(items), dtype=np.float32)
    changes = np.full((len(history) + 1, len(items)), np.nan, dtype=np.float32)
    for start in range(0, len(others), per_run):
        batch = np.stack([whole_history, *others[start : start + per_run]])
        scores = _scores(bundle, batch, count, items)
        changes[start : start + len(batch) - 1] = scores[0] - scores[1:]
        if start == 0:
            whole = scores[0]
    return LeaveOneOut(whole, whole - changes[0], changes[1:])


def _variants(history: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """int64 `[history + 2, length]`: whole, its last item alone, then each without one item.

    A history of one item has no third kind: the contract promises no score after nothing.
    """
    kept = [history, history[-1:]]
    if len(history) > 1:
        kept += [np.delete(history, place) for place in range(len(history))]
    tensor = np.zeros((len(kept), length), dtype=np.int64)
    for row, items in enumerate(kept):
        tensor[row, length - len(items) :] = items
    return tensor


def _scores(
    bundle: Bundle, batch: NDArray[np.int64], count: int, items: NDArray[np.int64]
) -> NDArray[np.float32]:
    """float32 `[batch, items]`; NaN where an item is not among the `count` best."""
    found, scores = bundle.score(batch, count)
    column = np.full(bundle.manifest.item_count + 1, -1, dtype=np.int32)
    column[items] = np.arange(len(items))
    place = column[found]
    row, at = np.nonzero(place >= 0)
    table = np.full((len(batch), len(items)), np.nan, dtype=np.float32)
    table[row, place[row, at]] = scores[row, at]
    return table


def _explanation(
    item: str, history: Sequence[str], recencies: Sequence[int], made: LeaveOneOut, column: int
) -> Explanation:
    values = made.influence[:, column].tolist()
    score, base = _number(made.whole[column]), _number(made.base[column])
    if len(values) == 1:
        return Explanation(item, score, base, (), ONE_ITEM)
    # Where some are missing, those left may not be the strongest: better none than a wrong order.
    if np.isnan(values).any():
        return Explanation(item, score, base, (), NOT_A_CANDIDATE)
    total = sum(abs(value) for value in values)
    return Explanation(
        item,
        score,
        base,
        tuple(
            Influence(history[-recency], recency, value, abs(value) / total if total else 0.0)
            for recency, value in zip(recencies, values, strict=True)
        ),
        None,
    )


def _unexplained(item: str, note: str) -> Explanation:
    return Explanation(item, None, None, (), note)


def _number(value: np.float32) -> float | None:
    return None if np.isnan(value) else float(value)
