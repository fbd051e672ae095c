"""What the model reads of a history, kept up to date piece by piece."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.bundle import Bundle
from worker.events import Event, EventType, Surface
from worker.history import History
from worker.scorer import MAX_STEPS, Inputs, model_inputs
from worker.session import MAX_RUN_ROWS

LENGTH = 6
INDEX = {name: number for number, name in enumerate("abcdefg", start=1)}


def model(
    max_length: int = 4,
    min_length: int = 1,
    carry_width: int | None = None,
    version: str = "v1",
    index: dict[str, int] = INDEX,
    any_length: bool = False,
) -> Bundle:
    manifest = SimpleNamespace(
        reference=f"posts@{version}", catalogue="".join(index), max_length=max_length,
        min_length=min_length, carry_width=carry_width, any_length=any_length,
    )  # fmt: skip
    made = SimpleNamespace(
        manifest=manifest,
        index=index,
        items=tuple(index),
        fresh_carry=lambda batch: np.zeros((batch, carry_width or 0), dtype=np.float32),
    )
    return cast(Bundle, cast(Any, made))


def take(
    history: History, item: str, at: int, offset: int, kind: EventType = EventType.VIEW
) -> None:
    history.apply(
        Event("u", item, kind, Surface.POSTS, at, None, None, "t", 0, offset, 1000 + offset)
    )


def of(items: str) -> History:
    history = History(LENGTH)
    for number, item in enumerate(items):
        take(history, item, number, number)
    return history


def rows(inputs: Inputs) -> dict[int, list[int]]:
    return {
        row: history.tolist()
        for run in inputs.runs
        for row, history in zip(run.rows.tolist(), run.history, strict=True)
    }


def known(items: Sequence[str], index: dict[str, int], length: int) -> list[int]:
    """The plain meaning of a padded input."""
    numbers = [index[item] for item in items if item in index][-length:]
    return [0] * (length - len(numbers)) + numbers


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdefgxyz"),
            st.integers(0, 30),
            st.sampled_from([EventType.VIEW, EventType.LIKE, EventType.HIDE]),
            st.sampled_from(["nothing", "score", "new version", "new catalogue"]),
        ),
        max_size=40,
    ),
    st.integers(1, 8),
)
def test_an_input_is_what_a_fresh_look_at_the_history_gives(
    steps: list[tuple[str, int, EventType, str]], max_length: int
) -> None:
    history, versions, catalogues = History(LENGTH), 1, 0
    indexes = [INDEX, {name: number for number, name in enumerate("zyxabc", start=1)}]
    for offset, (item, at, kind, then) in enumerate(steps):
        take(history, item, at, offset, kind)
        versions += then != "score"
        catalogues += then == "new catalogue"
        if then != "nothing":
            index = indexes[catalogues % 2]
            inputs = model_inputs([history], model(max_length, version=f"v{versions}", index=index))
            expected = known(history.items, index, max_length)
            assert rows(inputs) == ({0: expected} if any(expected) else {})
            window = [index.get(name, 0) for name in history.items]
            assert inputs.windows[0].tolist() == [0] * (LENGTH - len(window)) + window


def test_a_version_of_the_same_catalogue_takes_the_windows_as_they_are() -> None:
    history = of("abc")
    model_inputs([history], model(version="v1"))
    window = history.window
    model_inputs([history], model(version="v2"))
    assert history.window is window
    model_inputs([history], model(version="v2", index={"b": 1}))
    assert history.window is not window


def test_a_user_with_too_little_known_is_in_no_run() -> None:
    inputs = model_inputs([of("ab"), of("xyz"), of("axb"), of("")], model(min_length=2))
    assert rows(inputs) == {0: [0, 0, 1, 2], 2: [0, 0, 1, 2]}


def test_runs_are_small_and_hold_every_user_once() -> None:
    count = 2 * MAX_RUN_ROWS + 3
    inputs = model_inputs([of("abc")] * count, model())
    assert [len(run.rows) for run in inputs.runs] == [MAX_RUN_ROWS, MAX_RUN_ROWS, 3]
    assert [row for run in inputs.runs for row in run.rows.tolist()] == list(range(count))


def test_where_the_model_takes_any_length_short_histories_are_run_together() -> None:
    short, long = MAX_RUN_ROWS, MAX_RUN_ROWS + 1
    histories = [of("a") if number % 2 else of("abc") for number in range(2 * short)]
    inputs = model_inputs([*histories, of("abcdef")], model(any_length=True))
    assert [run.history.shape for run in inputs.runs] == [(short, 1), (short, 3), (1, 4)]
    assert rows(inputs)[1] == [1] and rows(inputs)[0] == [1, 2, 3]
    assert rows(inputs)[2 * short] == [3, 4, 5, 6]
    assert len(rows(inputs)) == short + long


# -- models with a carry


def recurrent(version: str = "v1") -> Bundle:
    return model(carry_width=2, version=version, any_length=True)


def carried(items: str) -> History:
    """A history whose carry a run has just made."""
    history = of(items)
    model_inputs([history], recurrent())
    history.carry = np.array([1.0, 2.0], dtype=np.float32).tobytes()
    return history


def only_run(history: History, version: str = "v1") -> tuple[list[list[int]], list[list[float]]]:
    (run,) = model_inputs([history], recurrent(version)).runs
    assert run.carry is not None
    return run.history.tolist(), run.carry.tolist()


def test_a_new_user_is_read_whole_from_a_zero_carry() -> None:
    assert only_run(of("abc")) == ([[1, 2, 3]], [[0.0, 0.0]])


def test_only_new_known_items_are_read_from_the_carry() -> None:
    history = carried("abc")
    for offset, item in enumerate("dxe", start=3):
        take(history, item, offset, offset)
    assert only_run(history) == ([[4, 5]], [[1.0, 2.0]])


@pytest.mark.parametrize(
    "why", ["swap", "late", "hide", "nothing new", "too much", "failed run", "scored by another"]
)
def test_a_carry_that_does_not_fit_is_made_anew(why: str) -> None:
    history, version = carried("abc"), "v1"
    if why == "swap":
        take(history, "d", 9, 9)
        version = "v2"
    elif why == "late":
        take(history, "d", 1, 9)
    elif why == "hide":
        take(history, "b", 9, 9, EventType.HIDE)
    elif why == "too much":
        for offset in range(9, 9 + MAX_STEPS + 1):
            take(history, "abcdefg"[offset % 7], offset, offset)
    elif why == "failed run":
        take(history, "d", 9, 9)
        model_inputs([history], recurrent())  # its carry never came
        take(history, "e", 10, 10)
    elif why == "scored by another":
        take(history, "d", 9, 9)
        model_inputs([history], model(version="v2"))  # of the same catalogue, and not recurrent
        take(history, "e", 10, 10)
    (read,), (carry,) = only_run(history, version)
    assert carry == [0.0, 0.0]
    assert read == [number for number in known(history.items, INDEX, 4) if number]


def test_users_with_and_without_a_carry_are_run_apart() -> None:
    stepped = carried("abc")
    take(stepped, "d", 9, 9)
    inputs = model_inputs([of("ab"), stepped, of("xy")], recurrent())
    assert rows(inputs) == {0: [1, 2], 1: [4]}


def test_ids_that_the_model_knows_are_its_own_strings() -> None:
    """One string for each time that an item was seen was most of a worker's memory."""
    own = {f"item-{number}": number for number in (1, 2, 3)}
    bundle = model(index=own, max_length=LENGTH)

    def seen(*numbers: int) -> History:
        history = History(LENGTH)
        for at, number in enumerate(numbers):
            # Another string than the model's, as one that was just decoded is.
            take(history, f"item-{number}", at, at)
        return history

    def unlike(history: History) -> list[str]:
        names = [item for item in history.items if item in own]
        return [one for one in names if one is not bundle.items[own[one] - 1]]

    ann, bob = seen(1, 2, 9), seen(2, 3)
    assert unlike(ann) and unlike(bob)
    model_inputs([ann, bob], bundle)
    assert unlike(ann) == unlike(bob) == []
    assert (ann.items, bob.items) == (("item-1", "item-2", "item-9"), ("item-2", "item-3"))
    assert (ann.unshared(), bob.unshared()) == (1, 0)
    # And another catalogue's take their place.
    other = model(index={f"item-{number}": number for number in (1, 2)}, max_length=LENGTH)
    model_inputs([ann], other)
    assert ann.items[0] is other.items[0]
    assert ann.unshared() == 1
