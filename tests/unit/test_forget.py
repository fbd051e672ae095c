"""A tombstone erases a user in its place among their events, however often records come again."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.events import BadRecords, EventLog
from models.sources_records import RecordIntake
from worker.cache import UserKey
from worker.events import Decoder, EventBatch, Reason, Records, Surface, Tombstone
from worker.forget import erased, keys_of
from worker.forget_command import Place, is_forgotten
from worker.history import History

NOW_MS = 1_764_000_000_000


def value(user: str, item: str, surface: str = "posts") -> bytes:
    return json.dumps(
        {"user_id": user, "item_id": item, "event_type": "view", "timestamp": NOW_MS,
         "surface": surface}
    ).encode()  # fmt: skip


def decode(*pairs: tuple[bytes | None, bytes | None], first: int = 0) -> EventBatch:
    keys, values = [key for key, _ in pairs], [data for _, data in pairs]
    offsets = list(range(first, first + len(pairs)))
    records = Records("t", 0, offsets, keys, values, [NOW_MS] * len(pairs))
    return Decoder(max_bytes=2000, max_future_ms=0).decode(records, now_ms=NOW_MS)


def tombstone(offset: int, *, partition: int = 0, time_ms: int = NOW_MS) -> Tombstone:
    return Tombstone("ann", "t", partition, offset, time_ms)


def history(*items: str, offset: int) -> History:
    found = History(5)
    for at, item in enumerate(items):
        (event,) = decode((b"ann", value("ann", item)), first=offset - len(items) + 1 + at).events
        found.apply(event)
    return found


def test_a_user_key_without_a_value_is_a_tombstone() -> None:
    batch = decode((b"ann", None), ("\u00e9\ud800".encode("utf-8", "surrogatepass"), None))
    assert [one.user_id for one in batch.tombstones] == ["ann", "\u00e9\ud800"]
    assert [one.offset for one in batch.tombstones] == [0, 1]
    assert not batch.rejected


def test_without_a_user_key_a_record_without_a_value_is_a_dead_letter() -> None:
    keys = [None, b"", b"\xff", b"x" * 257, b"x" * 5000]
    batch = decode(*((key, None) for key in keys), (b"ann", b""))
    assert not batch.tombstones
    assert [one.reason for one in batch.rejected] == (
        [Reason.EMPTY] + 4 * [Reason.WRONG_KEY] + [Reason.EMPTY]
    )


def test_a_batch_is_cut_behind_each_tombstone_and_loses_nothing() -> None:
    batch = decode(
        (b"ann", None), (b"ann", value("ann", "a")), (b"bob", b"{"), (b"ann", None),
        (b"bob", None), (b"ann", value("ann", "b")),
    )  # fmt: skip
    parts = batch.cut()
    shape = [
        ([e.offset for e in part.events], [one.offset for one in part.tombstones]) for part in parts
    ]
    assert shape == [([], [0]), ([1], [3]), ([], [4]), ([5], [])]
    assert [one.record.offset for part in parts for one in part.rejected] == [2]
    plain = decode((b"ann", value("ann", "a")))
    assert plain.cut() == [plain]


def test_what_is_left_knows_the_place_and_nothing_else() -> None:
    left = erased(history("a", "b", offset=7), tombstone(9))
    assert left is not None
    assert left.to_bytes() == History(5, applied=(("t", 0, 9, NOW_MS),)).to_bytes()


def test_a_tombstone_before_the_newest_event_was_carried_out_already() -> None:
    assert erased(history("a", offset=7), tombstone(6)) is None
    # A topic made anew starts again at 0, later.
    assert erased(history("a", offset=7), tombstone(0, time_ms=NOW_MS + 1)) is not None


def test_a_repeated_tombstone_erases_again_what_a_lost_write_left() -> None:
    empty = erased(history("a", offset=7), tombstone(8))
    assert empty is not None
    assert erased(empty, tombstone(8)) is not None


def test_other_partitions_keep_their_place() -> None:
    left = erased(history("a", offset=7), tombstone(3, partition=1))
    assert left is not None
    assert left.last_applied("t", 0) == (7, NOW_MS)
    assert left.last_applied("t", 1) == (3, NOW_MS)


class Worker:
    """Takes in a log as the processor does; what it holds is what Redis holds."""

    def __init__(self) -> None:
        self.histories: dict[UserKey, History] = {}

    def read(self, log: list[tuple[bytes, bytes | None]], first: int, end: int) -> None:
        for part in decode(*log[first:end], first=first).cut():
            for event in part.events:
                key = UserKey(event.user_id, event.surface)
                self.histories.setdefault(key, History(5)).apply(event)
            for one in part.tombstones:
                for key in keys_of(one.user_id):
                    left = erased(self.histories.get(key, History(5)), one)
                    if left is not None:
                        self.histories[key] = left

    def stored(self) -> dict[UserKey, bytes]:
        return {key: one.to_bytes() for key, one in self.histories.items()}


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[bytes, bytes | None]]:
    log: list[tuple[bytes, bytes | None]] = []
    for number in range(draw(st.integers(1, 25))):
        user = draw(st.sampled_from(["ann", "bob"]))
        surface = draw(st.sampled_from(list(Surface)))
        gone = draw(st.integers(0, 3)) == 0
        log.append((user.encode(), None if gone else value(user, f"i{number % 7}", surface)))
    return log


@given(logs(), st.data())
def test_after_any_crashes_the_same_is_left_as_without_one(
    log: list[tuple[bytes, bytes | None]], data: st.DataObject
) -> None:
    smooth = Worker()
    smooth.read(log, 0, len(log))
    crashing, committed = Worker(), 0
    for _ in range(data.draw(st.integers(1, 4), label="crashes")):
        reached = data.draw(st.integers(committed, len(log)), label="effects up to")
        crashing.read(log, committed, reached)
        committed = data.draw(st.integers(committed, reached), label="committed")
    crashing.read(log, committed, len(log))
    assert crashing.stored() == smooth.stored()


@given(logs())
def test_nothing_from_before_a_users_last_tombstone_is_left(
    log: list[tuple[bytes, bytes | None]],
) -> None:
    worker = Worker()
    worker.read(log, 0, len(log))
    for key, left in worker.histories.items():
        own = [at for at, (user, _) in enumerate(log) if user == key.user_id.encode()]
        gone = [at for at in own if log[at][1] is None]
        after = own[own.index(gone[-1]) + 1 :] if gone else own
        wanted = {json.loads(log[at][1] or b"")["item_id"] for at in after}
        assert set(left.items) <= wanted


EMPTY = History(5, applied=(("t", 0, 9, NOW_MS),)).to_bytes()


@pytest.mark.parametrize(
    ("stored", "recommendations", "forgotten"),
    [
        (None, None, False),  # not yet: what is left of an erased user is an empty history
        (history("a", offset=8).to_bytes(), b"{}", False),
        (EMPTY, None, True),
        (EMPTY, b"{}", False),
        (history("after", offset=10).to_bytes(), b"{}", True),
        (History(5, applied=(("t", 1, 99, NOW_MS),)).to_bytes(), None, False),
        (b"damaged", None, False),
    ],
)
def test_redis_tells_whether_a_tombstone_was_carried_out(
    stored: bytes | None, recommendations: bytes | None, forgotten: bool
) -> None:
    place = Place("t", 0, 9)
    others = [(EMPTY, None)] * 2
    assert is_forgotten([*others, (stored, recommendations)], place) is forgotten


def test_training_leaves_out_what_came_before_a_tombstone() -> None:
    log = EventLog()
    intake = RecordIntake(log, BadRecords(skip=False), "posts", keyed=True)
    pairs = [
        (b"ann", value("ann", "a")), (b"bob", value("bob", "b")), (b"ann", None),
        (b"ann", value("ann", "c")), (b"new", None),
    ]  # fmt: skip
    keys, values = zip(*pairs, strict=True)
    records = Records("t", 0, [0, 1, 2, 3, 4], keys, values, [NOW_MS] * 5)
    intake.take(records, lambda record: "")
    events = log.events(name="a topic", sha256="")
    assert list(zip(events.users.tolist(), events.items.tolist(), strict=True)) == [
        ("bob", "b"),
        ("ann", "c"),
    ]
