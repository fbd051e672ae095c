"""How far a compressed model explains its scores as its fp32 reference does.

Two models may rank alike for different reasons. Here both explain the same items after the same
histories by leaving one history item out at a time (worker/explain.py), and the influences are
compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.dataset import padded
from worker.bundle import Bundle
from worker.explain import LeaveOneOut, leave_one_out

TOP = 3
#: Among fewer history items, the three strongest are nearly all: their overlap says nothing.
MIN_HISTORY = 5
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over histories with its bootstrap 95 % interval (percentiles)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two models' explanations.

    Each figure is a mean over histories of the mean over a history's explained items, since items
    of one history are not independent.
    """

    histories: int
    #: (History, item) pairs that were compared.
    explanations: int
    #: Histories left out: fewer than `MIN_HISTORY` items that both models read, or no item that
    #: both explain.
    skipped: int
    #: How often both name the same history item as the one that raised the score most, 0 to 1.
    top1: Interval
    #: The same for a model that names any history item by chance.
    top1_by_chance: float
    #: Jaccard overlap, 0 to 1, of the three history items that raised the score most.
    top3_overlap: Interval
    #: Spearman's rank correlation of the influences, -1 to 1.
    rank_correlation: Interval
    #: Mean absolute difference of influences, in standard deviations of the reference's influences
    #: over the history.
    relative_difference: Interval

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


def agreement(
    reference: Bundle,
    other: Bundle,
    histories: Sequence[NDArray[np.int64]],
    *,
    items_per_history: int = 3,
    seed: int = 0,
) -> Agreement:
    """Compare how `reference` and `other` explain the reference's best unseen items.

    Items are matched by id; each model reads the last of a history that it knows, up to its own
    `max_length`, and what only one of them reads is not compared.

    Args:
        histories: int64 `[length]` each, model indexes of `reference`, oldest first, not padded.
        items_per_history: how many of the reference's best items to explain.
        seed: of the bootstrap.

    Raises:
        ValueError: no history could be compared.
    """
    # Model index in `other` by model index in `reference`; 0 where `other` does not know the item.
    translation = np.array(
        [0, *(other.index.get(item, 0) for item in reference.items)], dtype=np.int64
    )
    figures: list[list[float]] = []
    chances: list[float] = []
    explained = 0
    for history in histories:
        compared = list(_compared(reference, other, translation, history, items_per_history))
        if compared:
            figures.append(np.mean([row for _, row in compared], axis=0).tolist())
            chances.append(1.0 / compared[0][0])
            explained += len(compared)
    if not figures:
        raise ValueError(
            f"no history has {MIN_HISTORY} items that both models read, and an item that both"
            " explain: give longer histories, in the reference's model indexes"
        )
    top1, top3, correlation, difference = _intervals(np.array(figures), seed)
    return Agreement(
        histories=len(figures),
        explanations=explained,
        skipped=len(histories) - len(figures),
        top1=top1,
        top1_by_chance=float(np.mean(chances)),
        top3_overlap=top3,
        rank_correlation=correlation,
        relative_difference=difference,
    )


def _compared(
    reference: Bundle,
    other: Bundle,
    translation: NDArray[np.int64],
    history: NDArray[np.int64],
    count: int,
) -> Iterator[tuple[int, list[float]]]:
    """For each explained item: how many history items were compared, and the four figures."""
    places = np.arange(len(history))[-reference.manifest.max_length :]
    other_places = np.flatnonzero(translation[history])[-other.manifest.max_length :]
    common = np.intersect1d(places, other_places)
    if len(common) < MIN_HISTORY:
        return
    items = _best_unseen(reference, history, translation, count)
    if not len(items):
        return
    ours = _influence(leave_one_out(reference, history[places], items), places, common)
    theirs = _influence(
        leave_one_out(other, translation[history[other_places]], translation[items]),
        other_places,
        common,
    )
    for one, two in zip(ours.T, theirs.T, strict=True):
        # An item without all its influences is not explained; neither is one that nothing moves.
        if np.isfinite(one).all() and np.isfinite(two).all() and one.std() > 0:
            yield len(common), _figures(one, two)


def _best_unseen(
    reference: Bundle, history: NDArray[np.int64], translation: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """int64 `[items]`: the reference's best that are not in the history and known to both."""
    found, _ = reference.score(
        padded([history], reference.manifest.max_length), reference.manifest.most
    )
    ranked = found[0]
    unseen: NDArray[np.int64] = ranked[~np.isin(ranked, history) & (translation[ranked] > 0)]
    return unseen[:count]


def _influence(
    made: LeaveOneOut, places: NDArray[np.int64], common: NDArray[np.int64]
) -> NDArray[np.float64]:
    """float64 `[common, items]`."""
    return made.influence[np.searchsorted(places, common)].astype(np.float64)


def _figures(one: NDArray[np.float64], two: NDArray[np.float64]) -> list[float]:
    """Top-1 agreement, top-3 overlap, rank correlation, relative difference of float64 `[n]`."""
    first, second = np.argsort(-one, kind="stable")[:TOP], np.argsort(-two, kind="stable")[:TOP]
    both = len(np.intersect1d(first, second))
    return [
        float(first[0] == second[0]),
        both / (2 * TOP - both),
        _rank_correlation(one, two),
        float(np.abs(two - one).mean() / one.std()),
    ]


def _rank_correlation(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    from scipy.stats import rankdata  # noqa: PLC0415 - takes a second to import

    ranks = np.array([rankdata(one), rankdata(two)])
    if (ranks.std(axis=1) == 0).any():
        return 0.0  # a model that nothing moves orders nothing
    return float(np.corrcoef(ranks)[0, 1])


def _intervals(figures: NDArray[np.float64], seed: int) -> list[Interval]:
    """Means of float64 `[histories, figures]`, with intervals from resampled histories."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(figures), (RESAMPLES, len(figures)))
    low, high = np.percentile(figures[drawn].mean(axis=1), [2.5, 97.5], axis=0)
    return [
        Interval(float(mean), float(low[at]), float(high[at]))
        for at, mean in enumerate(figures.mean(axis=0))
    ]
