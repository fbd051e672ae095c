"""Train a model with early stopping on validation NDCG@10, and go on where a run was broken off.

The weights that count are a running average of those that the optimizer moves (Polyak & Juditsky,
1992): it takes the place of a learning-rate schedule, so that training can stop at any epoch.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray
from tqdm import tqdm

from models import losses
from models.dataset import Queries, windows
from models.evaluate import accuracy, ranks
from models.family import Params, Shape, param_score
from models.files import write_whole
from models.losses import Teacher
from worker.errors import StreamrecError

log = logging.getLogger(__name__)

#: Windows whose activations are held at once; a batch is the sum of several.
_MICRO_BATCH = 8


class CheckpointError(StreamrecError):
    """A training checkpoint cannot be used."""

    exit_code = 66


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    dropout: float = 0.4
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    #: Steps over which the learning rate rises from 0.
    warmup: int = 100
    #: Windows of full length a step; more where windows are shorter.
    batch: int = 128
    epochs: int = 120
    #: Validations without a better NDCG@10 before stopping.
    patience: int = 8
    #: Epochs between validations.
    validate_every: int = 3
    #: Decay of the running average of the weights, per step.
    average: float = 0.999
    #: Shared negatives a step; 0 scores the whole catalogue (see losses.loss).
    negatives: int = 0
    seed: int = 7


@dataclass(frozen=True)
class Fitted:
    """A training's outcome."""

    params: Params
    #: Epochs that gave `params`.
    epochs: int
    #: Validation NDCG@10 by epoch; empty without validation.
    validated: dict[int, float]


@dataclass
class _State:
    """What a checkpoint holds: all that training changes."""

    params: Params
    average: Params
    best: Params
    optimizer: optax.OptState
    step: int = 0
    epoch: int = 0
    best_epoch: int = 0
    worse: int = 0
    validated: dict[int, float] | None = None


def fit(
    sequences: Sequence[NDArray[np.int64]],
    shape: Shape,
    recipe: Recipe,
    *,
    validation: Queries | None,
    start: Params | None = None,
    teacher: Teacher | None = None,
    project: Callable[[Params], Params] | None = None,
    checkpoint: Path | None = None,
    label: str = "training",
) -> Fitted:
    """Train on `sequences` of model indexes.

    Args:
        validation: queries to stop early by; None trains for `recipe.epochs`.
        start: weights to begin with, such as a pruned model's.
        teacher: a larger model to learn from beside the data.
        project: applied to the weights before each use, such as a mask that keeps pruned weights
            at zero, or a rounding that the gradient passes straight through (Bengio et al., 2013).
        checkpoint: file to write after each epoch, and to go on from where it exists.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another training.
    """
    use = project if project is not None else lambda params: params
    optimizer = optax.adamw(
        optax.linear_schedule(
            recipe.learning_rate / recipe.warmup, recipe.learning_rate, recipe.warmup
        ),
        weight_decay=recipe.weight_decay,
    )
    params = start if start is not None else shape.init(recipe.seed)
    params = jax.tree.map(jnp.asarray, params)
    state = _State(params, params, params, optimizer.init(params), validated={})
    step = _step(shape, recipe, optimizer, use, teacher)
    buckets = _buckets(sequences, shape.length)
    mark = _fingerprint(buckets, shape, recipe)
    if checkpoint is not None and checkpoint.exists():
        _read_checkpoint(checkpoint, state, mark)
    key = jax.random.key(recipe.seed)
    epochs = range(state.epoch + 1, recipe.epochs + 1)
    assert state.validated is not None
    if validation is not None and state.worse >= recipe.patience:
        epochs = range(0)
    with tqdm(
        epochs, desc=label, unit="epoch", initial=state.epoch, total=recipe.epochs
    ) as progress:
        for epoch in progress:
            rng = np.random.default_rng([recipe.seed, epoch])
            total = count = 0.0
            for number, window in enumerate(_batches(buckets, recipe.batch * shape.length, rng)):
                state.step += 1
                own = jax.random.fold_in(jax.random.fold_in(key, epoch), number)
                state.params, state.average, state.optimizer, value, targets = step(
                    state.params, state.average, state.optimizer, window, own, state.step
                )
                total += float(value)
                count += float(targets)
            shown = {"loss": f"{total / max(count, 1):.3f}"}
            state.epoch = epoch
            if validation is None:
                state.best, state.best_epoch = state.average, epoch
            elif epoch % recipe.validate_every == 0 or epoch == recipe.epochs:
                ndcg = accuracy(
                    ranks(param_score(use(state.average), shape), validation, length=shape.length)
                ).ndcg
                shown["ndcg"] = f"{ndcg:.4f}"
                log.info("validated epoch=%d loss=%s ndcg=%.4f", epoch, shown["loss"], ndcg)
                if ndcg > max(state.validated.values(), default=-1.0):
                    state.best, state.best_epoch, state.worse = state.average, epoch, 0
                else:
                    state.worse += 1
                state.validated[epoch] = ndcg
            progress.set_postfix(shown)
            if checkpoint is not None:
                _write_checkpoint(checkpoint, state, mark)
            if validation is not None and state.worse >= recipe.patience:
                break
    return Fitted(use(state.best), state.best_epoch, state.validated)


