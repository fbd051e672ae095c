"""What a recurrent bundle saves by keeping a carry of each user, and what losing it changes.

Other bundles read the whole history for each event; they are timed beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from models.dataset import Queries, padded, sample
from models.evaluate import AT, accuracy, bundle_ranked
from models.measure import Progress, candidates, timed
from worker.bundle import Bundle

BATCHES = (1, 64, 512)
#: Queries that `restart` asks: the whole of each history is read.
_QUERIES = 2000


@dataclass(frozen=True)
class Step:
    """Processor time of one event at one batch size, in microseconds; medians over rounds."""

    #: Reading the last `max_length` items.
    whole_us: float
    #: Reading one new item on top of a carry; None where the bundle has none.
    step_us: float | None


@dataclass(frozen=True)
class Restart:
    """Lists of a worker that has read every item of a user, and of one that lost the carry and
    read the last `max_length` items again."""

    kept_ndcg: float
    rebuilt_ndcg: float
    #: Share of the ten items that both show.
    overlap: float
    queries: int


def steps(
    bundles: Sequence[Bundle],
    histories: Sequence[Sequence[NDArray[np.int64]]],
    *,
    batches: Sequence[int] = BATCHES,
    rounds: int = 5,
    runs: int = 15,
    seconds: float = 5.0,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> list[dict[int, Step]]:
    """Time one event, by bundle and batch size; one thread, rounds in which all take turns.

    Args:
        histories: for each bundle, histories in its own numbering, those of the same users.
        runs: of one batch size, in each round.
        seconds: at most, for one bundle and batch size, over all rounds.
    """
    rng = np.random.default_rng(seed)
    users = {size: rng.integers(0, len(histories[0]), size) for size in batches}
    found: list[dict[int, list[Step]]] = [{size: [] for size in batches} for _ in bundles]
    for _ in range(rounds):
        for size in batches:
            for number in rng.permutation(len(bundles)):
                tensor = padded(
                    [histories[number][place] for place in users[size]],
                    bundles[number].manifest.max_length,
                )
                found[number][size].append(_step(bundles[number], tensor, runs, seconds / rounds))
        progress("steps")
    return [{size: _median(of[size]) for size in batches} for of in found]


def restart(bundle: Bundle, queries: Queries, item_ids: Sequence[str], *, seed: int = 0) -> Restart:
    """Compare a kept carry with a rebuilt one, on queries numbered as `item_ids` is."""
    asked = sample(queries, _QUERIES, seed)
    longest = max((len(history) for history in asked.histories), default=1)
    # States of every item of a history are held at once.
    kept = bundle_ranked(bundle, asked, item_ids, length=longest, batch=32)
    rebuilt = bundle_ranked(bundle, asked, item_ids)
    same = (kept.top[:, :, None] == rebuilt.top[:, None, :]).any(axis=2) & (kept.top > 0)
    return Restart(
        kept_ndcg=accuracy(kept.ranks).ndcg,
        rebuilt_ndcg=accuracy(rebuilt.ranks).ndcg,
        overlap=float(same.sum() / max(AT * len(asked), 1)),
        queries=len(asked),
    )


def _step(bundle: Bundle, tensor: NDArray[np.int64], runs: int, seconds: float) -> Step:
    k, batch = candidates(bundle), len(tensor)

    def micros(times: NDArray[np.float64]) -> float:
        return float(np.median(times[:, 1])) * 1e3 / batch

    whole = micros(timed(partial(bundle.score, k=k), [tensor], runs, seconds))
    if bundle.manifest.carry_width is None:
        return Step(whole, None)
    *_, carry = bundle.advance(tensor, bundle.fresh_carry(batch), k)
    step = timed(lambda new: bundle.advance(new, carry, k), [tensor[:, -1:]], runs, seconds)
    return Step(whole, micros(step))


def _median(found: Sequence[Step]) -> Step:
    each = [step.step_us for step in found if step.step_us is not None]
    return Step(
        float(np.median([step.whole_us for step in found])),
        float(np.median(each)) if each else None,
    )
