"""The lists of a micro-batch's users on one surface: which version ranks whom, and the fallback
where none can. No I/O: models run in this thread.

A canary, or a shadow, ranks beside the stable version for the users of its trial, so that both
answer the same histories at the same moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple

from worker.arms import arm
from worker.bundle import Bundle
from worker.cold_items import ColdIndex, ColdItems
from worker.events import Surface
from worker.history import History, Shown
from worker.metrics import Metrics
from worker.models import Serving
from worker.quality import Coverage, drift, overlap
from worker.recommender import Lists, Ranked, Recommender
from worker.rules import Rules
from worker.sequences import MeanTally
from worker.version_series import FALLBACK_VERSION

log = logging.getLogger(__name__)


class Listing(NamedTuple):
    """What one user is served."""

    items: list[str]
    scores: list[float]
    version: str
    source: Literal["model", "fallback"]


@dataclass(slots=True)
class Compared:
    """Both versions of a trial on the same users of a micro-batch."""

    #: Whether the other version raised, or made less than half of the stable one's lists: a model
    #: that knows none of the users' items answers nobody.
    failed: bool
    seconds: float
    stable_s: float

    def with_(self, other: Compared) -> Compared:
        """This, and other users of the same micro-batch."""
        return Compared(
            self.failed or other.failed,
            self.seconds + other.seconds,
            self.stable_s + other.stable_s,
        )


@dataclass(slots=True)
class _Trial:
    """What a worker has seen of one trial; metrics only."""

    period: int
    stable_scores: MeanTally = field(default_factory=MeanTally)
    scores: MeanTally = field(default_factory=MeanTally)


class ListMaker:
    """Makes the lists of one surface. One batch at a time.

    Args:
        cold: items of the surface that a model may not know.
    """

    def __init__(
        self, surface: Surface, rules: Rules, *, top_k: int, cold: ColdItems, metrics: Metrics
    ) -> None:
        self._surface = surface
        self._rules = rules
        self._top_k = top_k
        self._cold = cold
        self._metrics = metrics
        self._fallback = Recommender(surface, rules, top_k=top_k)
        #: By reference of the bundle.
        self._recommenders: dict[str, Recommender] = {}
        self._coverage: dict[str, Coverage] = {}
        self._trial = _Trial(0)
        self._batches = 0

    def make(
        self,
        serving: Serving | None,
        users: Sequence[str],
        histories: Sequence[History],
        popular: Callable[[], list[tuple[str, float]]],
    ) -> tuple[list[Listing], Compared | None]:
        """A list for each user, noted in the history as served; and how a trial's versions did.

        Args:
            popular: candidates of the fallback; asked for only where they are needed.
        """
        made: dict[int, Listing] = {}
        beside: dict[int, Shown] = {}
        compared = None
        if serving is not None:
            made, beside, compared = self._by_models(serving, users, histories)
        listings = []
        candidates = popular() if len(made) < len(users) else []
        for at, (user, history) in enumerate(zip(users, histories, strict=True)):
            listing = made.get(at)
            if listing is None:
                items, scores = self._fallback.popular(user, history, candidates)
                listing = Listing(items, scores, FALLBACK_VERSION, "fallback")
            history.served = Shown(listing.version, tuple(listing.items))
            history.beside = beside.get(at)
            listings.append(listing)
        return listings, compared

    def _by_models(
        self, serving: Serving, users: Sequence[str], histories: Sequence[History]
    ) -> tuple[dict[int, Listing], dict[int, Shown], Compared | None]:
        """Lists by place, the other version's lists by place, and how both did."""
        self._forget_others(serving)
        stable, rival = serving.stable, serving.rival
        if rival is None:
            if self._trial.period:
                self._trial = _Trial(0)
                self._metrics.score_drift.remove(self._surface.value)
            lists = self._rank(stable, range(len(users)), users, histories)
            made = _listings(stable, lists.ranked)
            self._cover(serving, made)
            return made, {}, None
        arms = [arm(serving, user) for user in users]
        both = [at for at, side in enumerate(arms) if side != "others"]
        alone = [at for at, side in enumerate(arms) if side == "others"]
        made = {}
        if alone:
            lists = self._rank(stable, alone, users, histories)
            made = _listings(stable, lists.ranked)
        if not both:
            self._cover(serving, made)
            return made, {}, None
        # In turns, so that neither has the histories warm in the processor's cache each time.
        self._batches += 1
        if self._batches % 2:
            ours = self._rank(stable, both, users, histories)
            theirs = self._rank(rival, both, users, histories)
        else:
            theirs = self._rank(rival, both, users, histories)
            ours = self._rank(stable, both, users, histories)
        by_stable, by_rival = _listings(stable, ours.ranked), _listings(rival, theirs.ranked)
        # An empty list is none: a model of few items has nothing left for those who saw them.
        by_rival = {at: one for at, one in by_rival.items() if one.items}
        failed = len(by_rival) < sum(bool(one.items) for one in by_stable.values()) / 2
        # Where it ranked others, a user whom it has nothing for counts as one with an empty list.
        nothing = None if failed else Listing([], [], rival.manifest.reference, "model")
        beside = {}
        for at in both:
            mine, other = by_stable.get(at), by_rival.get(at, nothing)
            # A canary that fails its users harms nobody: the stable version steps in.
            if arms[at] == "canary" and at in by_rival:
                mine, other = other, mine
            if mine is not None:
                made[at] = mine
            if mine is not None and other is not None:
                beside[at] = Shown(other.version, tuple(other.items))
        self._cover(serving, made)
        self._compare(serving, by_stable, by_rival)
        return made, beside, Compared(failed, theirs.score_s, ours.score_s)

    def _rank(
        self,
        bundle: Bundle,
        places: Sequence[int],
        users: Sequence[str],
        histories: Sequence[History],
    ) -> Lists:
        """Lists by place in `users`, for those of `places` that the model can score; none where it
        failed."""
        reference = bundle.manifest.reference
        recommender = self._recommenders.get(reference)
        if recommender is None:
            recommender = Recommender(self._surface, self._rules, top_k=self._top_k)
            self._recommenders[reference] = recommender
        cold = self._cold_index(bundle)
        whole = len(places) == len(users)
        own_users = users if whole else [users[at] for at in places]
        own_histories = histories if whole else [histories[at] for at in places]
        try:
            lists = recommender.rank(bundle, own_users, own_histories, cold)
        except Exception:
            log.exception("inference_failed version=%s", reference)
            self._metrics.inference_errors.labels(self._surface.value, reference).inc()
            return Lists()
        self._metrics.stage_seconds.labels("score").observe(lists.score_s)
        self._metrics.stage_seconds.labels("filter").observe(lists.filter_s)
        self._metrics.score_seconds.labels(self._surface.value, reference).inc(lists.score_s)
        self._metrics.scored.labels(self._surface.value, reference).inc(len(lists.ranked))
        if cold is not None:
            self._metrics.cold_recommended.labels(self._surface.value).inc(
                sum(
                    item not in bundle.index for items, _ in lists.ranked.values() for item in items
                )
            )
        if not whole:
            lists.ranked = {places[at]: ranked for at, ranked in lists.ranked.items()}
        return lists

    def _cover(self, serving: Serving, made: dict[int, Listing]) -> None:
        """Export how much of each version's catalogue was served."""
        for bundle in serving.bundles.values():
            reference, index = bundle.manifest.reference, bundle.index
            lists = (one.items for one in made.values() if one.version == reference)
            # Each item once: users of a batch have most items in common.
            served = set(chain.from_iterable(lists))
            if not served:
                continue
            coverage = self._coverage.get(reference)
            if coverage is None:
                coverage = self._coverage[reference] = Coverage(len(bundle.items))
                self._metrics.coverage.labels(self._surface.value, reference).set_function(
                    partial(getattr, coverage, "share")
                )
            coverage.note(index.get(item, 0) for item in served)

    def _compare(
        self, serving: Serving, by_stable: dict[int, Listing], by_rival: dict[int, Listing]
    ) -> None:
        """Export how much both versions' lists have in common, and how far scores moved."""
        if self._trial.period != serving.period:
            self._trial = _Trial(serving.period)
        trial, surface = self._trial, self._surface.value
        for at, mine in by_stable.items():
            other = by_rival.get(at)
            if other is None:
                continue
            self._metrics.overlap.labels(surface).observe(overlap(mine.items, other.items))
            if mine.scores and other.scores:
                trial.stable_scores.add(mine.scores[0])
                trial.scores.add(other.scores[0])
        self._metrics.score_drift.labels(surface).set(drift(trial.stable_scores, trial.scores))

    def _cold_index(self, bundle: Bundle) -> ColdIndex | None:
        """Cold items with a vector of `bundle`; None where there are none."""
        cold = self._cold
        if bundle.text is None or not len(cold):
            return None
        texts = cold.without_vector(bundle)
        if texts:
            try:
                vectors = bundle.text.encode(list(texts.values()))
            except Exception:
                reference = bundle.manifest.reference
                log.exception("text_failed version=%s", reference)
                self._metrics.inference_errors.labels(self._surface.value, reference).inc()
                return None
            cold.add_vectors(bundle, list(texts), vectors)
        index = cold.index(bundle)
        self._metrics.cold_items.labels(self._surface.value).set(0 if index is None else len(index))
        return index

    def _forget_others(self, serving: Serving) -> None:
        """Let go of what was kept for versions that serve no more."""
        kept = {bundle.manifest.reference for bundle in serving.bundles.values()}
        gone = (self._recommenders.keys() | self._coverage.keys()) - kept
        if not gone:
            return
        self._cold.keep(serving.bundles.values())
        for reference in gone:
            self._recommenders.pop(reference, None)
            if self._coverage.pop(reference, None) is not None:
                self._metrics.coverage.remove(self._surface.value, reference)


def _listings(bundle: Bundle, ranked: dict[int, Ranked]) -> dict[int, Listing]:
    reference = bundle.manifest.reference
    return {
        at: Listing(items, scores, reference, "model") for at, (items, scores) in ranked.items()
    }
