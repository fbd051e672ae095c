"""Re-ranking queries from MovieLens 100K, with features that know only what came before.

A query is a rating of 4 or 5: its film is the one positive among candidates that the user has not
rated, drawn by popularity so far. The last feature is the score of the shipped SASRec, which was
trained on the first 80 % of events: it is fair for later queries, and flatters it for earlier ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.dataset import padded
from models.evaluate import bundle_score
from models.rankers.data import Rows
from worker.bundle import Bundle
from worker.local.ml100k import Ml100k

NAMES = (
    "popularity", "popularity_recently", "hours_since_rated", "hours_since_first", "item_mean",
    "user_mean", "user_ratings", "co_ratings_last", "co_ratings_last_10", "release_year", "sasrec",
)  # fmt: skip
POSITIVE = 4.0
_RECENT_EVENTS = 5000
_HISTORY = 10
_BATCH = 64


@dataclass(frozen=True)
class Asked:
    """How many queries of which part of the time line, and candidates beside the positive."""

    start: float
    end: float
    queries: int
    negatives: int


@dataclass
class _Past:
    """Counts over the events so far; items are 0-based."""

    count: NDArray[np.float64]
    recent: NDArray[np.float64]
    rating_sum: NDArray[np.float64]
    first: NDArray[np.float64]
    last: NDArray[np.float64]
    together: NDArray[np.float32]


def rating_queries(
    data: Ml100k, bundle: Bundle, parts: list[Asked], *, seed: int = 0
) -> list[Rows]:
    """Rows of each part: `queries * (negatives + 1)`, features in the order of `NAMES`, label 1
    for the positive."""
    rng = np.random.default_rng(seed)
    items = np.array([bundle.index[item] - 1 for item in data.items.tolist()])
    users = np.unique(data.users, return_inverse=True)[1]
    hours = data.timestamps / 3600.0
    years = np.array([_release_year(data.titles.get(item, "")) for item in bundle.items])
    asked = [_positions(data, users, part, rng) for part in parts]
    part_of = {at: number for number, places in enumerate(asked) for at in places.tolist()}

    size = len(bundle.items)
    count, recent, ratings, first, last = np.zeros((5, size))
    together = np.zeros((size, size), np.float32)
    past = _Past(count, recent, ratings, first, last, together)
    seen: dict[int, list[int]] = {}
    given: dict[int, float] = {}
    found: list[list[NDArray[np.float64]]] = [[] for _ in parts]
    histories: list[list[NDArray[np.int64]]] = [[] for _ in parts]
    candidates: list[list[NDArray[np.int64]]] = [[] for _ in parts]
    for at, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        history = seen.setdefault(user, [])
        part = part_of.get(at)
        if part is not None:
            chance = past.count.copy()
            chance[[*history, item]] = 0.0
            others = rng.choice(size, parts[part].negatives, replace=False, p=chance / chance.sum())
            pool = np.concatenate([[item], others])
            mean = given[user] / len(history)
            found[part].append(_features(past, pool, history, mean, hours[at], years))
            histories[part].append(np.array(history) + 1)
            candidates[part].append(pool)
        _learn(past, item, history[-_HISTORY:], float(data.ratings[at]), hours[at])
        if at >= _RECENT_EVENTS:
            past.recent[items[at - _RECENT_EVENTS]] -= 1
        history.append(item)
        given[user] = given.get(user, 0.0) + float(data.ratings[at])
    return [
        _rows(found[n], _sasrec(bundle, histories[n], candidates[n])) for n in range(len(parts))
    ]


def _positions(
    data: Ml100k, users: NDArray[np.int64], part: Asked, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Places of the ratings that are asked about, in time order."""
    total = len(users)
    known = np.ones(total, dtype=bool)
    known[np.unique(users, return_index=True)[1]] = False  # a first event has no history
    places = np.arange(total)
    inside = (places >= total * part.start) & (places < total * part.end)
    chosen = places[inside & known & (data.ratings >= POSITIVE)]
    return np.sort(rng.choice(chosen, min(part.queries, len(chosen)), replace=False))


def _features(
    past: _Past,
    pool: NDArray[np.int64],
    history: list[int],
    user_mean: float,
    hour: float,
    years: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 `[candidates, len(NAMES) - 1]`."""
    count = past.count[pool]
    known = count > 0
    scale = np.sqrt(count + 1.0)
    together = past.together[pool]
    return np.column_stack(
        [
            np.log1p(count),
            np.log1p(past.recent[pool]),
            np.log1p(np.where(known, hour - past.last[pool], 10_000.0)),
            np.log1p(np.where(known, hour - past.first[pool], 0.0)),
            (past.rating_sum[pool] + 3.5 * 5) / (count + 5),
            np.full(len(pool), user_mean),
            np.full(len(pool), np.log1p(len(history))),
            together[:, history[-1]] / scale,
            together[:, history[-_HISTORY:]].sum(axis=1) / scale,
            years[pool],
        ]
    )


def _learn(past: _Past, item: int, before: list[int], rating: float, hour: float) -> None:
    if past.count[item] == 0:
        past.first[item] = hour
    past.count[item] += 1
    past.recent[item] += 1
    past.rating_sum[item] += rating
    past.last[item] = hour
    past.together[item, before] += 1
    past.together[before, item] += 1


def _sasrec(
    bundle: Bundle, histories: list[NDArray[np.int64]], candidates: list[NDArray[np.int64]]
) -> NDArray[np.float32]:
    """float32 `[queries * candidates]`."""
    score = bundle_score(bundle)
    found = []
    for start in range(0, len(histories), _BATCH):
        tensor = padded(histories[start : start + _BATCH], bundle.manifest.max_length)
        pools = np.stack(candidates[start : start + _BATCH])
        found.append(np.take_along_axis(score(tensor), pools, axis=1).ravel())
    return np.concatenate(found)


def _rows(blocks: list[NDArray[np.float64]], sasrec: NDArray[np.float32]) -> Rows:
    features = np.column_stack([np.concatenate(blocks), sasrec]).astype(np.float32)
    size = len(blocks[0])
    labels = np.zeros(len(features))
    labels[::size] = 1.0
    return Rows(features, labels, np.repeat(np.arange(len(blocks)), size))


def _release_year(title: str) -> float:
    found = re.search(r"\((\d{4})\)\s*$", title)
    return float(found.group(1)) if found else 1995.0
