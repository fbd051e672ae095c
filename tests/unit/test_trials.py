"""What is counted of the lists that users were served: each event once, for one trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.conftest import ITEMS
from tests.unit.serving import (
    POSTS,
    STRANGE,
    V1,
    V2,
    WritesAtOnce,
    canary,
    event,
    opened,
    shadow,
    total,
)
from worker.arms import Arm, Judged, arm
from worker.bundle import Bundle
from worker.cache import PartitionKey, Refused, UserKey
from worker.events import EventType, Records
from worker.history import History, Shown
from worker.lists import Compared
from worker.metrics import Metrics
from worker.models import Serving
from worker.processor import Processor
from worker.quality import POSITIVE_TYPES, Tally, UserRecord
from worker.rules import Rules
from worker.settings import load_settings
from worker.trials import PartitionTally, Trials, decode_tally, merged

PLACE = PartitionKey(POSTS, "events", 0)
PERIOD = 7
SIDES: tuple[Arm, ...] = ("canary", "stable", "others", "shadow")
USERS = [f"u{number}" for number in range(24)]


class MemoryRedis(WritesAtOnce):
    """What `Cache` keeps, in dicts."""

    def __init__(self) -> None:
        self.histories: dict[UserKey, bytes] = {}
        self.recommendations: dict[UserKey, bytes] = {}
        self.tallies: dict[PartitionKey, bytes] = {}

    def read_users(self, keys: list[UserKey]) -> list[tuple[bytes | None, bytes | None]]:
        return [(self.histories.get(key), self.recommendations.get(key)) for key in keys]

    def read_popularity(self, key: object, into: object) -> None:
        return None

    def read_tallies(self, keys: list[PartitionKey]) -> list[bytes | None]:
        return [self.tallies.get(key) for key in keys]

    def write_batch(  # type: ignore[override]
        self,
        *,
        histories: dict[UserKey, bytes],
        recommendations: dict[UserKey, bytes],
        tallies: dict[PartitionKey, bytes],
        **_: Any,
    ) -> Refused:
        self.histories |= histories
        self.recommendations |= recommendations
        self.tallies |= tallies
        return Refused()

    def tally(self, period: int = PERIOD) -> PartitionTally:
        return decode_tally(self.tallies.get(PLACE), period)


class Worker:
    """A processor on a Redis in memory, with the trial that it is told."""

    def __init__(self, redis: MemoryRedis, serving: Serving | None, first: int = 0) -> None:
        self.serving: Callable[[], Serving | None] = lambda: serving
        self.metrics = Metrics()
        self._next = first
        self._processor = Processor(
            load_settings(require_user_key=False, cold_items_max=0, top_k=5, history_length=8),
            cache=cast(Any, redis),
            models=cast(
                Any,
                SimpleNamespace(
                    serving=lambda surface: self.serving() if surface is POSTS else None
                ),
            ),
            rules=Rules(),
            metrics=self.metrics,
        )

    def send(self, kind: EventType, items: dict[str, str]) -> dict[str, list[str]]:
        """One micro-batch with an event of each user; returns the lists that they then have."""
        self._next += len(items)
        return self.repeat(kind, items, self._next - len(items))

    def repeat(self, kind: EventType, items: dict[str, str], first: int) -> dict[str, list[str]]:
        """The same at offsets from `first` on."""
        offsets = list(range(first, first + len(items)))
        values = [
            json.dumps(
                {
                    "user_id": user, "item_id": item, "event_type": kind.value,
                    "surface": "posts", "timestamp": 1_764_000_000_000 + offset,
                }
            ).encode()
            for (user, item), offset in zip(items.items(), offsets, strict=True)
        ]  # fmt: skip
        made = self._processor.process(
            [
                Records(
                    "events", 0, offsets, [user.encode() for user in items], values,
                    [1_764_000_000_000] * len(values),
                )
            ]
        )  # fmt: skip
        self.versions = {lists.user_id: lists.model_version for lists, _ in made.lists}
        return {lists.user_id: lists.items for lists, _ in made.lists}

    def view(self, item: str = ITEMS[0]) -> dict[str, list[str]]:
        return self.send(EventType.VIEW, dict.fromkeys(USERS, item))

    def rebalance(self) -> None:
        self._processor.forget()


@pytest.fixture
def redis() -> MemoryRedis:
    return MemoryRedis()


@pytest.fixture
def worker(redis: MemoryRedis, stable: Bundle, rival: Bundle) -> Worker:
    return Worker(redis, canary(stable, rival, share=0.3))


def counts(tally: PartitionTally) -> dict[Arm, tuple[int, int, int]]:
    """Users, events and hits by side."""
    sides: dict[Arm, Tally] = {
        "canary": tally.canary, "stable": tally.stable, "others": tally.others,
        "shadow": tally.shadow,
    }  # fmt: skip
    return {name: (one.users, one.events, one.hits) for name, one in sides.items()}


def firsts(lists: dict[str, list[str]]) -> dict[str, str]:
    """What stands first on each user's list."""
    return {user: items[0] for user, items in lists.items()}


