"""A user's next event is looked up in the list served before; tallies add up in any order."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.events import EventType
from worker.quality import (
    MAX_USER_EVENTS,
    POSITIVE_TYPES,
    Coverage,
    Tally,
    UserRecord,
    arm_of,
    bucket,
    drift,
    overlap,
    rank_of,
    record_in,
    residual_squares,
)
from worker.sequences import MeanTally

SERVED = ["a", "b", "c", "d"]
OTHER = ["d", "c", "x", "y"]

#: User and item of each event.
streams = st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abcdxyz")), max_size=120)


def counted(events: list[tuple[int, str]]) -> tuple[Tally, dict[int, UserRecord]]:
    tally, records = Tally(), {}
    for user, item in events:
        before = record_in(records.get(user), 7)
        records[user] = after = before.noted(item, SERVED, OTHER)
        tally.replace(before, after)
    return tally, records


def of_records(records: list[UserRecord]) -> Tally:
    """A tally written out as sums over users."""

    def total(function: object) -> float:
        return sum(function(one) for one in records)  # type: ignore[operator]

    return Tally(
        users=len(records),
        events=total(lambda r: r.events),
        pairs=total(lambda r: r.pairs),
        hits=total(lambda r: r.hits),
        gain=total(lambda r: r.gain),
        other_hits=total(lambda r: r.other_hits),
        other_gain=total(lambda r: r.other_gain),
        events_events=total(lambda r: r.events**2),
        hits_hits=total(lambda r: r.hits**2),
        hits_events=total(lambda r: r.hits * r.events),
        gain_gain=total(lambda r: r.gain**2),
        gain_events=total(lambda r: r.gain * r.events),
        other_other=total(lambda r: r.other_gain**2),
        other_events=total(lambda r: r.other_gain * r.events),
        gain_other=total(lambda r: r.gain * r.other_gain),
    )


def fields(tally: Tally) -> dict[str, float]:
    return msgspec.structs.asdict(tally)


def same(left: Tally, right: Tally) -> bool:
    return fields(left) == pytest.approx(fields(right), abs=1e-9)


def test_the_first_place_has_rank_one() -> None:
    assert [rank_of(item, SERVED) for item in ("a", "d", "z")] == [1, 4, None]


def test_only_what_shows_that_the_item_was_wanted_counts() -> None:
    assert EventType.HIDE not in POSITIVE_TYPES
    assert EventType.VIEW not in POSITIVE_TYPES
    assert EventType.LIKE in POSITIVE_TYPES


def test_an_event_is_looked_up_in_both_lists() -> None:
    record = UserRecord(1).noted("c", SERVED, OTHER)
    assert record == UserRecord(1, 1, 1, 1, pytest.approx(1 / 3), 1, pytest.approx(1 / 2))


def test_without_the_other_list_an_event_makes_no_pair() -> None:
    assert UserRecord(1).noted("z", SERVED) == UserRecord(1, events=1)


def test_a_user_counts_for_so_many_events_only() -> None:
    record = UserRecord(1)
    for _ in range(MAX_USER_EVENTS + 5):
        record = record.noted("a", SERVED)
    assert (record.events, record.hits) == (MAX_USER_EVENTS, MAX_USER_EVENTS)
    assert record.noted("a", SERVED) is record


def test_a_new_trial_starts_from_nothing() -> None:
    old = UserRecord(1, events=5, hits=2)
    assert record_in(old, 1) is old
    assert record_in(old, 2) == UserRecord(2)
    assert record_in(None, 2) == UserRecord(2)


@given(streams)
def test_a_tally_kept_event_by_event_is_the_sum_over_users(events: list[tuple[int, str]]) -> None:
    tally, records = counted(events)
    assert same(tally, of_records(list(records.values())))


@given(streams, st.integers(1, 5))
def test_partitions_tallied_apart_add_up(events: list[tuple[int, str]], first: int) -> None:
    left, _ = counted([one for one in events if one[0] < first])
    right, _ = counted([one for one in events if one[0] >= first])
    whole, _ = counted(events)
    assert same(left.merged(right), whole)
    assert same(right.merged(left), whole)


@given(streams)
def test_a_tally_survives_being_stored(events: list[tuple[int, str]]) -> None:
    tally, records = counted(events)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(tally), type=Tally) == tally
    assert msgspec.json.decode(msgspec.json.encode(tally), type=Tally) == tally
    for record in records.values():
        stored = msgspec.msgpack.encode(record)
        assert msgspec.msgpack.decode(stored, type=UserRecord) == record


@given(streams)
def test_swapping_versions_is_looking_from_the_other_side(events: list[tuple[int, str]]) -> None:
    tally, records = counted(events)
    turned = of_records(
        [
            UserRecord(7, r.events, r.pairs, r.other_hits, r.other_gain, r.hits, r.gain)
            for r in records.values()
        ]
    )
    swapped = fields(tally.swapped())
    # Of hits only the number is kept for the other version.
    for name in ("hits_hits", "hits_events"):
        swapped.pop(name)
    assert swapped == pytest.approx({n: fields(turned)[n] for n in swapped}, abs=1e-9)


def test_rates_are_means_over_events() -> None:
    tally, _ = counted([(1, "a"), (1, "z"), (2, "d"), (2, "z")])
    assert tally.hit_rate == 0.5
    assert tally.mrr == pytest.approx((1 + 1 / 4) / 4)
    assert (Tally().hit_rate, Tally().mrr) == (0.0, 0.0)


def test_nothing_is_known_of_a_rate_before_a_hit() -> None:
    assert counted([(1, "z"), (2, "z")])[0].hit_rate_interval(0.025) == (0.0, 0.0, 1.0)


def test_events_of_one_user_say_less_than_those_of_many() -> None:
    many, few = Tally(), Tally()
    for at in range(100):
        hit = int(at % 4 == 0)
        many.replace(UserRecord(1), UserRecord(1, events=1, hits=hit, gain=float(hit)))
    for at in range(10):
        hits = 10 if at in (0, 5) else 5 if at == 7 else 0
        few.replace(UserRecord(1), UserRecord(1, events=10, hits=hits, gain=float(hits)))
    assert many.hit_rate == few.hit_rate == 0.25
    for one in (many.hit_rate_interval(0.025), many.mrr_interval(0.025)):
        assert 0.0 < one.low < 0.25 < one.high < 0.6
    assert few.hit_rate_interval(0.025).high > many.hit_rate_interval(0.025).high


def test_with_one_event_each_the_variance_is_that_of_a_sample() -> None:
    tally, gains = Tally(), [1.0, 0.0, 0.5, 0.25, 0.0]
    for gain in gains:
        tally.replace(UserRecord(1), UserRecord(1, events=1, hits=int(gain > 0), gain=gain))
    squares = residual_squares(tally, tally.gain, tally.gain_gain, tally.gain_events)
    assert squares / tally.users == pytest.approx(np.var(gains, ddof=1))


def test_the_hit_rate_stays_within_its_interval_while_users_sums_grow() -> None:
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(150):
        chances = rng.beta(2, 8, 60)
        users = rng.choice(60, 900, p=rng.dirichlet(np.ones(60)))
        tally, records = Tally(), {}
        missed = False
        for user in users.tolist():
            before = record_in(records.get(user), 1)
            item = "b" if rng.random() < chances[user] else "z"
            records[user] = after = before.noted(item, SERVED)
            tally.replace(before, after)
            if tally.users >= 10:
                one = tally.hit_rate_interval(0.025)
                missed = missed or not one.low <= 0.2 <= one.high
        wrong += missed
    assert wrong / 150 <= 0.08


def test_a_bucket_is_the_same_in_every_worker() -> None:
    # Fixed for ever: another value would move users between the groups of a running trial.
    assert bucket("u1", "posts:7") == 0.7754464061601665
    assert bucket("u1", "posts:8") != bucket("u1", "posts:7")


@given(st.text(max_size=40), st.text(max_size=10))
def test_a_bucket_lies_in_the_unit_interval(user: str, salt: str) -> None:
    assert 0.0 <= bucket(user, salt) < 1.0


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_the_two_groups_are_of_equal_size(share: float) -> None:
    arms = [arm_of(f"user-{n}", "posts:1", share) for n in range(20_000)]
    for arm in ("canary", "stable"):
        assert arms.count(arm) / len(arms) == pytest.approx(share, abs=0.015)


def test_above_one_half_all_others_are_compared_with() -> None:
    arms = [arm_of(f"user-{n}", "posts:1", 0.8) for n in range(5_000)]
    assert arms.count(None) == 0
    assert arms.count("canary") / len(arms) == pytest.approx(0.8, abs=0.03)


def test_groups_are_drawn_anew_in_each_trial() -> None:
    users = [f"user-{n}" for n in range(4_000)]
    both = sum(arm_of(u, "posts:1", 0.5) == arm_of(u, "posts:2", 0.5) for u in users)
    assert both / len(users) == pytest.approx(0.5, abs=0.04)


@given(
    st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), *[st.sets(st.integers(-1, 80))] * 2))
)
def test_coverage_counts_each_item_of_the_catalogue_once(
    given_: tuple[int, set[int], set[int]],
) -> None:
    count, left, right = given_
    one, two = Coverage(count), Coverage(count)
    one.note(left)
    two.note([*right, *right])
    for _ in range(2):
        one.merge(two.to_bytes())
    assert one.share == len({i for i in left | right if 1 <= i <= count}) / count


def test_coverage_of_another_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="another catalogue than 9 items"):
        Coverage(9).merge(Coverage(8).to_bytes())


def test_overlap_is_the_share_in_common() -> None:
    assert overlap(SERVED, OTHER) == 0.5
    assert overlap(SERVED, SERVED[:1]) == 0.25
    assert overlap([], []) == 1.0
    assert overlap(SERVED, []) == 0.0


def test_drift_is_in_standard_deviations() -> None:
    before, after = MeanTally(), MeanTally()
    for number in (1.0, 2.0, 3.0):
        before.add(number)
        after.add(number + 2.0)
    assert drift(before, after) == pytest.approx(2.0)
    assert drift(before, before) == 0.0
    assert drift(MeanTally(), MeanTally()) == 0.0
