"""A recurrent model gives the same whether it reads a history whole, in pieces, or item by item."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

from models import family
from models.compress.draft import CompressionError, Context, Draft, graph_inputs, lower, save
from models.compress.methods import METHODS
from models.compress.recipe import apply, parse
from models.compress.trial import in_memory
from models.dataset import Queries
from models.export import export, read_params
from models.family import Params
from models.lrurec import Shape, recurrence
from models.stepping import restart, steps
from tests.conftest import tiny_bundle, tiny_model
from worker.bundle import Bundle, open_bundle, write_bundle
from worker.bundle_checks import check_bundle
from worker.errors import BundleError
from worker.manifest import Manifest

COUNT, LENGTH = 60, 12
SHAPE = Shape.fresh(COUNT, length=LENGTH, width=32, blocks=2, channels=16)
CARRY_WIDTH = 2 * 2 * 16
ITEMS = tuple(f"i{n}" for n in range(COUNT))
HISTORY = np.random.default_rng(2).integers(1, COUNT + 1, (6, LENGTH))
HISTORY[:3, :7] = 0


@cache
def params() -> Params:
    """Random weights, large enough that every part matters."""
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda w: np.asarray(w) + rng.normal(0, 0.15, w.shape).astype(np.float32), SHAPE.init(3)
    )


def draft_of(model: ModelProto) -> Draft:
    manifest = Manifest(
        format_version=1, name="posts", version="v-fp32", surface="posts",
        created_at="2026-11-24T10:00:00+00:00", precision="fp32", recipe="random",
        max_length=LENGTH, item_count=COUNT, inputs=graph_inputs(model), outputs=[], files={},
        any_length=True,
    )  # fmt: skip
    return Draft(model, ITEMS, manifest, origin=model)


@cache
def draft() -> Draft:
    return draft_of(onnx.load_model_from_string(export(params(), SHAPE)))


@cache
def bundle() -> Bundle:
    return in_memory(draft())


@cache
def context() -> Context:
    rng = np.random.default_rng(1)
    sequences = [rng.integers(1, COUNT + 1, 15) for _ in range(40)]
    return Context(
        sequences, Queries([s[:-1] for s in sequences], np.array([s[-1] for s in sequences]))
    )


def by(recipe: str) -> Draft:
    return apply(parse(recipe, METHODS), draft(), context())


def table(items: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores in the order of items."""
    full = np.empty((len(items), COUNT), dtype=np.float32)
    np.put_along_axis(full, items - 1, scores, axis=1)
    return full


def written(model: bytes, folder: Path, **changes: object) -> Path:
    fields: dict[str, object] = {
        "model": model, "items": ITEMS, "golden_histories": HISTORY, "name": "posts",
        "version": "v1", "surface": "posts", "created_at": "2026-11-24T10:00:00+00:00",
        "precision": "fp32", "recipe": "random", "max_length": LENGTH, "metrics": {"ndcg@10": 0.1},
    } | changes  # fmt: skip
    return write_bundle(folder / "posts" / "v1", **fields)  # type: ignore[arg-type]


def test_the_graph_scores_as_the_model_that_was_trained() -> None:
    exact = np.asarray(family.scores(params(), HISTORY, SHAPE))
    np.testing.assert_allclose(table(*bundle().score(HISTORY, COUNT)), exact, atol=1e-4)


def test_parameters_survive_the_way_into_a_graph_and_back() -> None:
    found, shape = read_params(draft().model)
    assert shape == SHAPE
    for one, other in zip(found["blocks"], params()["blocks"], strict=True):
        # A turn by more than a whole one comes back as the rest.
        for mine, theirs in zip(recurrence(one), recurrence(other), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)
    again = in_memory(draft_of(onnx.load_model_from_string(export(found, shape))))
    np.testing.assert_allclose(
        table(*again.score(HISTORY, COUNT)), table(*bundle().score(HISTORY, COUNT)), atol=1e-4
    )


