"""SASRec in JAX: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018).

Departures, all usual today: normalization before each sublayer, GELU, and cross-entropy over the
whole catalogue at every position instead of one sampled negative. The sampled loss makes the model
overconfident (gSASRec, Petrov & Macdonald, RecSys 2023); at a few thousand items the full one is
affordable and needs no correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Size of the model."""

    item_count: int
    length: int = 50
    width: int = 64
    blocks: int = 2
    heads: int = 2


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
    """States float32 `[batch, length, width]` for int histories `[batch, length]`."""
    keys = iter(jax.random.split(key, 1 + 2 * shape.blocks)) if key is not None else None

    def drop(x: jax.Array) -> jax.Array:
        if keys is None or dropout == 0.0:
            return x
        kept = jax.random.bernoulli(next(keys), 1.0 - dropout, x.shape)
        return jnp.where(kept, x / (1.0 - dropout), 0.0)

    batch, length = history.shape
    heads, head_width = shape.heads, shape.width // shape.heads
    real = history > 0
    x = params["items"][history] * jnp.sqrt(float(shape.width)) + params["positions"]
    x = drop(x)
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    blocked = jnp.where(causal[None, None] & real[:, None, None, :], 0.0, -1e9)
    for block in params["blocks"]:
        y = _linear(_norm(x, block["norm1"]), block["qkv"])
        q, k, v = (
            part.reshape(batch, length, heads, head_width).transpose(0, 2, 1, 3)
            for part in jnp.split(y, 3, axis=-1)
        )
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / jnp.sqrt(float(head_width)) + blocked)
        mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, length, shape.width)
        x = x + drop(_linear(mixed, block["out"]))
        y = jax.nn.gelu(_linear(_norm(x, block["norm2"]), block["up"]), approximate=False)
        x = x + drop(_linear(y, block["down"]))
    return _norm(x, params["norm"])


@partial(jax.jit, static_argnames="shape")
def scores(params: Params, history: jax.Array, shape: Shape) -> jax.Array:
    """Scores float32 `[batch, item_count]` of items 1.. after each history."""
    last = hidden(params, history, shape, dropout=0.0, key=None)[:, -1]
    return last @ params["items"][1:].T


def loss(
    params: Params, window: jax.Array, shape: Shape, *, dropout: float, key: jax.Array
) -> jax.Array:
    """Mean cross-entropy over the targets of int windows `[batch, length + 1]`."""
    history, target = window[:, :-1], window[:, 1:]
    states = hidden(params, history, shape, dropout=dropout, key=key)
    logits = states @ params["items"][1:].T
    counted = (history > 0) & (target > 0)
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, jnp.maximum(target - 1, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted, picked, 0.0)) / jnp.maximum(counted.sum(), 1)


def _linear(x: jax.Array, layer: Params) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def _norm(x: jax.Array, layer: Params) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-6) * layer["scale"] + layer["bias"]
