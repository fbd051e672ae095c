"""What text vectors are worth: cold items ranked among all, and what that costs warm ones.

A cold item is one that the model was not trained on. Two questions pull apart: how often a cold
target is found, and how many warm targets cold items push out of the list. `choose_gain` settles
them by a budget.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.dataset import Interactions, Queries, index_by, next_events, padded, sample
from models.evaluate import AT, Accuracy, accuracy
from models.text import Encoder, Fit, TextError, TextRecipe, fit, item_vectors
from worker.bundle import Bundle

#: Factors tried for the distance of a text's vector from the mean item.
GAINS = (0.5, 0.7, 0.85, *np.round(np.arange(1.0, 3.05, 0.1), 2).tolist(), 3.5, 4.0, 5.0)
RESAMPLES = 1000


@dataclass(frozen=True)
class Catalogue:
    """The bundle's items and those that only the events know.

    `item_ids[i - 1]` is the id of index i, the bundle's items first; `warm`: bool `[items]`,
    whether the model was trained on it; `counts`: int64 `[items]`, events in training.
    """

    data: Interactions
    item_ids: tuple[str, ...]
    warm: NDArray[np.bool_]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Queries with the users' states float32 `[queries, width]`.

    Histories hold cold items too: they are seen, and the model knows nothing of them.
    """

    states: NDArray[np.float32]
    queries: Queries


@dataclass(frozen=True)
class Row:
    """One way to give cold items vectors; `*_interval` are 95 % bootstrap intervals over users."""

    name: str
    #: Over queries whose target is cold, all items ranked.
    cold: Accuracy
    cold_ndcg_interval: tuple[float, float]
    cold_hit_rate_interval: tuple[float, float]
    #: The same queries, cold items ranked alone: what the text tells, whatever the calibration.
    among_cold: Accuracy
    #: Over queries whose target is warm, all items ranked.
    warm: Accuracy
    #: Relative NDCG@10 lost on warm targets by letting cold items in.
    warm_loss: float
    warm_loss_interval: tuple[float, float]


def catalogue(
    bundle: Bundle,
    users: NDArray[np.str_],
    items: NDArray[np.str_],
    texts: Mapping[str, str],
    train_share: float,
) -> Catalogue:
    """Number the items of events in time order; those that nothing is known of are left out.

    Args:
        train_share: share of the events that the model was trained on. An item without an event
            among them is cold, also where the bundle has a row for it: that row says nothing.
    """
    names = items.tolist()
    cold = sorted((set(names) & texts.keys()) - bundle.index.keys())
    item_ids = (*bundle.items, *cold)
    data = index_by(users.tolist(), names, item_ids)
    counts = np.bincount(data.until(train_share).items, minlength=len(item_ids) + 1)[1:]
    known = np.arange(len(item_ids)) < len(bundle.items)
    return Catalogue(data, item_ids, known & (counts > 0), counts)


def ask(bundle: Bundle, catalogue: Catalogue, start: float, end: float, limit: int) -> Asked:
    """At most `limit` of the events between two shares of the time line, as queries.

    Raises:
        TextError: there is none whose user has a history that the model knows.
    """
    queries = sample(next_events(catalogue.data, start, end), limit)
    known = [history[catalogue.warm[history - 1]] for history in queries.histories]
    kept = [at for at, history in enumerate(known) if len(history)]
    if not kept:
        raise TextError(
            f"no event between {start:.0%} and {end:.0%} of time has a history that the model"
            " knows: give the events that it was trained on, and later ones"
        )
    tensor = padded([known[at] for at in kept], bundle.manifest.max_length)
    states = [
        bundle.score_with_states(tensor[at : at + 256], 1)[2] for at in range(0, len(tensor), 256)
    ]
    users = queries.users[kept] if queries.users is not None else None
    return Asked(
        np.concatenate(states),
        Queries([queries.histories[at] for at in kept], queries.targets[kept], users),
    )


def fit_to_bundle(
    bundle: Bundle,
    catalogue: Catalogue,
    texts: Mapping[str, str],
    asked: Asked,
    recipe: TextRecipe,
) -> tuple[Fit, NDArray[np.float32], NDArray[np.bool_]]:
    """Fit an encoder to the warm items that have a text.

    Returns:
        The fit, the bundle's vectors float32 `[items of the catalogue, width]` (0 for items that
        it lacks), and bool `[items of the catalogue]`, which items the fit was made on, in order.
    """
    histories = [h[catalogue.warm[h - 1]] for h in asked.queries.histories]
    vectors = np.zeros((len(catalogue.item_ids), asked.states.shape[1]), dtype=np.float32)
    vectors[: len(bundle.items)] = item_vectors(
        bundle, padded(histories, bundle.manifest.max_length)
    )
    used = catalogue.warm & np.array([item in texts for item in catalogue.item_ids])
    places = np.flatnonzero(used)
    found = fit(
        [texts[catalogue.item_ids[at]] for at in places],
        vectors[places],
        catalogue.counts[places],
        recipe,
    )
    return found, vectors, used


