"""Which users a trial takes, and what an event of theirs counts for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.serving import POSTS, V1, V2, canary, opened, registry, shadow
from worker.arms import Arm, arm, judged_as
from worker.bundle import Bundle
from worker.history import History, Shown
from worker.models import Serving

USERS = [f"user-{number}" for number in range(20_000)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    root: Path = registry(tmp_path_factory.mktemp("registry")).root
    return opened(root, V1), opened(root, V2)


def sides(serving: Serving) -> dict[Arm, set[str]]:
    found: dict[Arm, set[str]] = {}
    for user in USERS:
        found.setdefault(arm(serving, user), set()).add(user)
    return found


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_a_canary_serves_its_share_and_as_many_users_are_compared(
    bundles: tuple[Bundle, Bundle], share: float
) -> None:
    found = sides(canary(*bundles, share=share))
    # Four standard deviations of a binomial count.
    margin = 4 * (len(USERS) * share * (1 - share)) ** 0.5
    for side in ("canary", "stable"):
        assert abs(len(found[side]) - len(USERS) * share) < margin
    assert "shadow" not in found


def test_workers_that_loaded_the_trial_apart_draw_the_same_users(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    root = registry(tmp_path).root
    elsewhere = canary(opened(root, V1), opened(root, V2))
    assert sides(canary(*bundles)) == sides(elsewhere)


def test_each_trial_draws_its_users_anew(bundles: tuple[Bundle, Bundle]) -> None:
    one, next_one = (sides(canary(*bundles, period=period))["canary"] for period in (7, 8))
    # By chance half of one half is in the other.
    assert abs(len(one & next_one) / len(USERS) - 0.25) < 0.02


def test_a_shadow_takes_its_share_and_nobody_else_has_a_side(
    bundles: tuple[Bundle, Bundle],
) -> None:
    found = sides(shadow(*bundles, share=0.3))
    assert set(found) == {"shadow", "others"}
    assert abs(len(found["shadow"]) / len(USERS) - 0.3) < 0.02


def test_without_a_trial_all_are_others(bundles: tuple[Bundle, Bundle]) -> None:
    # A share is left where the canary could not be loaded.
    assert set(sides(Serving(POSTS, bundles[0], share=0.5, period=7))) == {"others"}


def history(served: str | None, beside: str | None) -> History:
    made = History(5)
    made.served = None if served is None else Shown(served, ("a",))
    made.beside = None if beside is None else Shown(beside, ("b",))
    return made


STABLE, RIVAL = f"posts@{V1}", f"posts@{V2}"
LISTS = st.sampled_from([None, STABLE, RIVAL, "popularity", "posts@v0"])


@given(served=LISTS, beside=LISTS, user=st.sampled_from(USERS[:50]))
def test_an_event_of_a_trials_user_counts_only_with_both_versions_lists(
    bundles: tuple[Bundle, Bundle], served: str | None, beside: str | None, user: str
) -> None:
    for serving in (canary(*bundles, share=0.3), shadow(*bundles, share=0.3)):
        side = arm(serving, user)
        pair = (RIVAL, STABLE) if side == "canary" else (STABLE, RIVAL)
        fits = served == STABLE if side == "others" else (served, beside) == pair
        own = history(served, beside)
        assert judged_as(serving, user, own) == ((side, own.served, own.beside) if fits else None)


def test_where_the_canary_had_nothing_its_empty_list_is_judged(
    bundles: tuple[Bundle, Bundle],
) -> None:
    serving = canary(*bundles, share=0.3)
    for user in USERS[:50]:
        own = history(STABLE, RIVAL)
        own.beside = Shown(RIVAL, ())
        side = arm(serving, user)
        lists = (own.beside, own.served) if side == "canary" else (own.served, own.beside)
        assert judged_as(serving, user, own) == (side, *lists)