def _step(
    shape: Shape,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    use: Callable[[Params], Params],
    teacher: Teacher | None,
) -> Callable[..., tuple[Params, Params, optax.OptState, jax.Array, jax.Array]]:
    def loss(params: Params, window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return losses.loss(
            use(params), window, shape, dropout=recipe.dropout, key=key,
            negatives=recipe.negatives, teacher=teacher,
        )  # fmt: skip

    def step(
        params: Params,
        average: Params,
        state: optax.OptState,
        window: jax.Array,
        key: jax.Array,
        number: jax.Array,
    ) -> tuple[Params, Params, optax.OptState, jax.Array, jax.Array]:
        parts = window.reshape(-1, min(_MICRO_BATCH, len(window)), window.shape[1])

        def add(sums: Any, part: Any) -> tuple[Any, None]:
            own = jax.value_and_grad(loss, has_aux=True)(params, *part)
            return jax.tree.map(jnp.add, sums, own), None

        zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
        ((value, count), gradient), _ = jax.lax.scan(
            add, zero, (parts, jax.random.split(key, len(parts)))
        )
        gradient = jax.tree.map(lambda g: g / jnp.maximum(count, 1), gradient)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        # A short average at first: it must forget where it began.
        decay = jnp.minimum(recipe.average, (1.0 + number) / (10.0 + number))
        average = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)
        return params, average, state, value, count

    return cast(Callable[..., Any], jax.jit(step))


def _buckets(sequences: Sequence[NDArray[np.int64]], length: int) -> list[NDArray[np.int64]]:
    """Windows int64 `[windows, bucket length + 1]` by length, so that little padding is computed;
    longest last, and each bucket filled to whole micro-batches by repetition."""
    every = windows(sequences, length)
    real = (every > 0).sum(axis=1) - 1
    bounds = sorted({length, *(b for b in (16, 32, 64, 100, 150) if b < length)})
    found = []
    for low, high in zip([0, *bounds[:-1]], bounds, strict=True):
        part = every[(real > low) & (real <= high)][:, -(high + 1) :]
        if len(part):
            found.append(part)
    return found


def _batches(
    buckets: Sequence[NDArray[np.int64]], tokens: int, rng: np.random.Generator
) -> Iterator[jax.Array]:
    """Every window once, about `tokens` positions a batch; the last batch of a bucket is filled up
    from its front, so that each bucket compiles once."""
    cut: list[tuple[int, NDArray[np.int64]]] = []
    for number, bucket in enumerate(buckets):
        size = max(1, tokens // (bucket.shape[1] - 1) // _MICRO_BATCH) * _MICRO_BATCH
        size = min(size, -(-len(bucket) // _MICRO_BATCH) * _MICRO_BATCH)
        order = rng.permutation(len(bucket))
        order = np.resize(order, -(-len(order) // size) * size)
        cut += [(number, rows) for rows in order.reshape(-1, size)]
    for place in rng.permutation(len(cut)):
        number, rows = cut[place]
        yield jnp.asarray(buckets[number][rows])


def _fingerprint(buckets: Sequence[NDArray[np.int64]], shape: Shape, recipe: Recipe) -> str:
    digest = hashlib.sha256()
    # More epochs, or more patience, may be asked for on going on.
    fixed = {k: v for k, v in asdict(recipe).items() if k not in {"epochs", "patience"}}
    digest.update(json.dumps([shape.title, asdict(shape), fixed], sort_keys=True).encode())
    for bucket in buckets:
        digest.update(bucket.tobytes())
    return digest.hexdigest()


def _write_checkpoint(file: Path, state: _State, mark: str) -> None:
    trees = {
        name: jax.tree.leaves(getattr(state, name))
        for name in ("params", "average", "best", "optimizer")
    }
    arrays = {
        f"{name}.{place}": np.asarray(leaf)
        for name, leaves in trees.items()
        for place, leaf in enumerate(leaves)
    }
    head = {
        "mark": mark, "step": state.step, "epoch": state.epoch, "worse": state.worse,
        "best_epoch": state.best_epoch, "validated": state.validated,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = io.BytesIO()
    np.savez(stored, head=np.array(json.dumps(head)), **arrays)  # type: ignore[arg-type]
    write_whole(file, stored.getvalue())


def _read_checkpoint(file: Path, state: _State, mark: str) -> None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            head = json.loads(str(stored["head"]))
            if head["mark"] != mark:
                raise CheckpointError(
                    f"{file} belongs to another training (other data, sizes or recipe): delete it,"
                    " or give --work another directory"
                )
            for name in ("params", "average", "best", "optimizer"):
                tree = jax.tree.structure(getattr(state, name))
                leaves = [jnp.asarray(stored[f"{name}.{n}"]) for n in range(tree.num_leaves)]
                setattr(state, name, jax.tree.unflatten(tree, leaves))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{file} is damaged ({error}): delete it to start anew") from None
    state.step, state.epoch, state.worse = head["step"], head["epoch"], head["worse"]
    state.best_epoch = head["best_epoch"]
    state.validated = {int(epoch): ndcg for epoch, ndcg in head["validated"].items()}
    log.info("going on from %s at epoch %d", file, state.epoch)
