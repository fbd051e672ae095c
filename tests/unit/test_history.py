"""A history is bounded, in time order, and takes each event once."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.events import Event, EventType, Surface
from worker.history import History, StoredHistory, StoredHistory1, event_hash


def event(
    item: str,
    at: int,
    offset: int,
    event_type: EventType = EventType.VIEW,
    event_id: str | None = None,
    record_time: int = 1000,
    partition: int = 0,
) -> Event:
    return Event(
        "u",
        item,
        event_type,
        Surface.POSTS,
        at,
        event_id,
        None,
        "t",
        partition,
        offset,
        record_time,
    )  # fmt: skip


def applied(*events: Event, length: int = 5) -> History:
    history = History(length)
    for one in events:
        history.apply(one)
    return history


def test_keeps_the_newest_items_only() -> None:
    history = applied(*(event(f"i{n}", n, n) for n in range(9)))
    assert history.items == ("i4", "i5", "i6", "i7", "i8")


def test_a_late_event_is_put_where_its_time_belongs() -> None:
    assert applied(event("a", 1, 0), event("c", 3, 1), event("b", 2, 2)).items == ("a", "b", "c")


def test_an_event_older_than_a_full_history_changes_nothing() -> None:
    history = applied(*(event(f"i{n}", n + 10, n) for n in range(5)))
    before = history.items
    assert history.apply(event("old", 1, 9)) == "late"
    assert history.items == before


def test_a_redelivered_record_is_a_duplicate() -> None:
    history = applied(event("a", 1, 0), event("b", 2, 1))
    assert history.apply(event("a", 1, 0)) == "duplicate"
    assert history.items == ("a", "b")


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
    assert applied(event("a", 1, 0), event("a", 2, 1, EventType.LIKE)).items == ("a",)


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
    assert list(history.timestamps) == sorted(history.timestamps)
    assert len(history.hidden) <= 5
    assert History.from_bytes(history.to_bytes(), 5).to_bytes() == history.to_bytes()


def test_a_history_of_format_1_is_read_with_all_it_holds() -> None:
    made = applied(
        event("a", 1, 3, event_id="e"), event("b", 2, 4, EventType.HIDE), event("c", 5, 6)
    )
    old = StoredHistory1(
        1,
        list(made.items),
        list(made.timestamps),
        list(made.hidden),
        [int.from_bytes(event_hash("e"), "big")],
        {"t": {0: (6, 1000)}},
        [],
    )
    read = History.from_bytes(msgspec.msgpack.encode(old), 5)
    assert read.to_bytes() == made.to_bytes()
    assert read.apply(event("a", 9, 9, event_id="e")) == "duplicate"


def test_an_id_is_known_only_at_its_own_place() -> None:
    history = applied(event("a", 1, 0, event_id="e"), event("b", 2, 1, event_id="f"))
    middle = bytes(history.event_ids[4:12])
    # Bytes across two ids are not an id.
    history.event_ids = middle[4:] + b"\0" * 8 + middle[:4]
    assert history.apply(event("c", 3, 2, event_id="e")) == "applied"


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 8))
def test_a_repeated_id_is_known_among_the_last_length(ids: list[int], length: int) -> None:
    history = History(length)
    remembered: list[int] = []
    for offset, number in enumerate(ids):
        outcome = history.apply(event(f"i{offset}", offset, offset, event_id=f"e{number}"))
        assert (outcome == "duplicate") == (number in remembered)
        if number not in remembered:
            remembered = [*remembered, number][-length:]


@pytest.mark.parametrize("cut", ["timestamps", "event ids"])
def test_columns_of_different_length_are_refused(cut: str) -> None:
    stored = StoredHistory(
        2, ("a",), b"12345678"[: 7 if cut == "timestamps" else 8], (),
        b"x" if cut == "event ids" else b"", (), [],
    )  # fmt: skip
    with pytest.raises(ValueError, match=cut):
        History.from_bytes(msgspec.msgpack.encode(stored), 5)