def test_a_liked_item_counts_for_the_side_of_its_user(
    worker: Worker, redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    lists = worker.view()
    assert counts(redis.tally()) == dict.fromkeys(SIDES, (0, 0, 0))
    worker.send(EventType.LIKE, firsts(lists))
    serving = canary(stable, rival, share=0.3)
    sides = [arm(serving, user) for user in USERS]
    wanted = {side: (sides.count(side),) * 3 for side in SIDES}
    assert counts(redis.tally()) == wanted
    assert all(wanted[side][0] > 2 for side in ("canary", "stable", "others"))
    tally = redis.tally()
    # In a trial each event is looked up in both lists, outside in the one that there is.
    assert (tally.canary.pairs, tally.others.pairs) == (tally.canary.events, 0)
    assert tally.canary.gain == tally.canary.events
    assert tally.scorings == 2


def test_a_repeated_record_is_counted_once_even_by_the_next_worker(
    worker: Worker, redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    liked = firsts(worker.view())
    worker.send(EventType.LIKE, liked)
    once = counts(redis.tally())
    worker.repeat(EventType.LIKE, liked, len(USERS))
    assert counts(redis.tally()) == once
    worker.rebalance()
    worker.repeat(EventType.LIKE, liked, len(USERS))
    Worker(redis, canary(stable, rival, share=0.3)).repeat(EventType.LIKE, liked, len(USERS))
    assert counts(redis.tally()) == once


def test_a_repeat_is_known_though_the_item_has_left_the_history(
    worker: Worker, redis: MemoryRedis
) -> None:
    liked = firsts(worker.view())
    worker.send(EventType.LIKE, liked)
    once = counts(redis.tally())
    for item in [one for one in ITEMS if one not in liked.values()][:8]:
        worker.view(item)
    worker.repeat(EventType.LIKE, liked, len(USERS))
    assert counts(redis.tally()) == once


def test_a_tally_is_written_when_something_was_counted_and_else_not(
    redis: MemoryRedis, stable: Bundle
) -> None:
    worker = Worker(redis, Serving(POSTS, stable, period=PERIOD))
    worker.send(EventType.LIKE, firsts(worker.view()))
    assert redis.tally().others.events == len(USERS)
    redis.tallies.clear()
    worker.view(ITEMS[9])
    assert redis.tallies == {}


@pytest.mark.parametrize("kind", sorted(set(EventType) - POSITIVE_TYPES))
def test_what_says_nothing_good_of_an_item_is_not_counted(
    worker: Worker, redis: MemoryRedis, kind: EventType
) -> None:
    worker.send(kind, firsts(worker.view()))
    assert redis.tally().evidence().events == redis.tally().others.events == 0


@pytest.mark.parametrize("kind", sorted(POSITIVE_TYPES))
def test_each_sign_of_interest_is_counted(
    worker: Worker, redis: MemoryRedis, kind: EventType
) -> None:
    worker.send(kind, firsts(worker.view()))
    tally = redis.tally()
    assert tally.evidence().events + tally.others.events == len(USERS)


@pytest.mark.parametrize("met", [EventType.VIEW, EventType.HIDE])
def test_only_the_first_meeting_of_an_item_is_counted(
    worker: Worker, redis: MemoryRedis, met: EventType
) -> None:
    worker.view()
    worker.send(met, dict.fromkeys(USERS, ITEMS[1]))
    # No list could have held it.
    worker.send(EventType.LIKE, dict.fromkeys(USERS, ITEMS[1]))
    tally = redis.tally()
    assert tally.evidence().events == tally.others.events == 0


def test_whom_a_user_follows_is_not_met_again_though_the_history_forgot_them() -> None:
    history = History(2)
    history.served = Shown("friends@v1", ("zoe",))
    history.followed = {"bob": None}
    trials = Trials(lambda place: None, Metrics())
    assert not trials.wants(event("ann", "bob", EventType.FOLLOW), history)
    assert trials.wants(event("ann", "zoe", EventType.FOLLOW), history)


def test_what_was_served_before_the_trial_is_not_counted_in_it(
    redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    worker = Worker(redis, Serving(POSTS, stable, period=-1))
    liked = firsts(worker.view())
    serving = canary(stable, rival, share=0.3)
    worker.serving = lambda: serving
    worker.send(EventType.LIKE, liked)
    # Those outside the trial have had the stable version's lists all along.
    sides = [arm(serving, user) for user in USERS]
    assert counts(redis.tally()) == {
        "canary": (0, 0, 0), "stable": (0, 0, 0), "shadow": (0, 0, 0),
        "others": (sides.count("others"),) * 3,
    }  # fmt: skip


def test_after_a_restart_the_other_versions_list_is_unknown_and_not_guessed(
    worker: Worker, redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    liked = firsts(worker.view())
    serving = canary(stable, rival, share=0.3)
    fresh = Worker(redis, serving, first=len(USERS))
    fresh.send(EventType.LIKE, liked)
    tally = redis.tally()
    assert tally.evidence().events == 0
    assert tally.others.events == sum(arm(serving, user) == "others" for user in USERS)


def test_a_new_trial_starts_from_nothing(
    worker: Worker, redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    worker.send(EventType.LIKE, firsts(worker.view()))
    serving = canary(stable, rival, share=0.3, period=8)
    worker.serving = lambda: serving
    lists = worker.view(ITEMS[3])
    tally = redis.tally(8)
    assert (tally.evidence().events, tally.scorings, tally.others.events) == (0, 1, 0)
    worker.send(EventType.LIKE, firsts(lists))
    tally = redis.tally(8)
    events = tally.evidence().events + tally.others.events
    users = sum(one.users for one in (tally.canary, tally.stable, tally.others))
    assert events == users == len(USERS)


def test_tallies_go_on_after_a_restart(
    worker: Worker, redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    worker.send(EventType.LIKE, firsts(worker.view()))
    before = redis.tally()
    fresh = Worker(redis, canary(stable, rival, share=0.3), first=2 * len(USERS))
    fresh.send(EventType.LIKE, firsts(fresh.view(ITEMS[7])))
    after = redis.tally()
    for side in ("canary", "stable", "others"):
        old, new = getattr(before, side), getattr(after, side)
        assert (new.users, new.events) == (old.users, 2 * old.events)
    assert (before.scorings, after.scorings) == (2, 4)


@pytest.mark.parametrize(
    "damage", [b"garbage", b"", b"\x93\x01\x02\x03", b"\x80", b"\x81\xa1x" + b"\x91" * 200_000]
)
def test_a_damaged_tally_starts_anew_and_stops_nobody(
    worker: Worker, redis: MemoryRedis, damage: bytes
) -> None:
    redis.tallies[PLACE] = damage
    worker.send(EventType.LIKE, firsts(worker.view()))
    tally = redis.tally()
    assert tally.evidence().events + tally.others.events == len(USERS)


def test_after_its_tally_is_lost_a_trial_counts_each_user_it_sees_again_whole(
    worker: Worker, redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    worker.send(EventType.LIKE, firsts(worker.view()))
    # Gone, or overwritten by a worker that had not heard of the trial yet.
    redis.tallies.clear()
    fresh = Worker(redis, canary(stable, rival, share=0.3), first=2 * len(USERS))
    fresh.send(EventType.LIKE, firsts(fresh.view(ITEMS[7])))
    tally = redis.tally()
    for one in (tally.canary, tally.stable, tally.others):
        # n events of each user, so that the sum of squares is that of n = 1.
        assert one.users == one.events == one.events_events > 0


def test_a_user_who_changes_sides_in_a_trial_is_counted_whole_on_each(
    redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    # The canary cannot be loaded at first, so that all are others.
    late = Serving(POSTS, stable, share=0.3, period=PERIOD)
    worker = Worker(redis, late)
    worker.send(EventType.LIKE, firsts(worker.view()))
    serving = canary(stable, rival, share=0.3, period=PERIOD)
    worker.serving = lambda: serving
    worker.send(EventType.LIKE, firsts(worker.view(ITEMS[7])))
    tally = redis.tally()
    for one in (tally.canary, tally.stable):
        assert one.users == one.events == one.events_events > 0
    assert tally.others.users == len(USERS)


@pytest.mark.parametrize("damage", [b"garbage", b"{}", b'{"model_version":1,"items":[]}'])
def test_damaged_recommendations_are_not_judged_and_stop_nobody(
    worker: Worker, redis: MemoryRedis, stable: Bundle, rival: Bundle, damage: bytes
) -> None:
    worker.view()
    redis.recommendations = dict.fromkeys(redis.recommendations, damage)
    fresh = Worker(redis, canary(stable, rival, share=0.3), first=len(USERS))
    assert len(fresh.send(EventType.LIKE, dict.fromkeys(USERS, ITEMS[5]))) == len(USERS)
    assert redis.tally().others.events == 0


def test_a_shadow_is_judged_beside_what_all_were_served(
    redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    worker = Worker(redis, shadow(stable, rival))
    worker.send(EventType.LIKE, firsts(worker.view()))
    assert set(worker.versions.values()) == {f"posts@{V1}"}
    tally = redis.tally()
    assert (tally.shadow.events, tally.shadow.pairs) == (len(USERS), len(USERS))
    assert tally.shadow.gain == len(USERS) > tally.shadow.other_gain
    assert tally.evidence().events == 0


def test_a_canary_that_knows_no_item_is_counted_as_failing_and_not_as_bad(
    redis: MemoryRedis, stable: Bundle, root: Path
) -> None:
    worker = Worker(redis, canary(stable, opened(root, STRANGE)))
    worker.send(EventType.LIKE, firsts(worker.view()))
    tally = redis.tally()
    assert (tally.scorings, tally.errors) == (2, 2)
    assert tally.evidence().events == 0


def test_a_swap_in_the_middle_of_a_batch_mixes_no_two_trials(
    worker: Worker, redis: MemoryRedis, stable: Bundle, rival: Bundle
) -> None:
    liked = firsts(worker.view())
    trial, after = canary(stable, rival, share=0.3), Serving(POSTS, rival, period=-2)
    # Before: to judge by. Then the canary was promoted.
    answers = iter([trial])
    worker.serving = lambda: next(answers, after)
    lists = worker.send(EventType.LIKE, liked)
    assert set(worker.versions.values()) == {f"posts@{V2}"}
    assert len(lists) == len(USERS)
    tally = redis.tally()
    assert tally.evidence().events + tally.others.events == len(USERS)
    # What they now have is judged as what it is.
    worker.send(EventType.LIKE, firsts(lists))
    assert counts(redis.tally(-2))["others"] == (len(USERS),) * 3


def test_what_was_looked_up_is_counted_by_the_version_that_served_it(
    worker: Worker, stable: Bundle, rival: Bundle
) -> None:
    worker.send(EventType.LIKE, firsts(worker.view()))
    serving = canary(stable, rival, share=0.3)
    of_canary = sum(arm(serving, user) == "canary" for user in USERS)
    for name in ("judged_events", "hits", "reciprocal_ranks"):
        found = {
            version: total(
                worker.metrics, f"streamrec_{name}_total", model_version=f"posts@{version}"
            )
            for version in (V1, V2)
        }
        assert found == {V1: len(USERS) - of_canary, V2: of_canary}


# -- tallies themselves


def compared(*, failed: bool = False) -> Compared:
    return Compared(failed, seconds=0.02, stable_s=0.01)


def test_a_tally_is_written_until_redis_has_it_and_then_no_more() -> None:
    trials = Trials(lambda place: None, Metrics())
    trials.compared(PLACE, PERIOD, compared())
    assert trials.changes({}).keys() == trials.changes({}).keys() == {PLACE}
    trials.written()
    assert trials.changes({}) == {}


def test_a_partition_taken_away_is_read_again() -> None:
    stored: dict[PartitionKey, bytes] = {}
    trials = Trials(stored.get, Metrics())
    other = Trials(stored.get, Metrics())
    # It goes from one worker to another and back.
    for owner, failed in ((trials, False), (other, True), (trials, False)):
        owner.compared(PLACE, PERIOD, compared(failed=failed))
        stored |= owner.changes({})
        owner.clear()
        assert owner.changes({}) == {}
    tally = decode_tally(stored[PLACE], PERIOD)
    assert (tally.scorings, tally.errors, tally.latency.count) == (3, 1, 3)
    assert tally.latency.mean == pytest.approx(0.693, abs=1e-3)


def test_scorings_of_all_partitions_are_summed() -> None:
    trials = Trials(lambda place: None, Metrics())
    for partition in range(3):
        place = PartitionKey(POSTS, "events", partition)
        trials.compared(place, PERIOD, compared(failed=partition == 1))
    found = merged((decode_tally(data, PERIOD) for data in trials.changes({}).values()), PERIOD)
    assert (found.period, found.scorings, found.errors) == (PERIOD, 3, 1)


def test_a_stored_tally_of_another_trial_counts_for_nothing() -> None:
    trials = Trials(lambda place: None, Metrics())
    trials.compared(PLACE, PERIOD, compared())
    found = decode_tally(trials.changes({})[PLACE], PERIOD + 1)
    assert (found.period, found.scorings) == (PERIOD + 1, 0)


def test_no_user_counts_without_bound() -> None:
    trials = Trials(lambda place: None, Metrics())
    history = History(5)
    judged = Judged("others", Shown(f"posts@{V1}", ("a",)), None)
    for _ in range(200):
        trials.note(PLACE, event("ann", "a"), history, PERIOD, judged)
    assert isinstance(history.record, UserRecord)
    assert history.record.events == 50
    tally = decode_tally(trials.changes({})[PLACE], PERIOD)
    assert (tally.others.users, tally.others.events) == (1, 50)
