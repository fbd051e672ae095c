"""Train a bundle's text encoder: from a text's hashed n-grams to the model's item vectors.

Ridge regression on the items that the model knows (content to latent factors, as van den Oord et
al., NIPS 2013, do it with audio), so that a text of a new item lands where the model would have put
it. Grams weigh their inverse document frequency, and a text's weights have length 1: what it says
in many grams that training never saw draws its vector to the mean of all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import Ridge

from worker.bundle import Bundle
from worker.errors import StreamrecError
from worker.text import SCHEME, TextSpec, padded_grams

#: Least share of the scores' variance that `state . vector` must explain.
LINEAR_R2 = 0.98
#: Items with text and events below which nothing can be learned, let alone held out.
MIN_ITEMS = 50


class TextError(StreamrecError):
    """A text encoder cannot be trained for this bundle or from these events."""

    exit_code = 65  # EX_DATAERR


@dataclass(frozen=True)
class TextRecipe:
    """How to train."""

    #: Rows of the table of grams. More collide less and take more room.
    buckets: int = 8192
    max_grams: int = 512
    #: Ridge penalties to choose from by held-out items.
    penalties: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    #: Parts that items are divided into; each is predicted by a fit on the others.
    folds: int = 10
    seed: int = 7

    @property
    def spec(self) -> TextSpec:
        """The part that the worker has to know."""
        return TextSpec(SCHEME, self.buckets, self.max_grams)


@dataclass(frozen=True)
class Encoder:
    """A fitted encoder: `base + gain * sum(rows of the grams) / sqrt(sum(idf^2 of the grams))`.

    `rows`: float32 `[buckets + 1, width]`; `idf`: float32 `[buckets + 1]`; `base`: float32
    `[width]`, the mean item. Row 0 is padding.
    """

    spec: TextSpec
    rows: NDArray[np.float32]
    idf: NDArray[np.float32]
    base: NDArray[np.float32]
    gain: float = 1.0

    def with_gain(self, gain: float) -> Encoder:
        """The same, further from or nearer to the mean item."""
        return replace(self, gain=gain)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors float32 `[n, width]`; what `text.onnx` computes, in numpy."""
        found = padded_grams(texts, self.spec)
        length = np.sqrt(np.maximum((self.idf[found] ** 2).sum(axis=1, keepdims=True), 1e-12))
        # A row at a time: all rows of many texts at once would fill memory.
        summed = np.stack([self.rows[row].sum(axis=0) for row in found])
        vectors: NDArray[np.float32] = self.base + np.float32(self.gain) * summed / length
        return vectors


@dataclass(frozen=True)
class Fit:
    """An encoder, and what it would have said of the items that it was fitted on.

    `held_out`: float32 `[items, width]`, each item's vector by a fit that did not see its text;
    `fold`: int64 `[items]`, which fit that was; `r2`: share of the variance of unseen vectors that
    is explained, weighted as in the fit.
    """

    encoder: Encoder
    held_out: NDArray[np.float32]
    fold: NDArray[np.int64]
    penalty: float
    r2: float


