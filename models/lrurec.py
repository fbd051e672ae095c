"""LRURec in JAX: linear recurrent units for sequential recommendation (Yue et al., WSDM 2024).

Where SASRec attends to the whole history, a block here keeps a state of complex numbers that each
item moves on: `h <- lambda * h + gamma * (B x)`, read by `Re(C h)` (the linear recurrent unit,
Orvieto et al., ICML 2023). `lambda = exp(-exp(nu) + i exp(theta))` lies inside the unit circle
whatever training does, and `gamma = sqrt(1 - |lambda|^2)` keeps states of slow and fast channels
of one size. Training computes all states at once; serving moves the last one on by one item, in
time that does not depend on the history (docs/recurrent.md).

Departures from the paper's code: normalization before each sublayer and once at the end instead of
after each, as in our SASRec; `gamma` follows `lambda` instead of being learned; no output bias an
item. Complex weights are held as real ones, real part first: `drive` is B, `read` is C.
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

#: Moduli of the first `lambda`: a half-life of 3 to 70 items.
_SLOWEST, _FASTEST = 0.99, 0.8


@dataclass(frozen=True)
class Shape(family.Shape):
    """Sizes of an LRURec."""

    #: Complex numbers of a block's state, at first.
    channels: int = 64

    @staticmethod
    def fresh(item_count: int, *, length: int, width: int, blocks: int, channels: int) -> Shape:
        """The shape of a model to be trained."""
        return Shape(
            item_count, length, width, blocks, float(np.float32(math.sqrt(width))), channels
        )

    @property
    def title(self) -> str:
        """What people call this kind of model."""
        return "LRURec"

    def describe(self) -> str:
        """Kind and sizes in words, for a manifest."""
        return (
            f"LRURec, {self.blocks} blocks, {self.channels} channels, d={self.width},"
            f" history {self.length}"
        )

    def init(self, seed: int) -> Params:
        """Fresh parameters, float32."""
        rng = np.random.default_rng(seed)
        width, channels = self.width, self.channels

        def normal(*size: int) -> jax.Array:
            return jnp.asarray(rng.normal(0.0, 0.02, size), dtype=jnp.float32)

        def block() -> Params:
            # Uniform on the ring between the two moduli (Orvieto et al., lemma 3.2).
            squared = rng.uniform(_FASTEST**2, _SLOWEST**2, channels)
            turn = rng.uniform(0.0, 2.0 * math.pi, channels)
            return {
                "norm1": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
                "nu": jnp.asarray(np.log(-0.5 * np.log(squared)), dtype=jnp.float32),
                "theta": jnp.asarray(np.log(turn), dtype=jnp.float32),
                "drive": {"w": normal(width, 2 * channels), "b": jnp.zeros(2 * channels)},
                "read": {"w": normal(2 * channels, width), "b": jnp.zeros(width)},
                "norm2": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
                "up": {"w": normal(width, 4 * width), "b": jnp.zeros(4 * width)},
                "down": {"w": normal(4 * width, width), "b": jnp.zeros(width)},
            }

        return {
            "items": normal(self.item_count + 1, width),
            "blocks": [block() for _ in range(self.blocks)],
            "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        }

    def hidden(
        self, params: Params, history: jax.Array, *, dropout: float, key: jax.Array | None
    ) -> jax.Array:
        """States float32 `[batch, length, width]` for int histories `[batch, length]`.

        Padding is on the left, where a state is zero and stays so.
        """
        blocks = params["blocks"]
        drop = dropper(dropout, key, 1 + 2 * len(blocks))
        real = (history > 0)[..., None]
        x = drop(params["items"][history] * self.input_scale)
        for block in blocks:
            lambda_re, lambda_im, gamma = recurrence(block)
            driven = linear(norm(x, block["norm1"]), block["drive"])
            re, im = jnp.split(jnp.where(real, driven, 0.0), 2, axis=-1)
            states = _scan(re * gamma, im * gamma, lambda_re, lambda_im)
            x = x + drop(linear(jnp.concatenate(states, axis=-1), block["read"]))
            x = x + drop(feed_forward(x, block))
        return norm(x, params["norm"])


def recurrence(block: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Real and imaginary part of a block's `lambda`, and its `gamma`; float32 `[channels]`."""
    decay, turn = jnp.exp(block["nu"]), jnp.exp(block["theta"])
    modulus = jnp.exp(-decay)
    # 1 - modulus^2, with no digits lost near 1.
    gamma = jnp.sqrt(-jnp.expm1(-2.0 * decay))
    return modulus * jnp.cos(turn), modulus * jnp.sin(turn), gamma


def _scan(
    re: jax.Array, im: jax.Array, lambda_re: jax.Array, lambda_im: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """All states `h[t] = lambda * h[t - 1] + u[t]` of `[batch, length, channels]`, by doubling:
    after each round a state holds twice as many of the inputs before it (Hillis & Steele, 1986)."""
    length, step = re.shape[1], 1
    while step < length:
        shift = ((0, 0), (step, 0), (0, 0))
        past_re = jnp.pad(re[:, :-step], shift)
        past_im = jnp.pad(im[:, :-step], shift)
        re, im = (
            re + lambda_re * past_re - lambda_im * past_im,
            im + lambda_re * past_im + lambda_im * past_re,
        )
        lambda_re, lambda_im = lambda_re**2 - lambda_im**2, 2.0 * lambda_re * lambda_im
        step *= 2
    return re, im