def test_single_precision_suffices_for_long_histories_and_slow_channels() -> None:
    channels, length = 16, 200
    slow = Shape.fresh(COUNT, length=length, width=32, blocks=1, channels=channels)
    own = jax.tree.map(np.asarray, slow.init(3))
    own["blocks"][0]["nu"] = np.linspace(-9.0, 3.0, channels).astype(np.float32)
    made = in_memory(draft_of(onnx.load_model_from_string(export(own, slow))))
    history = np.random.default_rng(4).integers(1, COUNT + 1, (1, length))
    *_, carry = made.advance(history, made.fresh_carry(1), 1)

    block = jax.tree.map(lambda w: w.astype(np.float64), own["blocks"][0])
    decay = np.exp(block["nu"])
    turned = np.exp(-decay + 1j * np.exp(block["theta"]))
    x = own["items"][history[0]].astype(np.float64) * slow.input_scale
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    driven = (x @ block["drive"]["w"]) * np.tile(np.sqrt(-np.expm1(-2.0 * decay)), 2)
    state = np.zeros(channels, dtype=np.complex128)
    for one in driven[:, :channels] + 1j * driven[:, channels:]:
        state = turned * state + one
    exact = np.concatenate([state.real, state.imag])
    assert np.abs(carry[0] - exact).max() < 1e-4 * np.abs(exact).max()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pieces_of_any_size_give_what_the_whole_gives(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 30), "length")
    seed = data.draw(st.integers(0, 99), "seed")
    history = np.random.default_rng(seed).integers(1, COUNT + 1, (3, length))
    for row in range(3):
        history[row, : data.draw(st.integers(0, length - 1), f"padding of row {row}")] = 0
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=5), "cuts") - {length})
    carry = bundle().fresh_carry(3)
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        piece = history[:, start:end]
        # Padding is free: on the left of a piece, and between its items.
        spread = np.zeros((3, 2 * piece.shape[1]), dtype=np.int64)
        spread[:, 1::2] = piece
        if data.draw(st.booleans(), "spread"):
            piece = spread
        items, scores, carry = bundle().advance(piece, carry, COUNT)
    whole_items, whole_scores, whole_carry = bundle().advance(
        history, bundle().fresh_carry(3), COUNT
    )
    np.testing.assert_allclose(carry, whole_carry, atol=1e-5)
    np.testing.assert_allclose(table(items, scores), table(whole_items, whole_scores), atol=1e-4)


def test_padding_leaves_the_carry_as_it_was_to_the_last_bit() -> None:
    *_, carry = bundle().advance(HISTORY, bundle().fresh_carry(6), 1)
    assert np.abs(carry).min() > 0
    for length in (1, 5):
        *_, after = bundle().advance(np.zeros((6, length), dtype=np.int64), carry, 1)
        np.testing.assert_array_equal(after, carry)


def test_states_for_text_come_with_each_step() -> None:
    *_, carry = bundle().advance(HISTORY[:, :-1], bundle().fresh_carry(6), 1)
    items, scores, after, states = bundle().advance_with_states(HISTORY[:, -1:], carry, COUNT)
    *_, whole = bundle().score_with_states(HISTORY, 1)
    np.testing.assert_allclose(states, whole, atol=1e-4)
    np.testing.assert_allclose(table(items, scores), states @ params()["items"][1:].T, atol=1e-4)
    assert after.shape == (6, CARRY_WIDTH)


@pytest.mark.parametrize(
    ("recipe", "drift", "smaller"),
    [
        ("half", 0.002, 1.6),
        ("weights:8", 0.02, 2.2),
        ("int8", 0.06, 2.2),
        ("int8:parts=recurrence", 0.06, 1.1),
        ("int4", 0.4, 2.8),
        ("static", 0.06, 1.4),
        ("blocks:8", 0.06, 1.7),
        ("mixed:0.5", 0.6, 1.5),
        ("prune:0.6", 1.5, 1.3),
        ("layers:1", 1.5, 1.5),
        ("width:24", 1.5, 1.2),
        ("layers:1 + neurons:0.5 + prune:0.3 + int4", 1.5, 3.0),
    ],
)
def test_compressed_models_keep_the_contract(
    recipe: str, drift: float, smaller: float, tmp_path: Path
) -> None:
    made = by(recipe)
    assert len(lower(draft())) / len(lower(made)) > smaller
    # Opening it compares whole histories with their pieces, and padding with nothing.
    opened = open_bundle(save(made, tmp_path / "v", golden=HISTORY))
    exact = table(*bundle().score(HISTORY, COUNT))
    error = np.abs(table(*opened.score(HISTORY, COUNT)) - exact).mean()
    assert 0 < error < drift * exact.std()


def test_int8_products_are_of_integers_and_the_recurrence_is_not() -> None:
    graph = onnx.load_model_from_string(lower(by("int8"))).graph
    kinds = [node.op_type for node in graph.node]
    # Two blocks of four linear layers, and the item table.
    assert kinds.count("MatMulInteger") == 9
    assert "MatMul" not in kinds
    body = next(
        a.g for n in graph.node if n.op_type == "Scan" for a in n.attribute if a.HasField("g")
    )
    assert {node.op_type for node in body.node} == {"Mul", "Gather", "Add", "Identity"}


def test_a_layer_less_is_a_smaller_carry_too() -> None:
    assert in_memory(by("layers:1")).manifest.carry_width == CARRY_WIDTH // 2


def test_a_shorter_history_is_read_by_the_same_graph() -> None:
    made = by("history:5")
    assert made.manifest.max_length == 5
    np.testing.assert_allclose(
        in_memory(made).score(HISTORY[:, -5:], 9)[1],
        bundle().score(HISTORY[:, -5:], 9)[1],
        atol=1e-5,
    )


