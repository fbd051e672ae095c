"""The mark at the end of what is stored: what Redis compares writes by."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.serving import event
from worker.cache import PartitionKey
from worker.events import Surface
from worker.history import History
from worker.lists import Compared
from worker.metrics import Metrics
from worker.trials import Trials
from worker.versions import MAX_PLACES, Applied, mark

APPLIED = st.tuples(
    st.text(max_size=5), st.integers(0, 9), st.integers(0, 2**53), st.integers(-1, 2**45)
)


def last_place(data: bytes) -> tuple[int, int]:
    """Offset and record time in the newest place of a mark."""
    assert data[-3:] == b"SR1"
    return struct.unpack(">qq", data[-20:-4])


@given(st.lists(APPLIED, min_size=1, max_size=4))
def test_the_newest_record_is_the_last_place(applied: list[Applied]) -> None:
    data = mark(applied)
    assert last_place(data) == applied[-1][2:]
    assert (len(data), data[-4]) == (24 * len(applied) + 4, len(applied))


def test_places_beyond_a_byte_are_the_oldest_and_left_out() -> None:
    applied = [("events", partition, partition, 0) for partition in range(MAX_PLACES + 9)]
    data = mark(applied)
    assert (data[-4], last_place(data)) == (MAX_PLACES, (MAX_PLACES + 8, 0))


def test_topics_and_partitions_are_told_apart() -> None:
    hashes = {mark([(topic, n, 5, 7)])[:8] for topic in ("a", "b", "a1") for n in (1, 11)}
    assert len(hashes) == 6


def test_a_history_ends_in_its_mark() -> None:
    history = History(8)
    history.apply(event("u", "a"))
    data = history.to_bytes()
    assert data.endswith(mark(history.applied))
    assert History.from_bytes(data, 8).to_bytes() == data


def test_a_tally_ends_in_its_mark() -> None:
    place = PartitionKey(Surface.POSTS, "events", 3)
    trials = Trials(lambda place: None, Metrics())
    trials.compared(place, 5, Compared(False, seconds=0.02, stable_s=0.01))
    assert trials.changes({place: (17, 9)})[place].endswith(mark([("events", 3, 17, 9)]))
