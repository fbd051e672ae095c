"""Train SASRec with early stopping on validation NDCG@10."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray
from tqdm import tqdm

from models import sasrec
from models.dataset import Queries, windows
from models.evaluate import accuracy, ranks
from models.sasrec import Params, Shape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    dropout: float = 0.4
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 128
    epochs: int = 120
    #: Epochs without a better validation NDCG@10 before stopping; counted in validations.
    patience: int = 8
    validate_every: int = 3
    seed: int = 7


def fit(
    sequences: Sequence[NDArray[np.int64]],
    shape: Shape,
    recipe: Recipe,
    *,
    validation: Queries | None,
) -> tuple[Params, int]:
    """Train on `sequences` of model indexes.

    Args:
        validation: queries to stop early by; None trains for `recipe.epochs`.

    Returns:
        The best parameters and the number of epochs that gave them.
    """
    rng = np.random.default_rng(recipe.seed)
    params = sasrec.init(shape, recipe.seed)
    optimizer = optax.adamw(recipe.learning_rate, weight_decay=recipe.weight_decay)
    state = optimizer.init(params)

    @jax.jit
    def step(
        params: Params, state: optax.OptState, window: jax.Array, key: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(sasrec.loss)(
            params, window, shape, dropout=recipe.dropout, key=key
        )
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    data = windows(sequences, shape.length)
    key = jax.random.key(recipe.seed)
    best, best_ndcg, best_epoch, worse = params, -1.0, recipe.epochs, 0
    with tqdm(range(1, recipe.epochs + 1), desc="training", unit="epoch") as progress:
        for epoch in progress:
            order = rng.permutation(len(data))
            # The last, smaller batch is filled up from the front: one size, compiled once.
            order = np.resize(order, -(-len(order) // recipe.batch) * recipe.batch)
            total = 0.0
            for rows in order.reshape(-1, recipe.batch):
                key, own = jax.random.split(key)
                params, state, value = step(params, state, jnp.asarray(data[rows]), own)
                total += float(value)
            if validation is None or epoch % recipe.validate_every:
                progress.set_postfix(loss=f"{total * recipe.batch / len(order):.3f}")
                continue
            now = params
            ndcg = accuracy(
                ranks(
                    lambda history, now=now: np.asarray(  # type: ignore[misc]
                        sasrec.scores(now, jnp.asarray(history), shape)
                    ),
                    validation,
                    length=shape.length,
                )
            ).ndcg
            progress.set_postfix(
                loss=f"{total * recipe.batch / len(order):.3f}", ndcg=f"{ndcg:.4f}"
            )
            log.info("validated epoch=%d ndcg=%.4f", epoch, ndcg)
            if ndcg > best_ndcg:
                best, best_ndcg, best_epoch, worse = params, ndcg, epoch, 0
            else:
                worse += 1
                if worse >= recipe.patience:
                    break
    return (best, best_epoch) if validation is not None else (params, recipe.epochs)
