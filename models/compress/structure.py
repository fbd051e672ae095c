"""Structured pruning: the graph itself gets smaller, so memory and time do too.

What goes is chosen by first-order importance: the squared change of the training loss that removing
a group of weights would make, to first order, `(sum of weight x gradient)^2` over batches of
training windows (Molchanov et al., CVPR 2019; for heads Michel et al., NeurIPS 2019). Layers are
few: which to cut is measured. Fine-tuning afterwards (`finetune`) wins back most of the loss.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from models import losses, sasrec
from models.compress.draft import CompressionError, Context, Draft, graph_inputs
from models.dataset import sample, windows
from models.evaluate import accuracy, ranks
from models.export import export, read_params
from models.family import Params, Shape, param_score
from models.graph import plan_today

#: Windows whose gradients estimate importance.
_WINDOWS = 256
_QUERIES = 2000
#: Layers of a block that read the embedding, and that write to it.
_READERS, _WRITERS = ("qkv", "drive", "up"), ("out", "read", "down")


def heads(draft: Draft, context: Context, *, share: float = 0.5) -> Draft:
    """Remove a share of the attention heads, at least one kept in each block."""
    _check_share("heads", share)
    params, shape = read_params(draft.model)
    if not isinstance(shape, sasrec.Shape):
        raise CompressionError(
            f"heads: a {shape.title} has no attention heads: use neurons, layers or width"
        )
    width = shape.head_width
    scores = []
    for block, products in zip(params["blocks"], _products(params, shape, context), strict=True):
        count = block["out"]["w"].shape[0] // width
        # Rows of the output projection: one group of `head_width` for each head.
        by_row = products["out"]["w"].sum(axis=2)
        scores.append((by_row.reshape(len(by_row), count, width).sum(axis=2) ** 2).mean(axis=0))
    for block, kept in zip(params["blocks"], _keep(scores, share), strict=True):
        columns = (kept[:, None] * width + np.arange(width)).reshape(-1)
        inner = block["out"]["w"].shape[0]
        three = np.concatenate([columns + part * inner for part in range(3)])
        block["qkv"] = {"w": block["qkv"]["w"][:, three], "b": block["qkv"]["b"][three]}
        block["out"]["w"] = block["out"]["w"][columns]
    return rebuilt(draft, params, shape)


def neurons(draft: Draft, context: Context, *, share: float = 0.5) -> Draft:
    """Remove a share of the feed-forward neurons, at least four kept in each block."""
    _check_share("neurons", share)
    params, shape = read_params(draft.model)
    scores = [
        (products["down"]["w"].sum(axis=2) ** 2).mean(axis=0)
        for products in _products(params, shape, context)
    ]
    for block, kept in zip(params["blocks"], _keep(scores, share, least=4), strict=True):
        block["up"] = {"w": block["up"]["w"][:, kept], "b": block["up"]["b"][kept]}
        block["down"]["w"] = block["down"]["w"][kept]
    return rebuilt(draft, params, shape)


def width(draft: Draft, context: Context, *, to: int) -> Draft:
    """Keep `to` dimensions of the embeddings and of everything that is added to them."""
    params, shape = read_params(draft.model)
    if not 1 <= to <= shape.width:
        raise CompressionError(f"width:{to} must be between 1 and {shape.width}")
    products = _gradients(params, shape, context)
    total = products["items"].sum(axis=1)
    if "positions" in products:
        total = total + products["positions"].sum(axis=1)
    for block in products["blocks"]:
        for layer in (name for name in _READERS if name in block):
            total = total + block[layer]["w"].sum(axis=2)
        for layer in (name for name in _WRITERS if name in block):
            total = total + block[layer]["w"].sum(axis=1)
    kept = np.sort(np.argsort(-(total**2).mean(axis=0))[:to])
    for block in params["blocks"]:
        for norm in ("norm1", "norm2"):
            block[norm] = {key: value[kept] for key, value in block[norm].items()}
        for layer in (name for name in _READERS if name in block):
            block[layer]["w"] = block[layer]["w"][kept]
        for layer in (name for name in _WRITERS if name in block):
            block[layer] = {"w": block[layer]["w"][:, kept], "b": block[layer]["b"][kept]}
    params["norm"] = {key: value[kept] for key, value in params["norm"].items()}
    for table in (name for name in ("items", "positions") if name in params):
        params[table] = params[table][:, kept]
    return rebuilt(draft, params, replace(shape, width=to))


def layers(draft: Draft, context: Context, *, keep: int) -> Draft:
    """Keep so many blocks: those whose model is best on validation queries."""
    params, shape = read_params(draft.model)
    if not 1 <= keep <= shape.blocks:
        raise CompressionError(f"layers:{keep} must be between 1 and {shape.blocks}")
    queries = sample(context.need_validation("layers"), _QUERIES, context.seed)

    def cut(chosen: tuple[int, ...]) -> Params:
        return {**params, "blocks": [params["blocks"][place] for place in chosen]}

    smaller = replace(shape, blocks=keep)
    best = max(
        itertools.combinations(range(shape.blocks), keep),
        key=lambda chosen: (
            accuracy(ranks(param_score(cut(chosen), smaller), queries, length=shape.length)).ndcg
        ),
    )
    return rebuilt(draft, cut(best), smaller)


def history(draft: Draft, context: Context, *, length: int) -> Draft:
    """Read only the last `length` items of a history: attention costs the square of it.

    A recurrent model then starts from so many where it has no carry.
    """
    params, shape = read_params(draft.model)
    if not 1 <= length <= shape.length:
        raise CompressionError(f"history:{length} must be between 1 and {shape.length}")
    if "positions" in params:
        params["positions"] = params["positions"][-length:]
    return rebuilt(draft, params, replace(shape, length=length))


def rebuilt(draft: Draft, params: Params, shape: Shape) -> Draft:
    """The draft with the graph of other parameters; encodings of weights that remain are kept."""
    model = onnx.load_model_from_string(export(params, shape))
    names = {w.name for w in model.graph.initializer}
    manifest = msgspec.structs.replace(
        draft.manifest, max_length=shape.length, inputs=graph_inputs(model), any_length=True
    )
    plan = plan_today(draft.encodings)
    encodings = {name: kind for name, kind in plan.items() if name in names}
    return replace(draft, model=model, manifest=manifest, encodings=encodings)


def _products(params: Params, shape: Shape, context: Context) -> list[Params]:
    return list(_gradients(params, shape, context)["blocks"])


def _gradients(params: Params, shape: Shape, context: Context) -> Params:
    """Weight x gradient of the training loss, `[batches, ...]` for each weight."""
    every = windows(context.need_train("structured pruning"), shape.length)
    rng = np.random.default_rng(context.seed)
    chosen = every[rng.permutation(len(every))[:_WINDOWS]]
    as_jax = jax.tree.map(jnp.asarray, params)

    def products(window: jax.Array) -> Params:
        def loss(p: Params) -> jax.Array:
            total, count = losses.loss(p, window, shape, dropout=0.0, key=None)
            return total / jnp.maximum(count, 1)

        return cast(Params, jax.tree.map(jnp.multiply, as_jax, jax.grad(loss)(as_jax)))

    size = min(8, len(chosen))
    rows = np.resize(np.arange(len(chosen)), -(-len(chosen) // size) * size).reshape(-1, size)
    compiled = jax.jit(products)
    found = [jax.tree.map(np.asarray, compiled(jnp.asarray(chosen[r]))) for r in rows]
    return cast(Params, jax.tree.map(lambda *parts: np.stack(parts), *found))


def _keep(
    scores: list[NDArray[np.float32]], share: float, *, least: int = 1
) -> list[NDArray[np.int64]]:
    """Groups to keep in each block, ranked across blocks, in order."""
    every = np.sort(np.concatenate(scores))
    bound = every[min(int(len(every) * share), len(every) - 1)]
    kept = []
    for score in scores:
        best = np.argsort(-score)
        count = max(min(least, len(score)), int((score >= bound).sum()))
        kept.append(np.sort(best[:count]))
    return kept


def _check_share(method: str, share: float) -> None:
    if not 0.0 <= share < 1.0:
        raise CompressionError(f"{method}:{share} must be at least 0 and below 1")
