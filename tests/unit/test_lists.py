"""Which version's list a user is served in a trial, whatever becomes of the other one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.conftest import ITEMS, tiny_bundle, tiny_model
from tests.unit.serving import (
    POSTS,
    STRANGE,
    V1,
    V2,
    canary,
    event,
    opened,
    samples,
    shadow,
    total,
)
from worker.arms import arm
from worker.bundle import Bundle, open_bundle
from worker.cold_items import ColdItems
from worker.events import EventType
from worker.history import History, Shown
from worker.lists import Compared, Listing, ListMaker
from worker.metrics import Metrics
from worker.models import Serving
from worker.rules import Rules

USERS = [f"u{number}" for number in range(40)]
STABLE, RIVAL = f"posts@{V1}", f"posts@{V2}"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def maker(metrics: Metrics) -> ListMaker:
    cold = ColdItems(max_items=0, ttl_s=1.0)
    return ListMaker(POSTS, Rules(), top_k=5, cold=cold, metrics=metrics)


def histories(users: Sequence[str] = USERS) -> list[History]:
    """Each user has seen another item."""
    made = []
    for at, user in enumerate(users):
        history = History(8)
        history.apply(event(user, ITEMS[at % len(ITEMS)], EventType.VIEW))
        made.append(history)
    return made


def make(
    maker: ListMaker, serving: Serving | None, own: list[History] | None = None
) -> tuple[list[Listing], list[History], Compared | None]:
    own = histories() if own is None else own
    listings, compared = maker.make(serving, USERS, own, lambda: [("hot", 1.0)])
    return listings, own, compared


def alone(maker: ListMaker, bundle: Bundle) -> list[list[str]]:
    """The items that a version serves all users without a trial."""
    return [one.items for one in make(maker, Serving(POSTS, bundle))[0]]


class Failing:
    """A session that raises."""

    def run(self, *_: object) -> None:
        raise RuntimeError("the model is broken")


def failing(bundle: Bundle) -> Bundle:
    return replace(bundle, session=cast(Any, Failing()))


def test_canary_users_are_served_the_canarys_lists_and_all_others_the_stable_ones(
    maker: ListMaker, stable: Bundle, rival: Bundle
) -> None:
    by_stable, by_rival = alone(maker, stable), alone(maker, rival)
    serving = canary(stable, rival, share=0.3)
    # In turns one or the other version goes first.
    for _ in range(2):
        listings, _, _ = make(maker, serving)
        for at, user in enumerate(USERS):
            of_canary = arm(serving, user) == "canary"
            assert listings[at].items == (by_rival if of_canary else by_stable)[at]
            assert listings[at].version == (RIVAL if of_canary else STABLE)
            assert listings[at].source == "model"


def test_both_versions_rank_the_users_of_both_groups_and_no_others(
    maker: ListMaker, stable: Bundle, rival: Bundle, metrics: Metrics
) -> None:
    serving = canary(stable, rival, share=0.3)
    by_version = {STABLE: alone(maker, stable), RIVAL: alone(maker, rival)}
    before = total(metrics, "streamrec_scored_lists_total", model_version=RIVAL)
    _, own, _ = make(maker, serving)
    sides = [arm(serving, user) for user in USERS]
    assert {"canary", "stable", "others"} == set(sides)
    for at, (side, history) in enumerate(zip(sides, own, strict=True)):
        other = {"canary": STABLE, "stable": RIVAL, "others": None}[side]
        wanted = None if other is None else Shown(other, tuple(by_version[other][at]))
        assert history.beside == wanted
    compared = sum(side != "others" for side in sides)
    after = total(metrics, "streamrec_scored_lists_total", model_version=RIVAL)
    assert after - before == compared


def test_a_shadow_is_asked_and_served_to_nobody(
    maker: ListMaker, stable: Bundle, rival: Bundle, metrics: Metrics
) -> None:
    by_stable = alone(maker, stable)
    listings, own, compared = make(maker, shadow(stable, rival))
    assert [one.items for one in listings] == by_stable
    assert {one.version for one in listings} == {STABLE}
    assert {history.beside.version for history in own if history.beside} == {RIVAL}
    assert all(history.beside is not None for history in own)
    assert compared is not None and not compared.failed
    # Only what was served covers the catalogue.
    assert samples(metrics, "streamrec_catalogue_coverage_ratio", model_version=RIVAL) == {}


def test_a_canary_that_raises_harms_nobody_and_is_counted(
    maker: ListMaker, stable: Bundle, rival: Bundle, metrics: Metrics
) -> None:
    by_stable = alone(maker, stable)
    for number in (1, 2):
        listings, own, compared = make(maker, canary(stable, failing(rival)))
        assert [one.items for one in listings] == by_stable
        assert {(one.version, one.source) for one in listings} == {(STABLE, "model")}
        assert all(history.beside is None for history in own)
        assert compared is not None and compared.failed
        errors = total(metrics, "streamrec_inference_errors_total", model_version=RIVAL)
        assert errors == number


def test_a_canary_that_knows_no_item_harms_nobody_and_is_counted(
    maker: ListMaker, stable: Bundle, root: Path
) -> None:
    by_stable = alone(maker, stable)
    listings, _, compared = make(maker, canary(stable, opened(root, STRANGE)))
    assert [one.items for one in listings] == by_stable
    assert compared is not None and compared.failed


def test_a_canary_of_few_items_harms_nobody_who_has_seen_them(
    maker: ListMaker, stable: Bundle, tmp_path: Path
) -> None:
    few = ITEMS[:6]
    tiny = open_bundle(
        tiny_bundle(tmp_path / "posts" / V2, model=tiny_model(items=len(few)), items=few)
    )
    own = histories()
    for history in own:
        for item in few:
            history.apply(event("u", item, EventType.VIEW))
    listings, _, compared = make(maker, canary(stable, tiny), own)
    assert all(one.items and one.version == STABLE for one in listings)
    assert all(history.beside is None for history in own)
    assert compared is not None and compared.failed


def test_a_user_for_whom_the_canary_has_nothing_counts_as_one_with_an_empty_list(
    maker: ListMaker, stable: Bundle, tmp_path: Path
) -> None:
    few = ITEMS[:6]
    tiny = open_bundle(
        tiny_bundle(tmp_path / "posts" / V2, model=tiny_model(items=len(few)), items=few)
    )
    own = [History(8) for _ in USERS]
    for at, one in enumerate(own):
        one.apply(event("u", few[at % len(few)], EventType.VIEW))
    for item in few:
        own[0].apply(event("u", item, EventType.VIEW))
    listings, _, compared = make(maker, canary(stable, tiny, share=0.5), own)
    assert listings[0].items and listings[0].version == STABLE
    assert own[0].beside == Shown(RIVAL, ())
    assert all(history.beside is not None and history.beside.items for history in own[1:])
    assert compared is not None and not compared.failed


def test_only_what_was_served_covers_a_catalogue(
    maker: ListMaker, stable: Bundle, rival: Bundle, metrics: Metrics
) -> None:
    listings, _, _ = make(maker, canary(stable, rival, share=0.3))
    coverage = samples(metrics, "streamrec_catalogue_coverage_ratio")
    for reference in (STABLE, RIVAL):
        served = {item for one in listings if one.version == reference for item in one.items}
        assert coverage["posts", reference] == len(served) / len(ITEMS) < 1.0


def test_a_canary_steps_in_where_the_stable_version_fails_its_own_users(
    maker: ListMaker, stable: Bundle, rival: Bundle
) -> None:
    serving = canary(failing(stable), rival)
    listings, own, compared = make(maker, serving)
    for user, listing, history in zip(USERS, listings, own, strict=True):
        of_canary = arm(serving, user) == "canary"
        assert listing.source == ("model" if of_canary else "fallback")
        assert history.beside is None
    # It is not the canary that failed.
    assert compared is not None and not compared.failed


def test_without_any_model_all_get_what_is_popular(maker: ListMaker) -> None:
    listings, own, compared = make(maker, None)
    assert {(tuple(one.items), one.source) for one in listings} == {(("hot",), "fallback")}
    assert {history.served for history in own} == {Shown("popularity", ("hot",))}
    assert compared is None


def test_what_was_served_is_noted_in_the_history(
    maker: ListMaker, stable: Bundle, rival: Bundle
) -> None:
    listings, own, _ = make(maker, canary(stable, rival))
    assert [history.served for history in own] == [
        Shown(one.version, tuple(one.items)) for one in listings
    ]


def test_the_other_versions_list_of_an_ended_trial_is_forgotten(
    maker: ListMaker, stable: Bundle, rival: Bundle, metrics: Metrics
) -> None:
    _, own, _ = make(maker, canary(stable, rival))
    assert samples(metrics, "streamrec_trial_score_drift")
    make(maker, Serving(POSTS, stable), own)
    assert all(history.beside is None for history in own)
    assert samples(metrics, "streamrec_trial_score_drift") == {}
    coverage = samples(metrics, "streamrec_catalogue_coverage_ratio")
    assert coverage.keys() == {("posts", STABLE)}


def test_nothing_keeps_a_bundle_that_serves_no_more(
    maker: ListMaker, stable: Bundle, root: Path
) -> None:
    gone = opened(root, V2)
    session = weakref.ref(gone.session)
    _, own, _ = make(maker, canary(stable, gone))
    make(maker, Serving(POSTS, stable), own)
    del gone
    gc.collect()
    assert session() is None
