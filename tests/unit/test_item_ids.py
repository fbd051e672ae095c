"""Item ids read alike however the file comes in pieces, and are refused where they are no ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import BundleError, Refusal
from worker.item_ids import read_item_ids

#: Ids of any characters but those that end a line, other separators included.
ids = st.lists(
    st.text(
        st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]),
        min_size=1,
        max_size=9,
    ),
    min_size=1,
    max_size=30,
    unique=True,
)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@given(ids=ids, size=st.integers(1, 40), last_line_ended=st.booleans())
def test_the_item_of_line_i_has_index_i(ids: list[str], size: int, last_line_ended: bool) -> None:
    data = "\n".join(ids).encode() + b"\n" * last_line_ended
    index = read_item_ids(pieces(data, size), len(ids))
    assert list(index) == ids
    assert list(index.values()) == list(range(1, len(ids) + 1))


@given(data=st.binary(max_size=300), size=st.integers(1, 40), count=st.integers(1, 20))
def test_any_bytes_are_as_many_ids_as_wanted_or_refused(data: bytes, size: int, count: int) -> None:
    try:
        index = read_item_ids(pieces(data, size), count)
    except BundleError as error:
        assert error.reason is Refusal.ITEMS
    else:
        assert len(index) == count
        assert "".join(f"{item}\n" for item in index).encode().rstrip(b"\n") == data.rstrip(b"\n")


def test_a_line_without_end_is_refused_before_all_of_it_is_read() -> None:
    taken = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield b"x" * (1 << 16)

    with pytest.raises(BundleError, match="1 to 256 characters"):
        read_item_ids(endless(), 1)
    assert taken < 5


def test_lines_beyond_the_item_count_are_not_read() -> None:
    taken = []
    chunks = (taken.append(number) or b"%d\n" % number for number in range(1000))  # type: ignore[func-returns-value]
    with pytest.raises(BundleError, match="more than 3 lines"):
        read_item_ids(chunks, 3)
    assert len(taken) == 4
