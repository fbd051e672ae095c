"""Records that a topic does not take as they are: what is cut, and how much is left."""

from __future__ import annotations

import pytest
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from hypothesis import given
from hypothesis import strategies as st

from worker.cache import decode, encode
from worker.events import MAX_KEY_BYTES, Reason, Record, Rejected, Surface
from worker.outbox import (
    LARGEST_BATCH_BYTES,
    SMALLEST_BATCH_BYTES,
    SPARE_BYTES,
    Outgoing,
    dead_letter_record,
    fitted,
    recommendation_record,
    shorter_list,
)
from worker.ranking import Origin, Recommendations


def letter(value: bytes | None, key: bytes | None = b"ann", detail: str = "why") -> Outgoing:
    record = Record("t" * 249, 2**31 - 1, 2**63 - 1, key, value, 2**63 - 1)
    return dead_letter_record("dead", Rejected(record, Reason.UNSUPPORTED_VERSION, detail))


def a_list(items: list[str], user: str = "ann") -> Recommendations:
    scores = [1.0 - 0.1 * place for place in range(len(items))]
    origin = Origin("t" * 249, 2**31 - 1, 2**63 - 1)
    return Recommendations(
        user, Surface.FRIENDS, items, scores, "m" * 128 + "@" + "v" * 128, "fallback", 2**47, origin
    )


def batch_of_one(record: Outgoing) -> int:
    """Bytes of a record batch of this record alone."""
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, 0, LARGEST_BATCH_BYTES)
    builder.append(0, 2**63 - 1, record.key, record.value, record.headers)
    return len(builder.build())


def test_what_fits_is_left_alone() -> None:
    for record in (letter(b"x" * 1000), letter(None), letter(b"")):
        assert fitted(record, SMALLEST_BATCH_BYTES) is record


def test_a_large_dead_letter_keeps_its_first_bytes_and_says_how_many_it_had() -> None:
    cut = fitted(letter(b"x" * 3_000_000), LARGEST_BATCH_BYTES)
    assert cut.value == b"x" * (LARGEST_BATCH_BYTES - SPARE_BYTES)
    assert dict(cut.headers)["truncated"] == b"3000000"
    assert cut.key == b"ann"


def test_a_large_key_is_cut_too() -> None:
    cut = letter(b"{}", key=b"k" * 100_000)
    assert cut.key == b"k" * MAX_KEY_BYTES
    assert dict(cut.headers)["truncated_key"] == b"100000"
    assert "truncated_key" not in dict(letter(b"{}", key=b"k" * MAX_KEY_BYTES).headers)


@given(
    st.integers(0, 4 * SMALLEST_BATCH_BYTES),
    st.integers(0, 2 * MAX_KEY_BYTES),
    st.text(max_size=600),
    st.integers(SMALLEST_BATCH_BYTES, 3 * SMALLEST_BATCH_BYTES),
)
def test_a_dead_letter_always_fits(value: int, key: int, detail: str, limit: int) -> None:
    assert batch_of_one(fitted(letter(b"v" * value, b"k" * key, detail), limit)) <= limit


def test_the_longest_list_fits_what_is_produced_unless_ids_are_escaped() -> None:
    # A thousand ids of 256 characters of four bytes would take 1 MB; of one byte, 280 kB.
    assert len(encode(a_list(["i" * 256] * 1000))) < LARGEST_BATCH_BYTES - SPARE_BYTES


@given(
    st.lists(st.text(min_size=1, max_size=256), max_size=40),
    st.text(min_size=1, max_size=256),
    st.integers(SMALLEST_BATCH_BYTES, 2 * SMALLEST_BATCH_BYTES),
)
def test_a_list_is_cut_to_its_first_items_and_stays_one(
    items: list[str], user: str, limit: int
) -> None:
    whole = a_list(items, user)
    record = recommendation_record("lists", user, encode(whole), whole.model_version)
    cut = fitted(record, limit)
    assert batch_of_one(cut) <= limit
    assert cut.value is not None
    left = decode(cut.value)
    assert left.items == whole.items[: len(left.items)]
    assert left.scores == whole.scores[: len(left.items)]
    assert (left.user_id, left.origin) == (whole.user_id, whole.origin)


def test_a_list_of_the_dearest_ids_is_cut_until_it_fits() -> None:
    worst = a_list(["\n" * 256] * 1000, "\0" * 256)
    left = decode(shorter_list(encode(worst), SMALLEST_BATCH_BYTES - SPARE_BYTES))
    assert len(encode(left)) <= SMALLEST_BATCH_BYTES - SPARE_BYTES
    # A broker's usual limit, which is twice what is produced, leaves most of it.
    most = decode(shorter_list(encode(worst), LARGEST_BATCH_BYTES - SPARE_BYTES))
    assert len(most.items) > 300


def test_what_may_not_be_cut_is_an_error() -> None:
    release = Outgoing("releases", b"posts", b"x" * 10_000, [])
    with pytest.raises(MessageSizeTooLargeError, match="releases takes about 8192"):
        fitted(release, SMALLEST_BATCH_BYTES)
