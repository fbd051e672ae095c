"""Only the contiguous finished prefix may be committed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.commits import OffsetTracker


def test_an_event_in_flight_holds_back_what_finished_behind_it() -> None:
    """faust-streaming/faust#606: with 38 in flight and 39 to 41 done, Faust commits 42."""
    tracker: OffsetTracker[str] = OffsetTracker()
    first = tracker.begin("p", 38, 39, 1)
    rest = tracker.begin("p", 39, 42, 3)
    tracker.finish("p", rest)
    assert tracker.committable() == {}
    tracker.finish("p", first)
    assert tracker.committable() == {"p": 42}


def test_stock_faust_has_the_fault_that_the_tracker_cures() -> None:
    """Once this fails, Faust has been mended and worker/intake.py may be simplified."""
    from collections import defaultdict

    from faust.transport.consumer import Consumer
    from faust.types import TP
    from intervaltree import IntervalTree

    tp = TP("t", 0)
    stock = type("Stock", (), {})()
    stock._acked = {tp: [39, 40, 41]}
    stock._acked_index = defaultdict(set)
    stock._gap = {tp: IntervalTree()}
    stock._committed_offset = {tp: 38}
    assert Consumer._new_offset(stock, tp) == 42


def test_gaps_in_the_log_hold_nothing_back() -> None:
    tracker: OffsetTracker[str] = OffsetTracker()
    for span in [tracker.begin("p", 5, 7, 2), tracker.begin("p", 20, 21, 1)]:
        tracker.finish("p", span)
    assert tracker.committable() == {"p": 21}


def test_what_was_committed_is_not_offered_again() -> None:
    tracker: OffsetTracker[str] = OffsetTracker()
    tracker.finish("p", tracker.begin("p", 0, 3, 3))
    tracker.committed({"p": 3})
    assert tracker.committable() == {}


def test_a_span_from_before_a_rebalance_moves_nothing() -> None:
    tracker: OffsetTracker[str] = OffsetTracker()
    stale = tracker.begin("p", 0, 3, 3)
    tracker.forget()
    tracker.begin("p", 0, 3, 3)
    assert not tracker.finish("p", stale)
    assert tracker.committable() == {}
    assert tracker.in_flight == 3


@pytest.mark.parametrize(("first", "next_"), [(2, 4), (5, 5)])
def test_delivery_out_of_order_is_a_defect(first: int, next_: int) -> None:
    tracker: OffsetTracker[str] = OffsetTracker()
    tracker.begin("p", 0, 3, 3)
    with pytest.raises(ValueError, match="offsets"):
        tracker.begin("p", first, next_, 1)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.randoms())
def test_committable_is_always_the_first_unfinished_offset(sizes: list[int], rng: object) -> None:
    tracker: OffsetTracker[str] = OffsetTracker()
    spans, start = [], 0
    for size in sizes:
        spans.append(tracker.begin("p", start, start + size, size))
        start += size
    order = list(range(len(spans)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    finished: set[int] = set()
    for place in order:
        tracker.finish("p", spans[place])
        finished.add(place)
        left = [spans[n].first for n in range(len(spans)) if n not in finished]
        assert tracker.positions()["p"] == min(left, default=start)
    assert tracker.in_flight == 0
