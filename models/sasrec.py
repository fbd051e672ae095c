"""SASRec in JAX: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018).

Departures, all usual today: normalization before each sublayer, GELU, and cross-entropy over the
whole catalogue at every position instead of one sampled negative (models/losses.py).

Sizes of a block are read off its weights, since structured pruning leaves each block its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from models import family
from models.family import Params
from models.layers import dropper, feed_forward, linear, norm


@dataclass(frozen=True)
class Shape(family.Shape):
    """Sizes of a SASRec."""

    #: Features of one attention head.
    head_width: int = 32

    @staticmethod
    def fresh(item_count: int, *, length: int, width: int, blocks: int, heads: int) -> Shape:
        """The shape of a model to be trained."""
        return Shape(
            item_count, length, width, blocks, float(np.float32(math.sqrt(width))), width // heads
        )

    @property
    def title(self) -> str:
        """What people call this kind of model."""
        return "SASRec"

    def describe(self) -> str:
        """Kind and sizes in words, for a manifest."""
        return (
            f"SASRec, {self.blocks} blocks, {self.width // self.head_width} heads, d={self.width},"
            f" history {self.length}"
        )

    def init(self, seed: int) -> Params:
        """Fresh parameters, float32."""
        return init(self, seed)

    def hidden(
        self, params: Params, history: jax.Array, *, dropout: float, key: jax.Array | None
    ) -> jax.Array:
        """States float32 `[batch, length, width]`; see `hidden`."""
        return hidden(params, history, self, dropout=dropout, key=key)


def init(shape: Shape, seed: int) -> Params:
    """Fresh parameters, float32."""
    rng = np.random.default_rng(seed)
    width = shape.width

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.normal(0.0, 0.02, size), dtype=jnp.float32)

    def block() -> Params:
        return {
            "norm1": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            "qkv": {"w": normal(width, 3 * width), "b": jnp.zeros(3 * width)},
            "out": {"w": normal(width, width), "b": jnp.zeros(width)},
            "norm2": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            "up": {"w": normal(width, 4 * width), "b": jnp.zeros(4 * width)},
            "down": {"w": normal(4 * width, width), "b": jnp.zeros(width)},
        }

    return {
        "items": normal(shape.item_count + 1, width),
        "positions": normal(shape.length, width),
        "blocks": [block() for _ in range(shape.blocks)],
        "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
    }


def hidden(
    params: Params, history: jax.Array, shape: Shape, *, dropout: float, key: jax.Array | None
) -> jax.Array:
    """States float32 `[batch, length, width]` for int histories `[batch, length]`.

    `length` may be shorter than the model's: positions count from the end.
    """
    blocks = params["blocks"]
    drop = dropper(dropout, key, 1 + 2 * len(blocks))
    batch, length = history.shape
    head_width = shape.head_width
    real = history > 0
    x = params["items"][history] * shape.input_scale + params["positions"][-length:]
    x = drop(x)
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    blocked = jnp.where(causal[None, None] & real[:, None, None, :], 0.0, -1e9)
    for block in blocks:
        y = linear(norm(x, block["norm1"]), block["qkv"])
        heads = y.shape[-1] // (3 * head_width)
        q, k, v = (
            part.reshape(batch, length, heads, head_width).transpose(0, 2, 1, 3)
            for part in jnp.split(y, 3, axis=-1)
        )
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(head_width) + blocked)
        mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, length, heads * head_width)
        x = x + drop(linear(mixed, block["out"]))
        x = x + drop(feed_forward(x, block))
    return norm(x, params["norm"])
