"""What every kind of model has in common: sizes, and how to get from histories to scores.

A kind of model (SASRec, LRURec) is a subclass of `Shape`. Training, structured compression and
evaluation know no more of it than this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

#: Weights by name: `items` `[1 + item_count, width]`, `blocks`, and what else the kind has.
Params = dict[str, Any]


@dataclass(frozen=True)
class Shape(ABC):
    """What the weights alone do not say. Hashable: a model is compiled once for each."""

    item_count: int
    #: Items of a history that the model reads.
    length: int = 50
    width: int = 64
    blocks: int = 2
    #: Factor of looked-up item vectors, the square root of the width that the model began with.
    input_scale: float = 8.0

    @property
    @abstractmethod
    def title(self) -> str:
        """What people call this kind of model."""

    @abstractmethod
    def describe(self) -> str:
        """Kind and sizes in words, for a manifest."""

    @abstractmethod
    def init(self, seed: int) -> Params:
        """Fresh parameters, float32."""

    @abstractmethod
    def hidden(
        self, params: Params, history: jax.Array, *, dropout: float, key: jax.Array | None
    ) -> jax.Array:
        """States float32 `[batch, length, width]` for int histories `[batch, length]`, padded with
        0 on the left. `length` may be any up to the model's."""


@partial(jax.jit, static_argnames="shape")
def scores(params: Params, history: jax.Array, shape: Shape) -> jax.Array:
    """Scores float32 `[batch, item_count]` of items 1.. after each history."""
    last = shape.hidden(params, history, dropout=0.0, key=None)[:, -1]
    return last @ params["items"][1:].T


def param_score(params: Params, shape: Shape) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """Scores of the JAX model, for evaluate.ranks."""
    return lambda history: np.asarray(scores(params, jnp.asarray(history), shape))
