"""The training loss of every kind of model: cross-entropy over the whole catalogue.

The loss of one sampled negative makes a model overconfident (gSASRec, Petrov & Macdonald, RecSys
2023); at a few thousand items the full one is affordable, and with a few thousand shared negatives
it comes close (Klenitskiy & Vasilev, RecSys 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.family import Params, Shape

#: Positions whose scores over the catalogue are held at once: more would leave the cache.
_CHUNK = 400


@dataclass(frozen=True)
class Teacher:
    """A trained model whose distribution over the catalogue a smaller one should match."""

    params: Params
    shape: Shape
    #: Share of the loss that is the teacher's, in 0..1; the rest is the data's.
    weight: float = 0.7


def loss(
    params: Params,
    window: jax.Array,
    shape: Shape,
    *,
    dropout: float,
    key: jax.Array | None,
    negatives: int = 0,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy over the targets of int windows `[batch, length + 1]`, and their count.

    Args:
        negatives: score this many items, drawn uniformly and shared by the whole batch, beside
            each target instead of the catalogue; 0 takes the catalogue.
        teacher: also learn its distribution (Hinton et al., 2015); needs the whole catalogue.
    """
    history, target = window[:, :-1], window[:, 1:]
    states = shape.hidden(params, history, dropout=dropout, key=key)
    counted = ((history > 0) & (target > 0)).reshape(-1).astype(jnp.float32)
    flat = states.reshape(-1, states.shape[-1])
    wanted = jnp.maximum(target.reshape(-1), 1)
    if negatives and key is not None:
        total = _sampled(flat, params["items"], wanted, counted, negatives, key)
    elif teacher is not None:
        taught = teacher.shape.hidden(teacher.params, history, dropout=0.0, key=None)
        total = _cross_entropy(
            flat, params["items"][1:], wanted - 1, counted, teacher.weight,
            taught.reshape(-1, taught.shape[-1]), teacher.params["items"][1:],
        )  # fmt: skip
    else:
        total = _cross_entropy(flat, params["items"][1:], wanted - 1, counted, 0.0, None, None)
    return total, counted.sum()


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    states: jax.Array,
    table: jax.Array,
    target: jax.Array,
    counted: jax.Array,
    taught_weight: float,
    taught: jax.Array | None,
    taught_table: jax.Array | None,
) -> jax.Array:
    return _in_chunks(states, table, target, counted, taught_weight, taught, taught_table)[0]


def _in_chunks(
    states: jax.Array,
    table: jax.Array,
    target: jax.Array,
    counted: jax.Array,
    taught_weight: float,
    taught: jax.Array | None,
    taught_table: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss with its gradient in one pass: a chunk's scores are never held for later."""
    count, width = states.shape
    chunk = next(size for size in range(min(_CHUNK, count), 0, -1) if count % size == 0)

    def one(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        state, wanted, weight = part[:3]
        log_p = jax.nn.log_softmax(state @ table.T)
        rows = jnp.arange(len(state))
        # What the probabilities should be: the data's answer, mixed with the teacher's.
        if taught_table is not None:
            answer = taught_weight * jax.nn.softmax(part[3] @ taught_table.T)
        else:
            answer = jnp.zeros_like(log_p)
        answer = answer.at[rows, wanted].add(1.0 - taught_weight)
        value = -jnp.sum(answer * log_p, axis=-1) * weight
        gradient = (jnp.exp(log_p) - answer) * weight[:, None]
        return value.sum(), gradient @ table, gradient.T @ state

    parts = [states.reshape(-1, chunk, width), target.reshape(-1, chunk)]
    parts.append(counted.reshape(-1, chunk))
    if taught is not None:
        parts.append(taught.reshape(-1, chunk, taught.shape[-1]))
    values, by_state, by_table = jax.lax.map(one, tuple(parts))
    return values.sum(), (by_state.reshape(states.shape), by_table.sum(0))


def _forward(*arguments: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _in_chunks(*arguments)


def _backward(
    _weight: float, gradients: tuple[jax.Array, jax.Array], factor: jax.Array
) -> tuple[Any, ...]:
    return gradients[0] * factor, gradients[1] * factor, None, None, None, None


_cross_entropy.defvjp(_forward, _backward)


def _sampled(
    states: jax.Array,
    table: jax.Array,
    target: jax.Array,
    counted: jax.Array,
    negatives: int,
    key: jax.Array,
) -> jax.Array:
    """Cross-entropy against shared uniform negatives, corrected for how often they are drawn."""
    item_count = table.shape[0] - 1
    drawn = jax.random.randint(jax.random.fold_in(key, 1), (negatives,), 1, item_count + 1)
    against = states @ table[drawn].T + math.log(max(item_count - 1, 1) / negatives)
    against = jnp.where(drawn[None, :] == target[:, None], -1e9, against)
    own = jnp.sum(states * table[target], axis=-1)
    everything = jnp.logaddexp(own, jax.nn.logsumexp(against, axis=-1))
    return jnp.sum((everything - own) * counted)
