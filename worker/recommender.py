"""Lists for a batch of users of one surface: score, filter, and look deeper where too little is
left. No I/O: the model runs in this thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from worker.bundle import Bundle
from worker.cold_items import ColdIndex
from worker.events import Surface
from worker.history import History
from worker.ranking import Filter, not_shown, pick
from worker.rules import Rules
from worker.scorer import Candidates, Inputs, Run, model_inputs, score

#: Items and scores of one list, best first.
Ranked = tuple[list[str], list[float]]

#: Candidates beyond `top_k` that are asked for at first.
SPARE = 16
#: Share of users whose list should be full after the first run.
AT_ONCE = 0.98
#: How fast the number of candidates follows a falling need, per batch.
DECAY = 0.98
#: A run whose lists fell short is followed by one for this many times as many candidates.
DEEPER = 4


@dataclass(slots=True)
class Lists:
    """What came out for a batch, and how long it took."""

    #: By place in the batch; a user that the model cannot score is missing.
    ranked: dict[int, Ranked] = field(default_factory=dict)
    score_s: float = 0.0
    filter_s: float = 0.0


class Recommender:
    """Ranks the users of one surface. One batch at a time.

    How many candidates are asked for follows what is needed: choosing the best k of all scores
    takes a model longer than everything before it where k is the length of a history.
    """

    def __init__(self, surface: Surface, rules: Rules, *, top_k: int) -> None:
        self._surface = surface
        self._filter = Filter(rules, surface)
        self._top_k = top_k
        self._ask = float(top_k + SPARE)
        #: Which items rules allow, for the catalogue named; not the bundle itself, which would keep
        #: its memory after a swap.
        self._shown_of = ""
        self._shown: NDArray[np.bool_] | None = None

    def rank(
        self,
        bundle: Bundle,
        users: Sequence[str],
        histories: Sequence[History],
        cold: ColdIndex | None = None,
    ) -> Lists:
        """Ranked lists for `users` with `histories`.

        Raises:
            Exception: whatever the model raises.
        """
        catalogue = bundle.manifest.catalogue
        if self._shown_of != catalogue:
            self._shown_of, self._shown = catalogue, self._filter.shown(bundle.items)
        lists = Lists()
        began = time.perf_counter()
        inputs = model_inputs(histories, bundle)
        lists.filter_s += time.perf_counter() - began
        needed = []
        for whole in inputs.runs:
            run, ask = whole, int(self._ask + 7) // 8 * 8
            while len(run.rows):
                began = time.perf_counter()
                candidates, carry = score(bundle, run, ask, cold)
                scored = time.perf_counter()
                depth = self._take(bundle, run, inputs, candidates, users, histories, lists)
                if carry is not None:
                    for row, own in zip(run.rows.tolist(), carry, strict=True):
                        histories[row].carry = own.tobytes()
                lists.score_s += scored - began
                lists.filter_s += time.perf_counter() - scored
                needed.append(depth[depth > 0])
                if candidates.complete:
                    break
                # Rules, or what they have seen, left these users too little.
                run, ask = run.only(np.flatnonzero(depth == 0)), ask * DEEPER
        if needed:
            self._learn(np.concatenate(needed))
        return lists

    def popular(
        self, user: str, history: History, candidates: Iterable[tuple[str, float]]
    ) -> Ranked:
        """A list from candidates by popularity, best first."""
        return self._filter.top(
            candidates, exclude=not_shown(user, self._surface, history), count=self._top_k
        )

    def _take(
        self,
        bundle: Bundle,
        run: Run,
        inputs: Inputs,
        candidates: Candidates,
        users: Sequence[str],
        histories: Sequence[History],
        lists: Lists,
    ) -> NDArray[np.int64]:
        """Filter candidates into `lists`; returns how deep each full list reached, else 0."""
        rows, count = run.rows.tolist(), self._top_k
        if self._filter.capped or candidates.cold:
            depth = []
            for place, row in enumerate(rows):
                exclude = not_shown(users[row], self._surface, histories[row])
                made = self._filter.top(candidates.of(place), exclude=exclude, count=count)
                lists.ranked[row] = made
                depth.append(candidates.items.shape[1] if len(made[0]) == count else 0)
            return np.array(depth)
        picked = pick(
            candidates.items,
            candidates.scores,
            banned=self._banned(bundle, inputs.windows[run.rows], rows, users, histories),
            shown=self._shown,
            count=count,
        )
        names, start = bundle.items, 0
        for row, end in zip(rows, picked.ends, strict=True):
            items = [names[item - 1] for item in picked.items[start:end]]
            lists.ranked[row] = items, picked.scores[start:end]
            start = end
        return picked.depth

    def _banned(
        self,
        bundle: Bundle,
        windows: NDArray[np.int32],
        rows: Sequence[int],
        users: Sequence[str],
        histories: Sequence[History],
    ) -> NDArray[np.int32]:
        """Model indexes that each user is not shown, int32 `[rows, n]`; see `not_shown`."""
        friends = self._surface is Surface.FRIENDS
        beyond: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            history = histories[row]
            if history.hidden or history.followed or friends:
                names = [*history.hidden, *history.followed]
                if friends:
                    names.append(users[row])
                beyond[place] = [bundle.index.get(name, 0) for name in names]
        if not beyond:
            return windows
        further = np.zeros((len(rows), max(map(len, beyond.values()))), dtype=np.int32)
        for place, indexes in beyond.items():
            further[place, : len(indexes)] = indexes
        return np.concatenate([windows, further], axis=1)

    def _learn(self, needed: NDArray[np.int64]) -> None:
        if len(needed):
            deep = float(np.sort(needed)[int(AT_ONCE * (len(needed) - 1))])
            self._ask = max(self._ask * DECAY, deep * 1.25, float(self._top_k + SPARE // 2))
