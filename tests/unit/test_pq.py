"""A product-quantized table gives the scores of the table that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from models.compress.draft import CompressionError, lower
from models.compress.kmeans import bounded, kmeans, nearest
from models.compress.pq import Pq
from models.graph import ITEM_TABLE
from tests.unit.drafts import (
    WIDTH,
    assert_scores_are_of,
    draft_of,
    lists,
    made,
    rounded_table,
)

COUNT = 90
PQ = "pq:codes=4,centroids=16"


@pytest.mark.parametrize("rotate", ["yes", "no"])
@pytest.mark.parametrize(("score", "tolerance"), [("float", 1e-5), ("lookup", 1e-5), ("int8", 0.1)])
def test_scores_are_those_of_the_rounded_table(score: str, tolerance: float, rotate: str) -> None:
    draft = made(f"{PQ},score={score},rotate={rotate}", COUNT)
    found = lists(draft, COUNT)
    assert_scores_are_of(found, rounded_table(draft), tolerance)
    plain = lists(draft_of(COUNT).with_values({ITEM_TABLE: rounded_table(draft)}), COUNT)
    np.testing.assert_allclose(found.states, plain.states, atol=1e-5)


def test_the_stored_parts_put_together_are_the_rounded_table() -> None:
    draft = made(f"{PQ},rotate=no", COUNT)
    stored = {
        w.name: numpy_helper.to_array(w)
        for w in onnx.load_model_from_string(lower(draft)).graph.initializer
    }
    codes = stored["item_table_codes"].astype(np.int64) + np.arange(4) * 16
    rows = stored["item_table_centroids"][codes].reshape(COUNT + 1, WIDTH)
    assert ITEM_TABLE not in stored
    np.testing.assert_array_equal(
        rows.astype(np.float32) * stored["item_table_scale"], rounded_table(draft)
    )


def test_jax_rounds_as_numpy_does() -> None:
    draft = made("pq:codes=2,centroids=16", COUNT)
    encoding = draft.encodings[ITEM_TABLE]
    other = jax.jit(lambda weight: encoding.rounded(weight, jnp))(draft.value(ITEM_TABLE))
    np.testing.assert_allclose(other, rounded_table(draft), atol=1e-5)


def test_as_many_centroids_as_items_lose_only_the_rounding_to_int8() -> None:
    draft = made("pq:codes=2,centroids=64,popularity=0", 50)
    error = np.abs(rounded_table(draft) - draft.value(ITEM_TABLE))
    assert error.mean() < 0.05


def test_a_rotation_brings_the_table_nearer() -> None:
    def loss(rotate: str) -> float:
        draft = made(f"pq:codes=4,centroids=8,popularity=0,rotate={rotate}", 400)
        return float(((rounded_table(draft) - draft.value(ITEM_TABLE)) ** 2).mean())

    assert loss("yes") < loss("no")


def test_popular_items_keep_more() -> None:
    def loss(popularity: str) -> float:
        draft = made(f"pq:codes=4,centroids=8,popularity={popularity}", 400)
        return float(((rounded_table(draft) - draft.value(ITEM_TABLE))[1:41] ** 2).mean())

    assert loss("1.0") < loss("0.0")


def test_it_goes_with_pruning_before_and_int8_layers_after() -> None:
    draft = made(f"prune:0.3 + {PQ} + int8:parts=linear + topk:chunk=8", COUNT)
    found = lists(draft, 20)
    assert draft.precision == "int8+pq4"
    assert_scores_are_of(found, rounded_table(draft), 0.1)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("pq:codes=3", "must divide the width"),
        ("pq:centroids=300", "centroids 300"),
        ("pq:score=fast", "lookup"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: str, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        made(recipe, COUNT)


def test_a_code_that_no_row_has_leaves_the_others_what_they_are() -> None:
    codes = np.array([[1], [3], [3]], dtype=np.uint8)
    encoding = Pq(codes, 5, np.ones(3, dtype=np.float32), None, "float")
    table = np.array([[1, 0], [0, 1], [0, 3]], dtype=np.float32)
    wanted = np.array([[1, 0], [0, 2], [0, 2]])
    np.testing.assert_allclose(encoding.rounded(table, np), wanted, atol=0.01)
    assert encoding.codebook(table).integers.shape == (1, 5, 2)


def test_codes_of_another_table_are_refused() -> None:
    draft = made(PQ, COUNT)
    encoding = draft.encodings[ITEM_TABLE]
    assert isinstance(encoding, Pq)
    with pytest.raises(CompressionError, match="put `pq` after"):
        encoding.rounded(draft.value(ITEM_TABLE)[:50], np)


def test_kmeans_finds_clusters_that_lie_apart() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [9, 0], [0, 9]], dtype=np.float32)
    points = np.repeat(centres, 30, axis=0) + rng.normal(0, 0.1, (90, 2)).astype(np.float32)
    found = kmeans(points, 3, start=points[[0, 30, 60]])
    np.testing.assert_allclose(found, centres, atol=0.1)
    assert nearest(points, found).tolist() == [0] * 30 + [1] * 30 + [2] * 30


def test_bounded_clusters_keep_the_nearest_and_pass_the_others_on() -> None:
    points = np.array([[0.0], [0.1], [0.2], [5.0]], dtype=np.float32)
    label = bounded(points, np.array([[0.0], [4.0]], dtype=np.float32), capacity=2)
    assert label.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="cannot hold"):
        bounded(points, points[:1], capacity=3)
