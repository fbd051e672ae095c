"""Train, export, quantize and open: the path from events to a bundle, on small data."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models import sasrec
from models.export import export
from models.quantize import quantize_int8, quantize_rows
from models.sasrec import Params, Shape
from models.train import Recipe, fit
from worker.bundle import Bundle, open_bundle, write_bundle

SHAPE = Shape(item_count=30, length=10, width=16)


@pytest.fixture(scope="module")
def trained() -> Params:
    """Users walk the items in a circle: what comes next is certain."""
    sequences = [(np.arange(start, start + 15) % 30 + 1).astype(np.int64) for start in range(60)]
    recipe = Recipe(dropout=0.1, epochs=60, batch=32, learning_rate=5e-3)
    params, _ = fit(sequences, SHAPE, recipe, validation=None)
    return params


def bundle(directory: Path, model: bytes) -> Bundle:
    return open_bundle(
        write_bundle(
            directory,
            model=model,
            items=[str(number) for number in range(1, 31)],
            name="tiny",
            version="v1",
            surface="posts",
            created_at="2026-11-24T10:00:00+00:00",
            precision="any",
            recipe="test",
            max_length=SHAPE.length,
        )
    )


def table(opened: Bundle, history: np.ndarray) -> np.ndarray:
    items, scores = opened.score(history, 30)
    full = np.empty((len(history), 30), dtype=np.float32)
    np.put_along_axis(full, items - 1, scores, axis=1)
    return full


def test_bundles_score_as_the_trained_model_does(trained: Params, tmp_path: Path) -> None:
    history = np.random.default_rng(0).integers(1, 31, (20, SHAPE.length))
    history[:10, :7] = 0
    expected = np.asarray(sasrec.scores(trained, jnp.asarray(history), SHAPE))
    model = export(trained, SHAPE)
    np.testing.assert_allclose(
        table(bundle(tmp_path / "fp32", model), history), expected, atol=1e-3
    )
    int8 = quantize_int8(model)
    assert len(int8) < len(model)
    close = table(bundle(tmp_path / "int8", int8), history)
    assert np.corrcoef(close.ravel(), expected.ravel())[0, 1] > 0.99


def test_the_model_has_learned_what_comes_next(trained: Params, tmp_path: Path) -> None:
    history = np.array([np.arange(start, start + 10) % 30 + 1 for start in range(30)])
    items, _ = bundle(tmp_path / "int8", quantize_int8(export(trained, SHAPE))).score(history, 1)
    following = history[:, -1] % 30 + 1
    assert (items[:, 0] == following).mean() > 0.9


def test_quantized_rows_are_within_half_a_step() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    rows[2] = 0.0
    integers, scale = quantize_rows(rows)
    assert np.abs(integers * scale - rows).max() <= scale.max() / 2 + 1e-6
