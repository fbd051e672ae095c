"""While Redis is away: who goes on, who is parked, and that nobody's order suffers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.serving import POSTS
from worker.cache import PartitionKey, UserKey
from worker.events import Event, EventBatch, EventType, Records, Surface, Tombstone
from worker.forget import keys_of
from worker.held import Held

USERS = ("ann", "bob", "cat")


def batch(first: int, acts: list[tuple[str, Surface | None]]) -> EventBatch:
    """Events at the offsets from `first` on; without a surface, a tombstone."""
    made = EventBatch(Records("events", 0, [], [], [], []))
    for offset, (user, surface) in enumerate(acts, first):
        if surface is None:
            made.tombstones.append(Tombstone(user, "events", 0, offset, 0))
        else:
            made.events.append(
                Event(user, "a", EventType.VIEW, surface, 0, None, None, "events", 0, offset, 0)
            )
    return made


def order(parts: list[EventBatch]) -> dict[str, list[int]]:
    """Offsets by user, in the order in which parts, and their events then tombstones, are taken."""
    found: dict[str, list[int]] = {user: [] for user in USERS}
    for part in parts:
        for one in [*part.events, *part.tombstones]:
            found[one.user_id].append(one.offset)
    return found


ACTS = st.lists(
    st.tuples(st.sampled_from(USERS), st.sampled_from([POSTS, Surface.FRIENDS, None])), max_size=8
)
KEYS = [key for user in USERS for key in keys_of(user)]


@given(
    batches=st.lists(ACTS, max_size=4),
    cached=st.lists(st.sets(st.sampled_from(KEYS)), min_size=4, max_size=4),
    known=st.sets(st.sampled_from([POSTS, Surface.FRIENDS])),
)
def test_each_user_is_taken_in_order_and_once_and_no_more_once_parked(
    batches: list[list[tuple[str, Surface | None]]], cached: list[set[UserKey]], known: set[Surface]
) -> None:
    """What is cached may differ from batch to batch."""
    held = Held()
    going: list[EventBatch] = []
    all_parts: list[EventBatch] = []
    offset = 0
    for acts, own in zip(batches, cached, strict=False):
        parts = batch(offset, acts).cut()
        offset += len(acts)
        all_parts += parts
        going += held.split(parts, own.__contains__, lambda place: place.surface in known)
    gone, expected = order(going), order(all_parts)
    for part in going:
        for event in part.events:
            assert event.surface in known
    parked = order(held.unpark())
    for user in USERS:
        assert gone[user] + parked[user] == expected[user]
    assert not held


def test_a_user_who_is_not_in_memory_is_parked_with_all_later_events_and_no_other() -> None:
    held = Held()
    everybody = {UserKey(user, POSTS) for user in USERS}
    going = held.split(
        [batch(0, [("ann", POSTS), ("bob", POSTS)])],
        (everybody - {UserKey("bob", POSTS)}).__contains__,
        lambda place: True,
    )
    assert order(going) == {"ann": [0], "bob": [], "cat": []}
    going = held.split([batch(2, [("bob", POSTS), ("cat", POSTS)])], everybody.__contains__, bool)
    assert order(going) == {"ann": [], "bob": [], "cat": [3]}
    assert order(held.unpark()) == {"ann": [], "bob": [1, 2], "cat": []}
    assert order(held.split([batch(4, [("bob", POSTS)])], everybody.__contains__, bool)) == {
        "ann": [], "bob": [4], "cat": [],
    }  # fmt: skip


def test_the_latest_state_of_each_user_is_held() -> None:
    ann, bob = UserKey("ann", POSTS), UserKey("bob", POSTS)
    held = Held()
    part = [batch(0, [("ann", POSTS)])]
    held.hold(part, [ann, bob], set(), {ann: b"1", bob: b"1"}, {POSTS: {"a": "text"}})
    held.hold(part, [ann], set(), {ann: b"2"}, {POSTS: {"b": "text"}})
    held.hold(part, [], {bob}, {}, {})
    assert (list(held.touched), held.emptied, held.lists) == ([ann], {bob}, {ann: b"2"})
    assert held.cold_items == {POSTS: {"a": "text", "b": "text"}}
    held.hold(part, [bob], set(), {bob: b"3"}, {})
    assert (list(held.touched), held.emptied) == ([ann, bob], set())
    held.hold(part, [], {ann}, {}, {})
    held.hold(part, [ann], set(), {}, {})
    assert held.lists == {ann: b"", bob: b"3"}
    held.written()
    assert not held


def test_places_without_their_popularity_table_wait_for_it() -> None:
    held = Held()
    places: list[PartitionKey] = []

    def known(place: PartitionKey) -> bool:
        places.append(place)
        return False

    assert held.split([batch(0, [("ann", POSTS)])], lambda key: True, known) == []
    assert places == [PartitionKey(POSTS, "events", 0)]
