"""Each method does to the scores what it says, and stores what it says."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from models import family, sasrec
from models.compress.draft import CompressionError, Context, Draft, lower, open_draft, save
from models.compress.methods import METHODS
from models.compress.recipe import apply, parse
from models.compress.rewriter import Rewriter
from models.compress.rows import Rows
from models.compress.structure import rebuilt
from models.compress.trial import in_memory
from models.dataset import Queries
from models.export import export, read_params
from models.family import Params
from models.graph import ForeignGraphError, names_today
from models.sasrec import Shape
from tests.conftest import ITEMS, tiny_bundle
from worker.bundle import open_bundle
from worker.bundle_files import read_manifest
from worker.errors import BundleError
from worker.manifest import Manifest

COUNT = 60
SHAPE = Shape.fresh(COUNT, length=12, width=32, blocks=2, heads=2)


def params() -> Params:
    """Random weights, large enough that every part matters."""
    fresh = sasrec.init(SHAPE, 3)
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda w: np.asarray(w) + rng.normal(0, 0.15, w.shape).astype(np.float32), fresh
    )


@pytest.fixture(scope="module")
def draft() -> Draft:
    model = onnx.load_model_from_string(export(params(), SHAPE))
    manifest = Manifest(
        format_version=1, name="posts", version="v-fp32", surface="posts",
        created_at="2026-11-24T10:00:00+00:00", precision="fp32", recipe="random", max_length=12,
        item_count=COUNT, inputs=[], outputs=[], files={},
    )  # fmt: skip
    return Draft(model, tuple(f"i{n}" for n in range(COUNT)), manifest, origin=model)


@pytest.fixture(scope="module")
def context() -> Context:
    rng = np.random.default_rng(1)
    sequences = [rng.integers(1, COUNT + 1, 15) for _ in range(40)]
    return Context(
        sequences,
        Queries([s[:-1] for s in sequences], np.array([s[-1] for s in sequences])),
    )


HISTORY = np.random.default_rng(2).integers(1, COUNT + 1, (6, 12))
HISTORY[:3, :7] = 0


def scores(draft: Draft) -> np.ndarray:
    length = draft.manifest.max_length
    items, values = in_memory(draft).score(HISTORY[:, -length:], COUNT)
    full = np.empty((len(HISTORY), COUNT), dtype=np.float32)
    np.put_along_axis(full, items - 1, values, axis=1)
    return full


def by(recipe: str, draft: Draft, context: Context) -> Draft:
    return apply(parse(recipe, METHODS), draft, context)


def test_parameters_survive_the_way_into_a_graph_and_back(draft: Draft) -> None:
    found, shape = read_params(draft.model)
    assert shape == SHAPE
    jax.tree.map(np.testing.assert_array_equal, found, params())


def test_weights_that_earlier_releases_kept_together_are_read_alike(draft: Draft) -> None:
    """They had `qkv`, and in the last block `key_value`, where there are three weights now."""
    old = onnx.ModelProto()
    old.CopyFrom(draft.model)
    weights = {w.name: numpy_helper.to_array(w) for w in draft.model.graph.initializer}
    for block, together in (("block0", "qkv"), ("block1", "key_value")):
        for kind in ("weight", "bias"):
            names = [
                name.replace("_weight", f"_{kind}")
                for name in names_today(f"{block}_{together}_weight")
            ]
            assert len(names) == {"qkv": 3, "key_value": 2}[together]
            for stored in [w for w in old.graph.initializer if w.name in names]:
                old.graph.initializer.remove(stored)
            joined = np.concatenate([weights[name] for name in names], axis=-1)
            old.graph.initializer.append(
                numpy_helper.from_array(joined, f"{block}_{together}_{kind}")
            )
    found, shape = read_params(old)
    assert shape == read_params(draft.model)[1]
    jax.tree.map(np.testing.assert_array_equal, found, read_params(draft.model)[0])


def test_a_graph_whose_attention_is_quantized_is_no_longer_read(
    draft: Draft, context: Context
) -> None:
    made = onnx.load_model_from_string(lower(by("int8:parts=block?_key_weight", draft, context)))
    with pytest.raises(ForeignGraphError, match="block0_key_weight"):
        read_params(made)


def test_plans_for_those_weights_are_kept_in_a_graph_of_today(draft: Draft) -> None:
    int8 = Rows(8, 0, True)
    plan = dict.fromkeys(("block0_qkv_weight", "block1_key_value_weight", "item_table"), int8)
    made = rebuilt(replace(draft, encodings=plan), *read_params(draft.model))
    assert made.encodings.keys() == {
        *(f"block0_{part}_weight" for part in ("query", "key", "value")),
        *(f"block1_{part}_weight" for part in ("key", "value")),
        "item_table",
    }


@pytest.mark.parametrize(
    ("recipe", "drift", "smaller"),
    [
        ("half", 0.002, 1.7),
        ("weights:8", 0.02, 2.5),
        ("weights:4", 0.3, 3.5),
        ("int8", 0.04, 2.4),
        ("int8:parts=table", 0.04, 1.0),
        ("int8:parts=block0|ffn", 0.04, 1.5),
        ("int4", 0.3, 3.2),
        ("int4:parts=table + int8:parts=linear", 0.3, 2.4),
        ("int4:head=0.25", 0.3, 3.0),
        ("static", 0.05, 1.5),
        ("blocks:4", 0.3, 3.0),
        ("blocks:8", 0.04, 2.0),
    ],
)
def test_quantization_keeps_scores_close_and_makes_the_graph_smaller(
    draft: Draft, context: Context, recipe: str, drift: float, smaller: float
) -> None:
    made = by(recipe, draft, context)
    exact = scores(draft)
    assert np.abs(scores(made) - exact).mean() < drift * exact.std()
    assert np.abs(scores(made) - exact).max() > 0, "the method changed nothing"
    assert len(lower(draft)) / len(lower(made)) > smaller


def test_the_most_popular_rows_keep_eight_bits(draft: Draft, context: Context) -> None:
    made = by("int4:parts=table,head=0.25", draft, context)
    table = draft.value("item_table")
    error = np.abs(made.encodings["item_table"].rounded(table, np) - table).mean(axis=1)
    assert error[:15].max() < error[15:].min()


@pytest.mark.parametrize("recipe", ["weights:8", "weights:4", "half"])
def test_weight_only_scores_are_those_of_the_rounded_weights(
    draft: Draft, context: Context, recipe: str
) -> None:
    made = by(recipe, draft, context)
    rounded = {
        name: np.asarray(encoding.rounded(draft.value(name), np), dtype=np.float32)
        for name, encoding in made.encodings.items()
    }
    np.testing.assert_allclose(scores(made), scores(draft.with_values(rounded)), atol=2e-3)


def test_the_item_table_is_stored_once(draft: Draft, context: Context) -> None:
    made = onnx.load_model_from_string(lower(by("int8", draft, context)))
    tables = [w for w in made.graph.initializer if COUNT + 1 in w.dims and 32 in w.dims]
    assert [w.data_type for w in tables] == [onnx.TensorProto.INT8]


def test_pruned_weights_are_the_smallest_and_their_zeros_are_not_stored(
    draft: Draft, context: Context
) -> None:
    made = by("prune:0.8", draft, context)
    values = {w.name: (draft.value(w.name), made.value(w.name)) for w in draft.weights()}
    zeros = sum(int((after == 0).sum()) for _, after in values.values())
    assert zeros / sum(after.size for _, after in values.values()) == pytest.approx(0.8, abs=0.01)
    for before, after in values.values():
        kept, gone = np.abs(before[after != 0]), np.abs(before[after == 0])
        if len(kept) and len(gone):
            assert kept.min() >= gone.max()
    # A bit for each weight and four bytes for each that is left.
    assert len(lower(draft)) / len(lower(made)) > 2.1
    np.testing.assert_allclose(
        scores(made), scores(draft.with_values({k: v[1] for k, v in values.items()})), atol=1e-4
    )


def test_layer_scope_prunes_each_weight_alike(draft: Draft, context: Context) -> None:
    made = by("prune:0.4,scope=layer", draft, context)
    for weight in draft.weights():
        assert (made.value(weight.name) == 0).mean() == pytest.approx(0.4, abs=0.02)


def test_pruning_and_quantization_give_the_same_in_either_order(
    draft: Draft, context: Context
) -> None:
    one, other = by("prune:0.5 + int8", draft, context), by("int8 + prune:0.5", draft, context)
    assert lower(one) == lower(other)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("layers:1", {"blocks": 1}),
        ("width:20", {"width": 20}),
        ("history:5", {"length": 5}),
        ("heads:0.5", {}),
        ("neurons:0.5", {}),
    ],
)
def test_structured_pruning_makes_the_graph_itself_smaller(
    draft: Draft, context: Context, recipe: str, expected: dict[str, int]
) -> None:
    made = by(recipe, draft, context)
    found, shape = read_params(made.model)
    assert {key: getattr(shape, key) for key in expected} == expected
    assert len(lower(made)) < len(lower(draft))
    history = HISTORY[:, -shape.length :]
    np.testing.assert_allclose(
        scores(made), np.asarray(family.scores(found, history, shape)), atol=1e-3
    )
    # What is left can be compressed on.
    scores(by("prune:0.3 + int8", made, context))


def test_half_of_the_heads_and_neurons_are_gone(draft: Draft, context: Context) -> None:
    found, shape = read_params(by("heads:0.5 + neurons:0.5", draft, context).model)
    heads = [block["out"]["w"].shape[0] // shape.head_width for block in found["blocks"]]
    assert sum(heads) == 2 and min(heads) >= 1
    assert sum(block["up"]["w"].shape[1] for block in found["blocks"]) == 128


def test_what_matters_least_is_what_goes(draft: Draft, context: Context) -> None:
    changed, shape = read_params(draft.model)
    dead = [1, 7, 30, 31, 64, 100]
    for block in changed["blocks"]:
        block["down"]["w"][dead] = 0.0
    model = onnx.load_model_from_string(export(changed, shape))
    spared = replace(draft, model=model, origin=model)
    made = by(f"neurons:{len(dead) / 128}", spared, context)
    np.testing.assert_allclose(scores(made), scores(spared), atol=1e-3)


def test_finetuning_keeps_pruned_weights_at_zero_and_learns(draft: Draft, context: Context) -> None:
    cut = by("prune:0.6 + int4", draft, context)
    made = by("finetune:2,rate=2e-3", cut, context)
    for weight in draft.weights():
        zeros = cut.value(weight.name) == 0
        assert (made.value(weight.name)[zeros] == 0).all()
    assert np.abs(scores(made) - scores(cut)).max() > 1e-3
    assert made.encodings == cut.encodings


def test_mixed_widths_stay_within_the_loss_and_save_more_than_int8(
    draft: Draft, context: Context
) -> None:
    made = by("mixed:0.9", draft, context)
    assert len(lower(made)) < len(lower(by("int8", draft, context)))
    none = by("mixed:0.9,budget=1e9", draft, context)
    assert not none.encodings


def test_foreign_graphs_are_compressed_too(tmp_path: Path, context: Context) -> None:
    foreign = open_draft(tiny_bundle(tmp_path / "v1"))
    history = np.array([[0, 0, 0, 0, 0, 1, 2, 3]])
    exact, _ = in_memory(foreign).score(history, len(ITEMS))
    tied = by("tie", foreign, context)
    assert len(lower(tied)) < len(lower(foreign))
    np.testing.assert_array_equal(in_memory(tied).score(history, len(ITEMS))[0], exact)
    for recipe in ("int8", "weights:4", "prune:0.5", "tie + int8"):
        found, _ = in_memory(by(recipe, foreign, context)).score(history, len(ITEMS))
        assert sorted(found[0]) == sorted(exact[0])
    with pytest.raises(ForeignGraphError, match="need a float32 bundle"):
        by("layers:1", foreign, context)
    with pytest.raises(CompressionError, match="stored once already"):
        by("tie", tied, context)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("prune:1.0", "must be at least 0 and below 1"),
        ("prune:0.5,parts=nowhere", "no weight belongs"),
        ("prune:0.5,scope=row", "must be global or layer"),
        ("layers:3", "between 1 and 2"),
        ("width:0", "between 1 and 32"),
        ("history:99", "between 1 and 12"),
        ("heads:1.5", "below 1"),
        ("blocks:3", "must be 4 or 8"),
        ("int4:head=1.5", "must be at least 0 and below 1"),
        ("static:range=wide", "must be one of"),
        ("mixed:objective=beauty", "must be size or latency"),
        ("finetune:taught=2", "between 0 and 1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(
    draft: Draft, context: Context, recipe: str, message: str
) -> None:
    with pytest.raises(CompressionError, match=message):
        by(recipe, draft, context)


@pytest.mark.parametrize("recipe", ["layers:1", "mixed", "static", "neurons:0.5", "finetune"])
def test_methods_that_look_at_events_say_so(draft: Draft, recipe: str) -> None:
    with pytest.raises(CompressionError, match="give --events"):
        by(recipe, draft, Context())


def test_a_saved_draft_is_a_sound_bundle_that_names_its_parent(
    draft: Draft, context: Context, tmp_path: Path
) -> None:
    path = save(by("prune:0.5 + int4", draft, context), tmp_path / "v-int4", golden=HISTORY)
    manifest = read_manifest(path)
    assert manifest.parents == ["v-fp32"]
    assert manifest.recipe == "prune:0.5 + int4"
    assert manifest.precision == "int4"
    open_bundle(path)
    with pytest.raises(BundleError, match="never overwritten"):
        save(draft, path)
    with pytest.raises(CompressionError, match="compress the float32 bundle"):
        open_draft(path)


def test_a_broken_bundle_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "v1")
    (path / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(BundleError):
        open_draft(path)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 70), share=st.floats(0, 1),
    bits=st.sampled_from([4, 8, 32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_tensor_comes_out_of_storage_as_it_went_in(
    rows: int, columns: int, share: float, bits: int, seed: int
) -> None:
    import onnxruntime as ort

    rng = np.random.default_rng(seed)
    top = 2 ** (min(bits, 8) - 1) - 1
    value = rng.integers(-top, top + 1, (rows, columns)).astype(np.int8 if bits < 32 else "f")
    value[rng.random((rows, columns)) < share] = 0
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["out"])], "g", [],
        [helper.make_tensor_value_info("out", kind, list(value.shape))],
        [numpy_helper.from_array(value, "w")] if bits == 32 else [],
    )  # fmt: skip
    rewriter = Rewriter(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    if bits == 32:
        rewriter.store_floats("w", value)
    else:
        rewriter.store_integers("w", value, bits)
    session = ort.InferenceSession(rewriter.finish(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], value)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([4, 8]), axis=st.sampled_from([0, 1]), seed=st.integers(0, 99),
    zero=st.booleans(),
)  # fmt: skip
def test_rounding_is_within_half_a_step_or_clipped(
    bits: int, axis: int, seed: int, zero: bool
) -> None:
    weight = np.random.default_rng(seed).normal(size=(9, 7)).astype(np.float32)
    if zero:
        weight[3], weight[:, 2] = 0.0, 0.0
    rows = Rows(bits, axis, True)
    scale = rows.scale(weight, np)
    error = np.abs(rows.rounded(weight, np) - weight)
    clipped = np.abs(weight) > scale * (2 ** (bits - 1) - 0.5)
    assert (error[~clipped] <= np.broadcast_to(scale / 2, weight.shape)[~clipped] + 1e-6).all()
    assert np.isfinite(scale).all()
    integers, scale = rows.integers(weight)
    np.testing.assert_allclose(integers * scale, rows.rounded(weight, np), atol=1e-6)
