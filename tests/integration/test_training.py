"""Train, break off, go on, export, compress and open: from events to bundles, on small data."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import sasrec
from models.compress.draft import Context, open_draft, save
from models.compress.methods import METHODS
from models.compress.recipe import apply, parse
from models.dataset import Queries
from models.events import Events
from models.family import Params, scores
from models.losses import Teacher, loss
from models.sasrec import Shape
from models.search import search
from models.train import CheckpointError, Recipe, fit
from models.trainer import Options, Trained, TrainingError, train
from worker.bundle import open_bundle
from worker.bundle_files import read_manifest

ITEMS = 30
RECIPE = Recipe(dropout=0.1, epochs=60, batch=32, learning_rate=5e-3, average=0.9, warmup=10)


def circle(users: int = 60, length: int = 15) -> Events:
    """Users walk the items in a circle: what comes next is certain."""
    who = np.repeat(np.arange(users), length)
    what = (np.tile(np.arange(length), users) + who) % ITEMS + 1
    return Events(
        users=np.array([f"u{n}" for n in who]),
        items=np.array([f"i{n}" for n in what]),
        types=np.array(["view"] * len(who)),
        timestamps_ms=np.tile(np.arange(length), users).astype(np.int64),
        texts={},
        name="circle",
        sha256="0" * 64,
    )


SEQUENCES = [(np.arange(start, start + 15) % ITEMS + 1).astype(np.int64) for start in range(60)]
SHAPE = Shape.fresh(ITEMS, length=10, width=16, blocks=2, heads=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    options = Options(split="leave-one-out", length=10, width=16, recipe=RECIPE)
    registry = tmp_path_factory.mktemp("registry")
    return train(circle(), options, registry=registry, name="posts", surface="posts")


def test_the_model_learns_what_comes_next_and_says_how_well(trained: Trained) -> None:
    by_model = {row["model"]: row for row in trained.rows}
    assert by_model["SASRec, this bundle"]["hr@10"] > 0.95
    assert by_model["SASRec, this bundle"]["ndcg@10"] > by_model["popularity"]["ndcg@10"]
    manifest = read_manifest(trained.path)
    assert manifest.metrics["ndcg@10"] == by_model["SASRec, this bundle"]["ndcg@10"]
    assert manifest.provenance["data_sha256"] == "0" * 64
    assert manifest.provenance["split"] == "leave-one-out"


def test_a_recurrent_model_learns_it_too_and_steps_through_it(tmp_path: Path) -> None:
    options = Options(
        split="leave-one-out", family="lrurec", length=10, width=16, channels=16, recipe=RECIPE,
        baselines=False,
    )  # fmt: skip
    made = train(circle(), options, registry=tmp_path, name="posts", surface="posts")
    (row,) = made.rows
    assert row["model"] == "LRURec, this bundle"
    assert row["hr@10"] > 0.95
    bundle = open_bundle(made.path)
    assert bundle.manifest.recipe.startswith("LRURec, 2 blocks, 16 channels, d=16, history 10")
    carry = bundle.fresh_carry(1)
    for place in range(25):
        now, following = (bundle.index[f"i{(place + n) % ITEMS + 1}"] for n in (0, 1))
        items, _, carry = bundle.advance(np.array([[now]]), carry, 10)
    assert following in items


def test_a_family_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no family 'gru4rec'; there are sasrec, lrurec"):
        train(
            circle(), Options(family="gru4rec", recipe=RECIPE), registry=tmp_path, name="posts",
            surface="posts",
        )  # fmt: skip


def test_compressed_bundles_still_know_what_comes_next(trained: Trained, tmp_path: Path) -> None:
    draft = open_draft(trained.path)
    index = open_bundle(trained.path).index
    history = np.array(
        [[index[f"i{(start + n) % ITEMS + 1}"] for n in range(10)] for start in range(ITEMS)]
    )
    following = np.array([index[f"i{(start + 10) % ITEMS + 1}"] for start in range(ITEMS)])
    for recipe in ("int8", "prune:0.2 + int8", "weights:4"):
        made = apply(parse(recipe, METHODS), draft, Context())
        bundle = open_bundle(save(made, tmp_path / recipe.replace(" ", "")))
        assert (bundle.score(history, 1)[0][:, 0] == following).mean() > 0.8, recipe


def test_a_search_tries_recipes_and_keeps_within_the_loss(trained: Trained) -> None:
    draft = open_draft(trained.path)
    index = open_bundle(trained.path).index
    sequences = [
        np.array([index[f"i{(start + n) % ITEMS + 1}"] for n in range(14)]) for start in range(60)
    ]
    context = Context(
        [s[:-1] for s in sequences],
        Queries([s[:-1] for s in sequences], np.array([s[-1] for s in sequences])),
    )
    lines: list[str] = []
    found = search(
        draft, context, max_loss=0.05, trials=2, finetunes=1, finetune_epochs=1,
        progress=lines.append,
    )  # fmt: skip
    assert found.best.loss <= 0.05
    assert found.best.size_ratio < 0.6
    assert found.best in found.front
    assert {trial.stage for trial in found.trials} >= {"reference", "single", "combination"}
    assert len(lines) == len(found.trials) + len(found.failed)
    for trial in found.front:
        assert not any(
            other.size_ratio < trial.size_ratio
            and other.latency_ratio < trial.latency_ratio
            and other.loss < trial.loss
            for other in found.trials
        )


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = fit(SEQUENCES, SHAPE, replace(RECIPE, epochs=4), validation=None)
    file = tmp_path / "train.npz"
    fit(SEQUENCES, SHAPE, replace(RECIPE, epochs=2), validation=None, checkpoint=file)
    resumed = fit(SEQUENCES, SHAPE, replace(RECIPE, epochs=4), validation=None, checkpoint=file)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, resumed.params
    )


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.npz"
    recipe = replace(RECIPE, epochs=1)
    fit(SEQUENCES, SHAPE, recipe, validation=None, checkpoint=file)
    with pytest.raises(CheckpointError, match="belongs to another training"):
        fit(SEQUENCES, SHAPE, replace(recipe, seed=8), validation=None, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        fit(SEQUENCES, SHAPE, recipe, validation=None, checkpoint=file)


def test_seeds_decide_everything() -> None:
    recipe = replace(RECIPE, epochs=1)
    one, two = (fit(SEQUENCES, SHAPE, recipe, validation=None).params for _ in range(2))
    other = fit(SEQUENCES, SHAPE, replace(recipe, seed=9), validation=None).params
    np.testing.assert_array_equal(one["items"], two["items"])
    assert not np.array_equal(one["items"], other["items"])


def test_sampled_negatives_learn_as_well(tmp_path: Path) -> None:
    fitted = fit(SEQUENCES, SHAPE, replace(RECIPE, negatives=12), validation=None)
    history = np.array([np.arange(start, start + 10) % ITEMS + 1 for start in range(ITEMS)])
    best = np.asarray(scores(fitted.params, jnp.asarray(history), SHAPE)).argmax(1) + 1
    assert (best == history[:, -1] % ITEMS + 1).mean() > 0.9


def test_the_gradient_of_the_chunked_loss_is_that_of_the_plain_one() -> None:
    params = jax.tree.map(lambda w: w * 5.0, sasrec.init(SHAPE, 1))
    taught = sasrec.init(SHAPE, 2)
    window = jnp.asarray(np.array(SEQUENCES[:6])[:, :11])

    def plain(p: Params, weight: float) -> jax.Array:
        history, target = window[:, :-1], window[:, 1:]
        log_p = jax.nn.log_softmax(
            sasrec.hidden(p, history, SHAPE, dropout=0.0, key=None) @ p["items"][1:].T
        )
        theirs = jax.nn.softmax(
            sasrec.hidden(taught, history, SHAPE, dropout=0.0, key=None) @ taught["items"][1:].T
        )
        own = jnp.take_along_axis(log_p, target[..., None] - 1, -1)[..., 0]
        return -(weight * (theirs * log_p).sum(-1) + (1 - weight) * own).sum()

    for weight, teacher in ((0.0, None), (0.7, Teacher(taught, SHAPE, 0.7))):
        found = jax.grad(
            lambda p, t=teacher: loss(p, window, SHAPE, dropout=0.0, key=None, teacher=t)[0]
        )(params)
        expected = jax.grad(plain)(params, weight)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), found, expected
        )


def test_too_few_events_are_refused_with_the_reason(tmp_path: Path) -> None:
    lonely = replace(
        circle(), **{k: getattr(circle(), k)[:1] for k in ("users", "items", "types")},
        timestamps_ms=np.zeros(1, dtype=np.int64),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="no user with two events"):
        train(lonely, Options(recipe=RECIPE), registry=tmp_path, name="posts", surface="posts")
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path) -> None:
    options = Options(width=16, heads=3, recipe=RECIPE)
    with pytest.raises(TrainingError, match="cannot be shared by 3 heads"):
        train(circle(), options, registry=tmp_path, name="posts", surface="posts")