def item_vectors(bundle: Bundle, histories: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors float32 `[item_count, width]` with which `state . vector` gives the bundle's scores.

    Found by least squares from states and scores, so that it does not matter how the graph stores
    its table: float, int8, product-quantized or pruned.

    Args:
        histories: int64 `[queries, length]`; several times the width, and varied.

    Raises:
        TextError: the scores are no linear function of the state, or not all items get one.
    """
    count = bundle.manifest.item_count
    # Every fourth batch judges what the others gave.
    normal: NDArray[np.float64] | None = None
    table: NDArray[np.float64] | None = None
    judged: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    for number, start in enumerate(range(0, len(histories), 32)):
        items, values, states = bundle.score_with_states(histories[start : start + 32], count)
        if items.shape[1] < count:
            raise TextError(
                f"{bundle.path} gives {items.shape[1]} of its {count} items a score: train the"
                " text encoder for the exact bundle that it was made from"
            )
        scores = np.empty_like(values)
        np.put_along_axis(scores, items - 1, values, axis=1)
        if number % 4 == 3:
            judged.append((states, scores))
            continue
        wide = states.astype(np.float64)
        if normal is None or table is None:
            normal, table = np.zeros((wide.shape[1],) * 2), np.zeros((wide.shape[1], count))
        normal += wide.T @ wide
        table += wide.T @ scores
    if normal is None or table is None or not judged:
        raise TextError(f"{len(histories)} histories are too few: give a source with more events")
    tiny = 1e-6 * float(np.trace(normal)) / len(normal)
    vectors = np.linalg.solve(normal + tiny * np.eye(len(normal)), table).T.astype(np.float32)
    states, scores = (np.concatenate(part) for part in zip(*judged, strict=True))
    missed = float(np.square(states @ vectors.T - scores).sum())
    r2 = 1.0 - missed / max(float(np.square(scores - scores.mean()).sum()), 1e-12)
    if r2 < LINEAR_R2:
        raise TextError(
            f"the scores of {bundle.path} are not its output `state` times item vectors (R2 is"
            f" {r2:.3f}): its graph ends in something else, which text vectors cannot enter"
        )
    return vectors


def fit(
    texts: Sequence[str],
    vectors: NDArray[np.float32],
    counts: NDArray[np.int64],
    recipe: TextRecipe,
) -> Fit:
    """Fit an encoder to items that the model knows.

    Args:
        texts: one per item.
        vectors: float32 `[items, width]`.
        counts: int64 `[items]`, events of each in training. Items weigh their square root: a
            vector of few events is noise, and one of many is still one item.

    Raises:
        TextError: there are fewer than `MIN_ITEMS` items.
    """
    if len(texts) < MIN_ITEMS:
        raise TextError(
            f"{len(texts)} items of the bundle have both events and text, at least {MIN_ITEMS} are"
            " needed: send `text` with events, or give a source that has it"
        )
    weights = np.sqrt(counts) / np.sqrt(counts).mean()
    base = np.average(vectors, axis=0, weights=weights)
    centred = (vectors - base).astype(np.float64)
    binary = _binary(padded_grams(texts, recipe.spec), recipe.buckets)
    idf = np.log((len(texts) + 1) / (np.asarray(binary.sum(axis=0)).ravel() + 1)) + 1.0
    idf[0] = 0.0
    design = binary @ sparse.diags_array(idf)
    norms = np.sqrt(np.asarray(design.multiply(design).sum(axis=1)).ravel())
    design = sparse.csr_array(sparse.diags_array(1.0 / np.maximum(norms, 1e-12)) @ design)

    def solve(rows: NDArray[np.bool_], penalty: float) -> NDArray[np.float64]:
        model = Ridge(alpha=penalty, fit_intercept=False, solver="sparse_cg", tol=1e-3)
        model.fit(design[rows], centred[rows], sample_weight=weights[rows])
        return np.asarray(model.coef_.T)

    fold = np.random.default_rng(recipe.seed).permutation(len(texts)) % recipe.folds
    total = float((weights[:, None] * centred**2).sum())

    def predict(penalty: float, folds: Sequence[int]) -> NDArray[np.float64]:
        made = np.zeros_like(centred)
        for number in folds:
            made[fold == number] = design[fold == number] @ solve(fold != number, penalty)
        return made

    # Three folds tell penalties apart well enough.
    tried = range(min(3, recipe.folds))
    rows = np.isin(fold, list(tried))
    errors = {
        penalty: float((weights[:, None] * (predict(penalty, tried) - centred) ** 2)[rows].sum())
        for penalty in recipe.penalties
    }
    penalty = min(errors, key=errors.__getitem__)
    held_out = predict(penalty, range(recipe.folds))
    coefficients = solve(np.ones(len(texts), dtype=bool), penalty)
    encoder = Encoder(
        recipe.spec,
        rows=(idf[:, None] * coefficients).astype(np.float32),
        idf=idf.astype(np.float32),
        base=base.astype(np.float32),
    )
    return Fit(
        encoder,
        held_out=(base + held_out).astype(np.float32),
        fold=fold,
        penalty=penalty,
        r2=1.0 - float((weights[:, None] * (held_out - centred) ** 2).sum()) / total,
    )


def _binary(found: NDArray[np.int64], buckets: int) -> sparse.csr_array:
    """float64 `[texts, buckets + 1]`: 1 where a text has the gram; column 0 stays empty."""
    rows, places = np.nonzero(found)
    return sparse.csr_array(
        (np.ones(len(rows)), (rows, found[rows, places])), shape=(len(found), buckets + 1)
    )