def ranks(
    asked: Asked, vectors: NDArray[np.float32], candidates: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Rank int64 `[queries]` of each target among unseen `candidates`; ties count against it.

    Args:
        vectors: float32 `[items, width]`.
        candidates: bool `[items]`; a target outside is not found.
    """
    histories, targets = asked.queries.histories, asked.queries.targets - 1
    found = np.empty(len(targets), dtype=np.int64)
    for start in range(0, len(targets), 256):
        part = slice(start, start + 256)
        scores = asked.states[part] @ vectors.T
        scores[:, ~candidates] = -np.inf
        rows, own = np.arange(len(scores)), targets[part]
        wanted = scores[rows, own].copy()
        seen = np.repeat(rows, [len(history) for history in histories[part]])
        scores[seen, np.concatenate(histories[part]) - 1] = -np.inf
        scores[rows, own] = -np.inf
        before = (scores >= wanted[:, None]).sum(axis=1)
        found[part] = np.where(np.isneginf(wanted), scores.shape[1], before)
    return found


def choose_gain(
    asked: Asked,
    vectors: NDArray[np.float32],
    used: NDArray[np.bool_],
    found: Fit,
    *,
    max_warm_loss: float,
) -> float:
    """The largest gain that costs warm targets at most `max_warm_loss` of their NDCG@10.

    Each query meets one fold's items as if they were cold: with their held-out vectors. Vectors
    that a regression predicts are shorter than real ones, so with a gain of 1 cold items hardly
    ever come up; with a large one they fill the lists.
    """
    fold = np.full(len(vectors), -1)
    fold[used] = found.fold
    base = found.encoder.base
    cases = []
    for number in np.unique(found.fold):
        pretended = fold == number
        mine = np.arange(len(asked.states)) % (found.fold.max() + 1) == number
        mine &= used[asked.queries.targets - 1] & ~pretended[asked.queries.targets - 1]
        part = _only(asked, mine)
        cases.append((part, pretended, ranks(part, vectors, used & ~pretended)))
    without = accuracy(np.concatenate([before for _, _, before in cases])).ndcg

    def affordable(gain: float) -> bool:
        after = []
        for part, pretended, _ in cases:
            table = vectors.copy()
            table[pretended] = base + gain * (found.held_out[pretended[used]] - base)
            after.append(ranks(part, table, used))
        return accuracy(np.concatenate(after)).ndcg >= (1.0 - max_warm_loss) * without

    # The loss grows with the gain: bisect for the first that is too dear.
    first_dear = bisect_left(GAINS, True, key=lambda gain: not affordable(gain))
    return float(GAINS[max(0, first_dear - 1)])


def compare(
    asked: Asked,
    catalogue: Catalogue,
    vectors: NDArray[np.float32],
    ways: Mapping[str, NDArray[np.float32]],
    *,
    seed: int = 0,
) -> list[Row]:
    """How well each way of giving cold items vectors finds them.

    Args:
        ways: vectors float32 `[cold items, width]` by name, in catalogue order.
    """
    is_cold = ~catalogue.warm[asked.queries.targets - 1]
    warm_part, cold_part = _only(asked, ~is_cold), _only(asked, is_cold)
    before = _gains(ranks(warm_part, vectors, catalogue.warm))
    everything = np.ones(len(vectors), dtype=bool)
    rows = []
    for name, cold_vectors in ways.items():
        table = vectors.copy()
        table[~catalogue.warm] = cold_vectors
        of_cold, of_warm = (ranks(part, table, everything) for part in (cold_part, warm_part))
        after = _gains(of_warm)
        rows.append(
            Row(
                name,
                cold=accuracy(of_cold),
                cold_ndcg_interval=_interval(cold_part, _gains(of_cold), None, seed),
                cold_hit_rate_interval=_interval(
                    cold_part, (of_cold < AT).astype(np.float64), None, seed
                ),
                among_cold=accuracy(ranks(cold_part, table, ~catalogue.warm)),
                warm=accuracy(of_warm),
                warm_loss=1.0 - float(after.sum() / max(before.sum(), 1e-12)),
                warm_loss_interval=_interval(warm_part, before - after, before, seed),
            )
        )
    return rows


def ways_to_compare(
    encoder: Encoder,
    int8: NDArray[np.float32],
    cold_texts: Sequence[str],
    known: NDArray[np.float32],
    *,
    seed: int = 0,
) -> dict[str, NDArray[np.float32]]:
    """The encoder beside what needs no text; each float32 `[cold, width]`.

    Args:
        int8: what the exported encoder gives for `cold_texts`, float32 `[cold, width]`.
        known: vectors of warm items, float32 `[warm, width]`; random ones are drawn like them.
    """
    shape = int8.shape
    rng = np.random.default_rng(seed)
    random = known.mean(axis=0) + known.std(axis=0) * rng.normal(size=shape)
    return {
        "random vector": random.astype(np.float32),
        "mean item": np.tile(encoder.base, (len(int8), 1)),
        "text, gain 1": encoder.with_gain(1.0).encode(cold_texts),
        "text, fp32": encoder.encode(cold_texts),
        "text, int8": int8,
    }


def _only(asked: Asked, kept: NDArray[np.bool_]) -> Asked:
    places = np.flatnonzero(kept).tolist()
    queries = asked.queries
    return Asked(
        asked.states[places],
        Queries(
            [queries.histories[at] for at in places],
            queries.targets[places],
            queries.users[places] if queries.users is not None else None,
        ),
    )


def _gains(found: NDArray[np.int64]) -> NDArray[np.float64]:
    """NDCG@10 of each query."""
    return np.where(found < AT, 1.0 / np.log2(found + 2.0), 0.0)


def _interval(
    asked: Asked,
    values: NDArray[np.float64],
    relative_to: NDArray[np.float64] | None,
    seed: int,
) -> tuple[float, float]:
    """95 % interval of `sum(values) / sum(relative_to)`, or of the mean, over resampled users."""
    if not len(values):
        return 0.0, 0.0
    users = asked.queries.users if asked.queries.users is not None else np.arange(len(values))
    _, place = np.unique(users, return_inverse=True)
    below = np.ones(len(values)) if relative_to is None else relative_to
    sums = np.stack([np.bincount(place, weights=part) for part in (values, below)])
    count = sums.shape[1]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    upper, lower = (drawn @ sums.T).T
    low, high = np.percentile(upper / np.maximum(lower, 1e-12), [2.5, 97.5])
    return float(low), float(high)
