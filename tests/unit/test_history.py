"""A history is bounded, in time order, and takes each event once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.events import Event, EventType, Record, Surface
from worker.history import History


def event(
    item: str,
    at: int,
    offset: int,
    event_type: EventType = EventType.VIEW,
    event_id: str | None = None,
    record_time: int = 1000,
    partition: int = 0,
) -> Event:
    record = Record("t", partition, offset, b"u", b"", record_time)
    return Event("u", item, event_type, Surface.POSTS, at, event_id, record)


def applied(*events: Event, length: int = 5) -> History:
    history = History(length)
    for one in events:
        history.apply(one)
    return history


def test_keeps_the_newest_items_only() -> None:
    history = applied(*(event(f"i{n}", n, n) for n in range(9)))
    assert history.items == ["i4", "i5", "i6", "i7", "i8"]


def test_a_late_event_is_put_where_its_time_belongs() -> None:
    assert applied(event("a", 1, 0), event("c", 3, 1), event("b", 2, 2)).items == ["a", "b", "c"]


def test_an_event_older_than_a_full_history_changes_nothing() -> None:
    history = applied(*(event(f"i{n}", n + 10, n) for n in range(5)))
    before = list(history.items)
    assert history.apply(event("old", 1, 9)) == "late"
    assert history.items == before


def test_a_redelivered_record_is_a_duplicate() -> None:
    history = applied(event("a", 1, 0), event("b", 2, 1))
    assert history.apply(event("a", 1, 0)) == "duplicate"
    assert history.items == ["a", "b"]


def test_a_topic_made_anew_is_not_taken_for_repeats() -> None:
    history = applied(event("a", 1, 50, record_time=1000))
    assert history.apply(event("b", 2, 0, record_time=2000)) == "applied"


def test_a_producers_repeat_at_another_offset_is_known_by_its_event_id() -> None:
    history = applied(event("a", 1, 0, event_id="e"))
    assert history.apply(event("a", 1, 1, event_id="e")) == "duplicate"


def test_hide_removes_an_item_and_keeps_it_hidden_until_a_deliberate_act() -> None:
    history = applied(
        event("a", 1, 0), event("b", 2, 1), event("a", 3, 2, EventType.HIDE), event("a", 4, 3)
    )
    assert "a" in history.hidden
    history.apply(event("a", 5, 4, EventType.LIKE))
    assert "a" not in history.hidden


def test_view_then_like_of_one_item_is_one_entry() -> None:
    assert applied(event("a", 1, 0), event("a", 2, 1, EventType.LIKE)).items == ["a"]


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x96\x01\x91\xa1a\x90\x90\x90\x80"])
def test_what_is_not_a_stored_history_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="stored history"):
        History.from_bytes(data, 5)


events = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"),
        st.integers(0, 20),
        st.sampled_from(list(EventType)),
        st.none() | st.sampled_from(["e1", "e2", "e3"]),
    ),
    max_size=40,
)


@given(events, st.integers(0, 40))
def test_redelivery_of_any_tail_changes_nothing(
    raw: list[tuple[str, int, EventType, str | None]], start: int
) -> None:
    stream = [
        event(item, at, n, kind, identity) for n, (item, at, kind, identity) in enumerate(raw)
    ]
    once, twice = applied(*stream), applied(*stream, *stream[start:])
    assert once.to_bytes() == twice.to_bytes()


@given(events)
def test_invariants_hold_and_survive_storage(
    raw: list[tuple[str, int, EventType, str | None]],
) -> None:
    history = applied(
        *(event(item, at, n, kind, identity) for n, (item, at, kind, identity) in enumerate(raw))
    )
    assert len(history.items) == len(history.timestamps) <= 5
    assert history.timestamps == sorted(history.timestamps)
    assert len(history.hidden) <= 5
    assert History.from_bytes(history.to_bytes(), 5).to_bytes() == history.to_bytes()
