"""Recipes: `prune:0.5 + thresholds:8 + leaves:8`, applied from left to right.

| step | amount | for |
|---|---|---|
| `pack` | | all; comes first in every recipe, changes no score |
| `prune` | share | trees dropped; features of a linear model; support vectors |
| `collapse` | share | splits of trees |
| `thresholds` | bits | levels per feature |
| `leaves` | bits | levels of leaf values |
| `coefficients` | 8 or 4 | bits of a linear model's coefficients |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from models.rankers.compact import compact
from models.rankers.errors import RecipeError
from models.rankers.forest import on_forests
from models.rankers.graph import LINEAR_OPS, SVM_OPS, TREE_OPS, ranker_nodes
from models.rankers.linear import prune_features, quantize_coefficients
from models.rankers.svm import prune_vectors
from models.rankers.trees import (
    collapse_splits,
    prune_trees,
    quantize_leaves,
    quantize_thresholds,
)

#: Calibration beyond this many rows says little more, and costs time.
MAX_ROWS = 10_000

Transformation = Callable[[ModelProto, NDArray[Any]], ModelProto]


@dataclass(frozen=True)
class Step:
    """One method and how much of it."""

    method: str
    amount: float


@dataclass(frozen=True)
class Recipe:
    """Steps in order."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " + ".join(
            step.method if step.method == "pack" else f"{step.method}:{step.amount:g}"
            for step in self.steps
        )

    @property
    def file_name(self) -> str:
        """A file name for the model that the recipe makes."""
        return str(self).replace(" + ", "+").replace(":", "-") + ".onnx"


PACK = Recipe((Step("pack", 0.0),))

_SHARES = ("prune", "collapse")
_BITS = ("thresholds", "leaves")


def parse_recipe(text: str) -> Recipe:
    """The recipe that `text` spells.

    Raises:
        RecipeError: it cannot be read, or an amount is out of range.
    """
    return Recipe(tuple(_parse_step(part.strip()) for part in text.split("+")))


def _parse_step(text: str) -> Step:
    method, _, number = text.partition(":")
    if method == "pack" and not number:
        return Step(method, 0.0)
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    if method in _SHARES and 0 <= amount < 1:
        return Step(method, amount)
    if method in _BITS and 1 <= amount <= 16 and amount.is_integer():
        return Step(method, amount)
    if method == "coefficients" and amount in (4, 8):
        return Step(method, amount)
    raise RecipeError(
        f"recipe step {text!r} is not understood: steps are pack, prune:SHARE, collapse:SHARE"
        " (0 to below 1), thresholds:BITS, leaves:BITS (1 to 16), coefficients:8 or :4, joined"
        " by +"
    )


def apply_recipe(model: ModelProto, recipe: Recipe, rows: NDArray[Any]) -> ModelProto:
    """The model that the recipe makes of `model`, with calibration rows `[rows, features]`.

    Raises:
        RecipeError: a step does not apply to this kind of model.
        RankerError: the data does not fit the model.
    """
    return apply_recipes(model, [recipe], rows)[0]


def apply_recipes(
    model: ModelProto, recipes: Sequence[Recipe], rows: NDArray[Any]
) -> list[ModelProto]:
    """`apply_recipe` for each of `recipes`, in less time."""
    if len(rows) > MAX_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, MAX_ROWS).astype(int)]
    packed = compact(model, rows)
    made = []
    for recipe in recipes:
        changed = packed
        for step in recipe.steps:
            if step.method != "pack" or changed is not packed:
                changed = transformation(changed, step)(changed, rows)
        made.append(changed)
    return made


def transformation(model: ModelProto, step: Step) -> Transformation:
    """What `step` does to a model like this one.

    Raises:
        RecipeError: it cannot be done to this kind of model.
    """
    share, bits = step.amount, int(step.amount)
    if step.method == "pack":
        return compact
    if ranker_nodes(model, TREE_OPS):
        trees = {
            "prune": partial(prune_trees, share=share),
            "collapse": partial(collapse_splits, share=share),
            "thresholds": partial(quantize_thresholds, bits=bits),
            "leaves": partial(quantize_leaves, bits=bits),
        }
        if step.method in trees:
            return partial(on_forests, step=trees[step.method])
    if ranker_nodes(model, LINEAR_OPS):
        if step.method == "prune":
            return partial(prune_features, share=share)
        if step.method == "coefficients":
            return partial(quantize_coefficients, bits=bits)
    if ranker_nodes(model, SVM_OPS) and step.method == "prune":
        return partial(prune_vectors, share=share)
    kinds = ", ".join(
        sorted({n.op_type for n in ranker_nodes(model, TREE_OPS + LINEAR_OPS + SVM_OPS)})
    )
    raise RecipeError(
        f"{step.method} does not apply to this model ({kinds or 'no ranker left to change'}):"
        " trees take prune, collapse, thresholds, leaves; linear models prune, then coefficients;"
        " support vector machines prune"
    )
