"""Ranking in two stages gives what TopK gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.compress.draft import CompressionError
from tests.unit.drafts import draft_of, lists, made


@settings(max_examples=15, deadline=None)
@given(count=st.integers(3, 70), chunk=st.integers(2, 40), data=st.data())
def test_lists_are_the_same_at_any_size(count: int, chunk: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, count))
    plain, staged = lists(draft_of(count), k), lists(made(f"topk:{chunk}", count), k)
    np.testing.assert_array_equal(staged.scores, plain.scores)
    np.testing.assert_array_equal(staged.items, plain.items)


@pytest.mark.parametrize("recipe", ["int8 + topk:8", "topk:8 + int8", "int4 + topk:8"])
def test_it_goes_with_quantization_in_any_order(recipe: str) -> None:
    plain = lists(made(recipe.replace("topk:8", "").strip(" +"), 61), 20)
    staged = lists(made(recipe, 61), 20)
    np.testing.assert_array_equal(staged.items, plain.items)
    np.testing.assert_allclose(staged.scores, plain.scores, atol=1e-6)


def test_chunks_of_one_are_refused() -> None:
    with pytest.raises(CompressionError, match="at least 2"):
        made("topk:1", 10)
