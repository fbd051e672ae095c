"""Training on, after a cut: from the data and from the model that was cut (Hinton et al., 2015).

Weights that pruning set to zero stay zero. Weights that will be quantized are trained through their
rounding, with the gradient passed straight through it (Bengio et al., 2013), so that the model
learns to live with it: quantization-aware training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.compress.draft import CompressionError, Context, Draft, Encoding
from models.compress.structure import rebuilt
from models.dataset import sample
from models.export import read_params
from models.family import Params
from models.graph import ITEM_TABLE, names_today, plan_today
from models.losses import Teacher
from models.sasrec_export import POSITIONS
from models.train import Recipe, fit

_QUERIES = 2000


def finetune(
    draft: Draft,
    context: Context,
    *,
    epochs: int = 3,
    rate: float = 1e-4,
    taught: float = 0.5,
    batch: int = 32,
    dropout: float = 0.1,
) -> Draft:
    """Train for up to `epochs`, keeping the best by validation.

    Args:
        rate: learning rate.
        taught: share of the loss that is the original model's distribution; 0 learns from the data
            alone.
        batch: windows of full length a step.
    """
    if not 0.0 <= taught <= 1.0:
        raise CompressionError(f"finetune: taught {taught} must be between 0 and 1")
    params, shape = read_params(draft.model)
    teacher = None
    if taught > 0.0 and draft.origin is not None:
        known, known_shape = read_params(draft.origin)
        teacher = Teacher(jax.tree.map(jnp.asarray, known), known_shape, taught)
    validation = context.validation
    fitted = fit(
        context.need_train("finetune"),
        shape,
        Recipe(
            dropout=dropout, learning_rate=rate, batch=batch, epochs=epochs, patience=3, warmup=20,
            validate_every=1, average=0.99, weight_decay=1e-3, seed=context.seed,
        ),
        validation=sample(validation, _QUERIES, context.seed) if validation is not None else None,
        start=params,
        teacher=teacher,
        project=_projection(params, draft.encodings),
        label="fine-tuning",
    )  # fmt: skip
    # What was trained through its rounding is rounded again, to the same, when it is stored.
    return rebuilt(draft, jax.tree.map(np.asarray, fitted.params), shape)


def _projection(params: Params, encodings: Mapping[str, Encoding]) -> Any:
    masks = jax.tree.map(lambda value: jnp.asarray(value != 0) if value.ndim == 2 else None, params,
                         is_leaf=lambda value: isinstance(value, np.ndarray))  # fmt: skip
    encodings = plan_today(encodings)
    sparse = any(
        mask is not None and not bool(mask[1:].all())
        for mask in jax.tree.leaves(masks, is_leaf=lambda m: m is None)
    )

    def use(name: str, value: jax.Array, mask: jax.Array | None) -> jax.Array:
        if sparse and mask is not None:
            value = value * mask
        encoding = encodings.get(name)
        if encoding is None:
            return value
        return value + jax.lax.stop_gradient(encoding.rounded(value, jnp) - value)

    def project(now: Params) -> Params:
        blocks = []
        for number, block in enumerate(now["blocks"]):
            other: Params = {**block}
            for part in (
                part for part, layer in block.items() if isinstance(layer, dict) and "w" in layer
            ):
                name = f"block{number}_{part}_weight"
                value, mask = block[part]["w"], masks["blocks"][number][part]["w"]
                if part == "qkv":
                    # Stored in pieces, each for itself.
                    own = [None] * 3 if mask is None else jnp.split(mask, 3, axis=1)
                    pieces = zip(names_today(name), jnp.split(value, 3, axis=1), own, strict=True)
                    value = jnp.concatenate([use(*piece) for piece in pieces], axis=1)
                else:
                    value = use(name, value, mask)
                other[part] = {**block[part], "w": value}
            blocks.append(other)
        tables = {
            table: use(name, now[table], masks[table])
            for table, name in (("items", ITEM_TABLE), ("positions", POSITIONS))
            if table in now
        }
        return {**now, **tables, "blocks": blocks}

    return project
