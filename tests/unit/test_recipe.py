"""A recipe is read whole or refused with words that say which step is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.compress.draft import CompressionError
from models.compress.methods import METHODS
from models.compress.recipe import parse


def test_steps_are_joined_by_plus_and_the_main_value_needs_no_name() -> None:
    steps = parse(
        "layers:1 + finetune:3,rate=1e-4 + prune:30%,scope=layer+int8:parts=table", METHODS
    )
    assert [dict(step.options) for step in steps] == [
        {"keep": 1},
        {"epochs": 3, "rate": 1e-4},
        {"sparsity": 0.3, "scope": "layer"},
        {"parts": "table"},
    ]
    assert steps[2].text == "prune:30%,scope=layer"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a step"),
        ("int8 + ", "is not a step"),
        ("int9", "no method 'int9'; there are blocks"),
        ("layers", "layers needs a value, layers:keep"),
        ("layers:one", "keep must be a int, not 'one'"),
        ("prune:0.5,depth=3", "has no option 'depth'; it has sparsity, scope"),
        ("prune:0.5,layer", "must be option=value"),
        ("half:0.5,parts", "must be option=value"),
    ],
)
def test_each_mistake_has_its_own_words(text: str, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        parse(text, METHODS)


@given(st.text(max_size=40))
def test_no_text_crashes_the_reader(text: str) -> None:
    try:
        parse(text, METHODS)
    except CompressionError:
        return
