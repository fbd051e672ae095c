"""Small models of any size for tests of methods for large catalogues."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from models import sasrec
from models.compress.draft import Context, Draft
from models.compress.methods import METHODS
from models.compress.recipe import apply, parse
from models.compress.trial import in_memory
from models.dataset import Queries
from models.export import export
from models.graph import ITEM_TABLE
from models.sasrec import Shape
from worker.manifest import Manifest

LENGTH, WIDTH = 6, 16


@cache
def draft_of(count: int) -> Draft:
    """A model of `count` items with random weights."""
    shape = Shape.fresh(count, length=LENGTH, width=WIDTH, blocks=1, heads=2)
    params = sasrec.init(shape, 3)
    params["items"] = np.random.default_rng(4).normal(size=(count + 1, WIDTH)).astype(np.float32)
    manifest = Manifest(
        format_version=1, name="posts", version="v-fp32", surface="posts",
        created_at="2026-11-24T10:00:00+00:00", precision="fp32", recipe="random",
        max_length=LENGTH, item_count=count, inputs=[], outputs=[], files={},
    )  # fmt: skip
    model = onnx.load_model_from_string(export(params, shape))
    return Draft(model, tuple(f"i{n}" for n in range(count)), manifest, origin=model)


def histories(count: int, users: int = 5) -> NDArray[np.int64]:
    """int64 `[users, LENGTH]`, some padded on the left."""
    tensor = np.random.default_rng(5).integers(1, count + 1, (users, LENGTH))
    tensor[::2, :3] = 0
    return tensor


def context_of(count: int) -> Context:
    """A context with validation queries."""
    found = [row[row > 0] for row in histories(count, 40)]
    return Context(validation=Queries(found, np.ones(len(found), dtype=np.int64)))


def made(recipe: str, count: int) -> Draft:
    """A model of `count` items after a recipe."""
    return apply(parse(recipe, METHODS), draft_of(count), context_of(count))


class Lists(NamedTuple):
    """What a graph gives, and the states that it scored by."""

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    states: NDArray[np.float32]


def lists(draft: Draft, k: int, users: int = 5) -> Lists:
    """The `k` best items for `histories`."""
    return Lists(*in_memory(draft).score_with_states(histories(len(draft.items), users), k))


def rounded_table(draft: Draft) -> NDArray[np.float32]:
    """The item table as the draft's encoding keeps it."""
    table = draft.value(ITEM_TABLE)
    encoding = draft.encodings.get(ITEM_TABLE)
    return table if encoding is None else np.asarray(encoding.rounded(table, np))


def assert_scores_are_of(found: Lists, table: NDArray[np.float32], tolerance: float) -> None:
    """Every score is the state's product with the item's row."""
    wanted = np.take_along_axis(found.states @ table.T, found.items, axis=1)
    np.testing.assert_allclose(found.scores, wanted, atol=tolerance, rtol=0)
