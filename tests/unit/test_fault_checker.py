"""The checker of the fault matrix finds each kind of harm that is planted, and none where none is;
its model of a log agrees with the worker's own histories."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.checker import DeadLetter, Evidence, List, StoredUser, check
from tests.faults.model import LogRecord, Outcome, Place, User, outcome
from tests.faults.plan import BASE_MS, POISON, Plan, Planned
from tests.faults.sampler import Sample, longest_gap_s, recovered_at
from worker.events import Decoder, Reason, Records
from worker.forget import erased, keys_of
from worker.history import History
from worker.popularity import PopularityTable

LENGTH = 30
HALF_LIFE_MS = 7 * 86_400_000
COUNT = 400
PARTITIONS = 2


def logged(plan: Plan, count: int = COUNT) -> tuple[dict[int, Planned], list[LogRecord]]:
    """A plan's records, placed as Kafka would: a user's in one partition."""
    planned = {number: plan.at(number) for number in range(count)}
    log, ends = [], [0] * PARTITIONS
    for number, one in planned.items():
        partition = sum(one.key or b"") % PARTITIONS
        log.append(LogRecord(Place(partition, ends[partition]), number, one.key, one.value))
        ends[partition] += 1
    return planned, log


def flawless(plan: Plan) -> Evidence:
    """What a worker without fault leaves."""
    planned, log = logged(plan)
    good = [one for one in log if planned[one.number].reason is None]
    made = outcome(good, length=LENGTH, half_life_ms=HALF_LIFE_MS)
    ends = {n: sum(one.place.partition == n for one in log) for n in range(PARTITIONS)}
    return Evidence(
        accepted=planned,
        doubtful={},
        log=log,
        stored={
            user: StoredUser(one.entries, one.hidden, {one.last.partition: one.last.offset})
            for user, one in made.users.items()
        },
        lists={
            user: List(user, one.last, ["new"])
            for user, one in made.users.items()
            if not one.erased
        },
        published=[List(user, place) for user, one in made.users.items() for place in one.places],
        erasures=made.erased,
        dead_letters=[
            DeadLetter(one.place, reason.value, one.key, one.value)
            for one in log
            if (reason := planned[one.number].reason) is not None
        ],
        committed=ends,
        ends=ends,
        popularity=made.popularity,
        history_length=LENGTH,
        half_life_ms=HALF_LIFE_MS,
    )


PLAN = Plan(users=10, poison=0.1, repeats=0.1, erase=0.01)
CLEAN = flawless(PLAN)
#: With a history of some length, and one whose last record is a tombstone.
USER = max(CLEAN.lists, key=lambda user: len(CLEAN.stored[user].entries))
ERASED = next(user for user in CLEAN.stored if user not in CLEAN.lists)
STORED, MADE = CLEAN.stored[USER], CLEAN.lists[USER]


def test_a_flawless_run_is_found_flawless() -> None:
    verdict = check(CLEAN)
    assert verdict.violations == []
    assert (verdict.events, verdict.lost, verdict.repeats, verdict.steps_back) == (COUNT, 0, 0, 0)
    assert verdict.dead_letters == len(CLEAN.dead_letters) > 20
    assert verdict.applied == COUNT - verdict.dead_letters


def with_user(**changes: Any) -> Evidence:
    return replace(CLEAN, stored={**CLEAN.stored, USER: replace(STORED, **changes)})


def without(values: Any, key: Any) -> Any:
    return {one: value for one, value in values.items() if one != key}


def with_letter(**changes: Any) -> Evidence:
    first, *others = CLEAN.dead_letters
    return replace(CLEAN, dead_letters=[replace(first, **changes), *others])


PLANTED: dict[str, tuple[str, Callable[[], Evidence]]] = {
    "an acknowledged event is not in the log": (
        "not_in_log", lambda: replace(CLEAN, accepted={**CLEAN.accepted, 999: PLAN.at(999)})),
    "a commit is missing": ("uncommitted", lambda: replace(CLEAN, committed={0: 3})),
    "a commit is past the end": (
        "uncommitted", lambda: replace(CLEAN, committed={0: 10_000, 1: 10_000})),
    "a history is missing": (
        "lost", lambda: replace(CLEAN, stored=without(CLEAN.stored, USER))),
    "an event is missing in a history": (
        "lost", lambda: with_user(entries=[*STORED.entries[:4], *STORED.entries[5:]])),
    "the last events were never taken": ("lost", lambda: with_user(applied={})),
    "an event is there twice": (
        "repeated", lambda: with_user(entries=[*STORED.entries, STORED.entries[3]])),
    "an event is of nobody": (
        "foreign", lambda: with_user(entries=[*STORED.entries, ("strange", 1)])),
    "a user is of nobody": (
        "foreign", lambda: replace(CLEAN, stored={**CLEAN.stored, User("x", "ads"): STORED})),
    "two events have changed places": (
        "order", lambda: with_user(
            entries=[STORED.entries[1], STORED.entries[0], *STORED.entries[2:]])),
    "a hide is forgotten": ("hidden", lambda: with_user(hidden=[*STORED.hidden, "own-1"])),
    "a list is missing": (
        "list_missing", lambda: replace(CLEAN, lists=without(CLEAN.lists, USER))),
    "a list is an earlier event's": (
        "list_stale", lambda: replace(
            CLEAN, lists={**CLEAN.lists, USER: replace(MADE, origin=Place(1, 0))})),
    "a list shows what the user saw": (
        "list_shows_known", lambda: replace(
            CLEAN, lists={**CLEAN.lists, USER: replace(MADE, items=[STORED.entries[2][0]])})),
    "the last list was not published": (
        "unpublished", lambda: replace(
            CLEAN, published=[one for one in CLEAN.published if one.origin != MADE.origin])),
    "a list of another's event was published": (
        "published_strange", lambda: replace(
            CLEAN, published=[*CLEAN.published, List(USER, CLEAN.dead_letters[0].origin)])),
    "a list of nobody was published": (
        "published_strange", lambda: replace(
            CLEAN, published=[*CLEAN.published, List(User("x", "ads"), MADE.origin)])),
    "the list of an erased user was kept": (
        "list_kept", lambda: replace(
            CLEAN, lists={**CLEAN.lists, ERASED: List(ERASED, MADE.origin, [])})),
    "an erased user has a history again": (
        "foreign", lambda: replace(CLEAN, stored={
            **CLEAN.stored, ERASED: replace(CLEAN.stored[ERASED], entries=[("old", 1)])})),
    "an erasure was not published": (
        "unpublished", lambda: replace(CLEAN, erasures=CLEAN.erasures[1:])),
    "an erasure was published of nobody": (
        "published_strange", lambda: replace(
            CLEAN, erasures=[*CLEAN.erasures, ("x", MADE.origin)])),
    "a dead letter is missing": (
        "dead_letter_missing", lambda: replace(CLEAN, dead_letters=CLEAN.dead_letters[1:])),
    "a dead letter says another reason": (
        "dead_letter_wrong", lambda: with_letter(reason="processing_failed")),
    "a dead letter is not the record": ("dead_letter_wrong", lambda: with_letter(value=b"other")),
    "a good event is a dead letter": (
        "dead_letter_strange", lambda: replace(CLEAN, dead_letters=[
            *CLEAN.dead_letters, DeadLetter(MADE.origin, "processing_failed", b"", b"")])),
    "an item is counted twice": (
        "popularity", lambda: replace(CLEAN, popularity={
            **CLEAN.popularity,
            ("posts", 0): {
                item: weight + (item == STORED.entries[0][0])
                for item, weight in CLEAN.popularity["posts", 0].items()},
            ("posts", 1): {
                item: weight + (item == STORED.entries[0][0])
                for item, weight in CLEAN.popularity["posts", 1].items()},
        })),
    "popularity is gone": ("popularity", lambda: replace(CLEAN, popularity={})),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found(planted: str) -> None:
    kind, make = PLANTED[planted]
    assert {one.kind for one in check(make()).violations} == {kind}


def test_losses_are_counted_by_events() -> None:
    verdict = check(with_user(entries=STORED.entries[:-3]))
    assert (verdict.lost, verdict.applied) == (3, check(CLEAN).applied - 3)


def test_a_list_published_again_is_a_repeat_and_an_earlier_one_a_step_back() -> None:
    again = [one for one in CLEAN.published if one.user == USER][:2]
    verdict = check(replace(CLEAN, published=[*CLEAN.published, *again]))
    assert (verdict.violations, verdict.repeats, verdict.steps_back) == ([], 2, 2)


def test_what_was_not_acknowledged_may_be_in_the_log_or_not() -> None:
    last = max(CLEAN.accepted)
    doubt = {last: CLEAN.accepted[last], 1000: PLAN.at(1000)}
    changed = replace(CLEAN, accepted=without(CLEAN.accepted, last), doubtful=doubt)
    assert check(changed).violations == []


def test_the_poison_of_a_plan_is_refused_for_the_reasons_it_names() -> None:
    planned, log = logged(Plan(poison=0.5), 600)
    decoder = Decoder(max_bytes=2048, max_future_ms=300_000)
    seen: set[Reason] = set()
    for one in log:
        records = Records("t", 0, [1], [one.key], [one.value], [BASE_MS])
        rejected = decoder.decode(records, now_ms=BASE_MS + 3_600_000).rejected
        assert [it.reason for it in rejected] == [it for it in [planned[one.number].reason] if it]
        seen |= {it.reason for it in rejected}
    assert seen == set(POISON)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    repeats=st.floats(0.0, 0.5),
    spread_ms=st.sampled_from([0, 5, 10_000]),
    erase=st.sampled_from([0.0, 0.1]),
    length=st.integers(1, 12),
)
def test_the_model_agrees_with_the_workers_histories_and_counts(
    seed: int, repeats: float, spread_ms: int, erase: float, length: int
) -> None:
    plan = Plan(seed=seed, users=2, repeats=repeats, spread_ms=spread_ms, erase=erase)
    _, log = logged(plan, 60)
    made = outcome(log, length=length, half_life_ms=HALF_LIFE_MS)
    histories: dict[User, History] = {}
    tables: dict[tuple[str, int], PopularityTable] = {}
    decoder = Decoder(max_bytes=2048, max_future_ms=300_000)
    for one in log:
        records = Records(
            "t", one.place.partition, [one.place.offset], [one.key], [one.value], [BASE_MS]
        )
        decoded = decoder.decode(records, now_ms=BASE_MS + 3_600_000)
        for tombstone in decoded.tombstones:
            for key in keys_of(tombstone.user_id):
                user = User(key.user_id, key.surface.value)
                left = erased(histories.get(user, History(length)), tombstone)
                assert left is not None
                histories[user] = left
        if decoded.tombstones:
            continue
        (event,) = decoded.events
        user = User(event.user_id, event.surface.value)
        histories.setdefault(user, History(length)).apply(event)
        table = tables.setdefault(
            (user.surface, one.place.partition),
            PopularityTable(half_life_ms=HALF_LIFE_MS, max_items=100),
        )
        table.add([event])
    assert _users(made) == {
        user: (list(zip(one.items, one.timestamps, strict=True)), list(one.hidden))
        for user, one in histories.items()
    }
    for place, weights in made.popularity.items():
        assert tables[place].weights == pytest.approx(weights, abs=1e-6)


def _users(made: Outcome) -> dict[User, tuple[list[tuple[str, int]], list[str]]]:
    return {user: (one.entries, one.hidden) for user, one in made.users.items()}


def sample(at: float, committed: int, end: int) -> Sample:
    return Sample(at, {0: committed}, {0: end})


def test_recovery_is_reached_when_all_that_was_sent_by_the_faults_end_is_committed() -> None:
    samples = [sample(1, 5, 5), sample(2, 5, 9), sample(3, 8, 12), sample(4, 9, 15)]
    assert recovered_at(samples, since=1.5) == 4
    assert recovered_at(samples, since=2.5) is None


def test_a_commit_gap_is_time_without_progress_while_events_wait() -> None:
    samples = [
        sample(0, 5, 5), sample(9, 5, 5), sample(10, 5, 8), sample(13, 5, 9), sample(14, 7, 9),
        sample(15, 9, 9),
    ]  # fmt: skip
    assert longest_gap_s(samples) == 5


def test_values_of_a_plan_are_the_same_each_time() -> None:
    assert [PLAN.at(n) for n in range(50)] == [PLAN.at(n) for n in range(50)]
    assert json.loads(Plan().at(1).value or b"")["event_id"] == "e1"