def test_heads_are_refused_with_what_there_is_instead() -> None:
    with pytest.raises(CompressionError, match="LRURec has no attention heads: use neurons"):
        by("heads:0.5")


def test_finetuning_trains_what_pruning_left_through_its_rounding() -> None:
    made, pruned = by("int8 + prune:0.5 + finetune:1,batch=8,taught=0"), by("prune:0.5")
    for name in ("block0_drive_weight", "block1_read_weight", "item_table"):
        zero = pruned.value(name) == 0
        assert zero.mean() > 0.3
        assert (made.value(name)[zero] == 0).all()
        assert not np.array_equal(made.value(name), pruned.value(name))


def forgets(model: ModelProto) -> None:
    """The state starts from zero, whatever the carry."""
    zero = numpy_helper.from_array(np.zeros(1, dtype=np.float32), "zero")
    model.graph.initializer.append(zero)
    model.graph.node.insert(0, helper.make_node("Mul", ["carry", "zero"], ["forgotten"]))
    for node in list(model.graph.node)[1:]:
        node.input[:] = ["forgotten" if name == "carry" else name for name in node.input]


def decays(model: ModelProto) -> None:
    """Each run takes a little off, padding or not."""
    node = next(n for n in model.graph.node if "next_carry" in n.output)
    node.output[0] = "kept"
    model.graph.initializer.append(
        numpy_helper.from_array(np.array([1.0 - 1e-5], dtype=np.float32), "less")
    )
    model.graph.node.append(helper.make_node("Mul", ["kept", "less"], ["next_carry"]))


def drops(model: ModelProto) -> None:
    """There is no next carry."""
    output = next(o for o in model.graph.output if o.name == "next_carry")
    model.graph.output.remove(output)


def widens(model: ModelProto) -> None:
    """The next carry is twice as wide."""
    node = next(n for n in model.graph.node if "next_carry" in n.output)
    node.output[0] = "kept"
    model.graph.node.append(helper.make_node("Concat", ["kept", "kept"], ["next_carry"], axis=1))
    output = next(o for o in model.graph.output if o.name == "next_carry")
    output.type.tensor_type.shape.dim[1].dim_value *= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (forgets, "read in pieces of [0-9]+ and the rest has scores that differ by up to"),
        (decays, "padding changes next_carry: 0 must leave it as it was"),
        (drops, "the model has no output 'next_carry'"),
        (widens, "next_carry is .*; it must be .* of finite numbers"),
    ],
)
def test_a_broken_carry_is_refused(
    damage: Callable[[ModelProto], None], message: str, tmp_path: Path
) -> None:
    model = onnx.load_model_from_string(export(params(), SHAPE))
    damage(model)
    with pytest.raises(BundleError, match=message):
        written(model.SerializeToString(), tmp_path)


def test_a_recurrent_bundle_says_how_wide_its_carry_is_and_passes_its_checks(
    tmp_path: Path,
) -> None:
    path = written(export(params(), SHAPE), tmp_path)
    manifest = open_bundle(path).manifest
    assert (manifest.carry_width, manifest.any_length) == (CARRY_WIDTH, True)
    assert not check_bundle(path)


def test_a_length_that_is_not_free_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="says any_length, but the model reads 8 items"):
        tiny_bundle(tmp_path / "v1", any_length=True)
    padded = onnx.load_model_from_string(tiny_model())
    # The mean over a history depends on how much padding is in it.
    padded.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    model = padded.SerializeToString()
    with pytest.raises(BundleError, match="without its padding has scores that differ"):
        tiny_bundle(tmp_path / "v2", any_length=True, model=model)
    tiny_bundle(tmp_path / "v3", model=model)


def test_a_bundle_without_a_carry_has_none_to_advance(tmp_path: Path) -> None:
    plain = open_bundle(tiny_bundle(tmp_path / "v1"))
    assert plain.manifest.carry_width is None
    with pytest.raises(BundleError, match="keeps nothing of a user between runs"):
        plain.fresh_carry(2)


def test_steps_are_timed_beside_whole_histories() -> None:
    histories = [[row[row > 0] for row in HISTORY]]
    (found,) = steps([bundle()], histories, batches=(1, 4), rounds=1, runs=3)
    assert set(found) == {1, 4}
    for at in found.values():
        assert at.step_us is not None and min(at.step_us, at.whole_us) > 0


def test_a_restart_changes_lists_only_where_more_was_read_than_is_read_again() -> None:
    rng = np.random.default_rng(3)
    short = [rng.integers(1, COUNT + 1, LENGTH) for _ in range(8)]
    long = [rng.integers(1, COUNT + 1, 3 * LENGTH) for _ in range(8)]
    targets = np.arange(1, 9)
    found = restart(bundle(), Queries(short, targets), ITEMS)
    assert (found.overlap, found.queries) == (1.0, 8)
    assert found.kept_ndcg == found.rebuilt_ndcg
    assert restart(bundle(), Queries(long, targets), ITEMS).overlap < 1.0
