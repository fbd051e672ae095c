"""Layers that the models share, in JAX."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.family import Params


def linear(x: jax.Array, layer: Params) -> jax.Array:
    """`x @ w + b` along the last axis."""
    return x @ layer["w"] + layer["b"]


def norm(x: jax.Array, layer: Params) -> jax.Array:
    """Layer normalization along the last axis (Ba et al., 2016)."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-6) * layer["scale"] + layer["bias"]


def feed_forward(x: jax.Array, block: Params) -> jax.Array:
    """Normalize, widen, GELU, narrow: at each position alone."""
    y = jax.nn.gelu(linear(norm(x, block["norm2"]), block["up"]), approximate=False)
    return linear(y, block["down"])


def dropper(dropout: float, key: jax.Array | None, places: int) -> Callable[[jax.Array], jax.Array]:
    """A function that drops features at random, another key at each of `places` calls; one that
    does nothing without a key."""
    if key is None or dropout == 0.0:
        return lambda x: x
    keys = iter(jax.random.split(key, places))

    def drop(x: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(next(keys), 1.0 - dropout, x.shape)
        return jnp.where(kept, x / (1.0 - dropout), 0.0)

    return drop
