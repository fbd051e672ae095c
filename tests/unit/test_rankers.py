"""Compressed re-rankers: what each transformation promises, over random small forests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from models.rankers.compact import compact, same_outputs
from models.rankers.errors import RecipeError
from models.rankers.forest import (
    LEAF,
    Forest,
    on_forests,
    read_forest,
    shared_attributes,
    write_forest,
)
from models.rankers.graph import feed, open_session, ranker_nodes, to_bytes
from models.rankers.linear import prune_features, quantize_coefficients, read_linear
from models.rankers.quality import bootstrap_interval, ndcg_by_group
from models.rankers.recipe import apply_recipe, parse_recipe
from models.rankers.svm import prune_vectors
from models.rankers.trees import (
    collapse_bound,
    collapse_splits,
    drop_decided,
    prune_trees,
    quantize_leaves,
    quantize_thresholds,
)

FEATURES = 3
PER_NODE = ("feature", "threshold", "mode", "true", "false", "missing", "value")
SLOW = settings(max_examples=25, deadline=None)


def random_forest(seed: int, *, trees: int = 4, depth: int = 4, targets: int = 1) -> Forest:
    """Trees of random shape; thresholds and leaf values from coarse grids, so that some repeat."""
    rng = np.random.default_rng(seed)
    nodes: list[list[Any]] = []

    def grow(left: int) -> int:
        place = len(nodes)
        nodes.append([])
        if left == 0 or rng.random() < 0.2:
            value = np.zeros(targets)
            value[rng.integers(targets)] = rng.integers(-8, 9) / 4
            nodes[place] = [0, 0.0, LEAF, -1, -1, False, value]
            return place
        test = [rng.integers(FEATURES), rng.integers(-6, 7) / 3, rng.integers(2)]
        nodes[place] = [
            *test,
            grow(left - 1),
            grow(left - 1),
            rng.random() < 0.3,
            np.zeros(targets),
        ]
        return place

    roots = [grow(depth) for _ in range(trees)]
    columns = list(zip(*nodes, strict=True))
    return Forest(
        roots=np.array(roots),
        feature=np.array(columns[0], dtype=np.int64),
        threshold=np.array(columns[1], dtype=np.float32),
        mode=np.array(columns[2], dtype=np.uint8),
        true=np.array(columns[3], dtype=np.int64),
        false=np.array(columns[4], dtype=np.int64),
        missing=np.array(columns[5], dtype=bool),
        value=np.array(columns[6], dtype=np.float32),
        aggregate="SUM",
        base=np.zeros(targets, np.float32),
    ).tidied()


def random_rows(seed: int, count: int = 200) -> np.ndarray[Any, Any]:
    """Some values on the thresholds' grid, some missing."""
    rng = np.random.default_rng(seed + 1)
    rows = rng.normal(size=(count, FEATURES)).astype(np.float32)
    rows[::3] = (rng.integers(-6, 7, rows[::3].shape) / 3).astype(np.float32)
    rows[::7, 0] = np.nan
    return rows


def regressor(forest: Forest) -> onnx.ModelProto:
    """The forest as the operator of old exporters."""
    bare = helper.make_node(
        "TreeEnsembleRegressor", ["X"], ["score"], domain="ai.onnx.ml",
        n_targets=forest.value.shape[1], nodes_hitrates=[1.0] * len(forest.mode),
    )  # fmt: skip
    return model_of([write_forest(bare, forest)], forest.value.shape[1])


def on_average(forest: Forest) -> onnx.ModelProto:
    """`regressor`, with the operator told to average its trees."""
    model = regressor(forest)
    model.graph.node[0].attribute.append(helper.make_attribute("aggregate_function", "AVERAGE"))
    return model


def model_of(nodes: list[Any], outputs: int, features: int = FEATURES) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "ranker",
        [value("X", TensorProto.FLOAT, [None, features])],
        [value("score", TensorProto.FLOAT, [None, outputs])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def run(model: onnx.ModelProto, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = open_session(to_bytes(model)).run(None, feed(model, rows))[-1]
    return found


@SLOW
@given(st.integers(0, 10**6), st.sampled_from([1, 3]))
def test_forests_score_as_onnx_runtime_does(seed: int, targets: int) -> None:
    forest, rows = random_forest(seed, targets=targets), random_rows(seed)
    np.testing.assert_allclose(run(regressor(forest), rows), forest.score(rows), atol=1e-5)


@SLOW
@given(st.integers(0, 10**6), st.sampled_from([1, 3]))
def test_packing_is_lossless_and_smaller(seed: int, targets: int) -> None:
    model, rows = regressor(random_forest(seed, trees=12, targets=targets)), random_rows(seed)
    packed = compact(model, rows)
    assert len(to_bytes(packed)) < len(model.SerializeToString()) / 2
    assert [node.op_type for node in ranker_nodes(packed, ["TreeEnsemble"])] == ["TreeEnsemble"]
    np.testing.assert_allclose(run(packed, rows), run(model, rows), atol=1e-5)


@SLOW
@given(st.integers(0, 10**6))
def test_trees_read_from_the_new_operator_are_those_written(seed: int) -> None:
    forest, rows = random_forest(seed), random_rows(seed)
    packed = compact(regressor(forest), rows)
    again = read_forest(ranker_nodes(packed, ["TreeEnsemble"])[0])
    np.testing.assert_array_equal(again.score(rows), forest.score(rows))


def test_equal_subtrees_are_stored_once_but_twice_where_one_tree_needs_both() -> None:
    # ONNX Runtime refuses a tree that leads to one inner node on two ways.
    # x0 <= 0 ? (x1 <= 0 ? S : 3) : (x2 <= 0 ? S : 4), where S is (x1 <= 1 ? 1 : 2); and S alone.
    leaf = [0, 0.0, LEAF, -1, -1]
    nodes = [
        [0, 0.0, 0, 2, 3], [1, 1.0, 0, 4, 5],  # the roots
        [1, 0.0, 0, 6, 7], [2, 0.0, 0, 8, 9], leaf, leaf,
        [1, 1.0, 0, 10, 11], leaf, [1, 1.0, 0, 12, 13], leaf, leaf, leaf, leaf, leaf,
    ]  # fmt: skip
    columns = list(zip(*nodes, strict=True))
    forest = Forest(
        roots=np.array([0, 1]),
        feature=np.array(columns[0]),
        threshold=np.array(columns[1], np.float32),
        mode=np.array(columns[2], np.uint8),
        true=np.array(columns[3]),
        false=np.array(columns[4]),
        missing=np.zeros(len(nodes), bool),
        value=np.array([[0, 0, 0, 0, 1, 2, 0, 3, 0, 4, 1, 2, 1, 2]], np.float32).T,
        aggregate="SUM",
        base=np.zeros(1, np.float32),
    )
    stored = shared_attributes(forest)
    assert len(stored["nodes_featureids"]) == 5  # of 6 splits
    assert len(stored["leaf_targetids"]) == 4  # of 8 leaves
    rows = random_rows(0)
    packed = compact(regressor(forest), rows)
    assert packed.graph.node[0].op_type == "TreeEnsemble"
    np.testing.assert_array_equal(run(packed, rows), forest.score(rows))


def test_numbers_packed_on_the_wire_read_back_as_the_same_model() -> None:
    model = regressor(random_forest(1))
    node = model.graph.node[0]
    node.attribute.append(helper.make_attribute("odd", [-1, 0, 2**62]))
    data = to_bytes(model)
    assert onnx.load_model_from_string(data) == model
    assert len(data) < len(model.SerializeToString())


@SLOW
@given(st.integers(0, 10**6))
def test_steps_of_size_nothing_change_nothing(seed: int) -> None:
    forest, rows = random_forest(seed), random_rows(seed)
    assert prune_trees(forest, rows, 0.0) is forest
    assert collapse_splits(forest, rows, 0.0) is forest


@SLOW
@given(st.integers(0, 10**6))
def test_thresholds_on_a_grid_that_holds_them_all_change_no_score(seed: int) -> None:
    forest, rows = random_forest(seed, depth=6), random_rows(seed)
    quantized = quantize_thresholds(forest, rows, 4)  # the grid has 13 values
    np.testing.assert_array_equal(quantized.score(rows), forest.score(rows))
    assert quantized.splits <= forest.splits


@SLOW
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_thresholds_are_at_most_two_to_the_bits_per_feature(seed: int, bits: int) -> None:
    quantized = quantize_thresholds(random_forest(seed, trees=8), random_rows(seed), bits)
    inner = ~quantized.leaves
    for feature in range(FEATURES):
        used = quantized.threshold[inner & (quantized.feature == feature)]
        assert len(np.unique(used)) <= 2**bits


@SLOW
@given(st.integers(0, 10**6))
def test_dropping_decided_splits_changes_no_score(seed: int) -> None:
    forest, rows = random_forest(seed, depth=7), random_rows(seed)
    np.testing.assert_array_equal(drop_decided(forest).score(rows), forest.score(rows))


def test_a_split_that_the_one_above_decides_is_dropped() -> None:
    # x0 <= 0 ? (x0 <= 1 ? 1 : 2) : 3
    forest = Forest(
        roots=np.array([0]),
        feature=np.zeros(5, np.int64),
        threshold=np.array([0, 1, 0, 0, 0], np.float32),
        mode=np.array([0, 0, LEAF, LEAF, LEAF], np.uint8),
        true=np.array([1, 3, -1, -1, -1]),
        false=np.array([2, 4, -1, -1, -1]),
        missing=np.zeros(5, bool),
        value=np.array([[0], [0], [3], [1], [2]], np.float32),
        aggregate="SUM",
        base=np.zeros(1, np.float32),
    )
    assert drop_decided(forest).splits == 1


@SLOW
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_collapsing_moves_no_score_beyond_its_bound(seed: int, share: float) -> None:
    forest = random_forest(seed, depth=5)
    collapsed = collapse_splits(forest, random_rows(seed), share)
    bound = collapse_bound(forest, collapsed)
    unseen = random_rows(seed + 99)
    moved = np.abs(collapsed.score(unseen) - forest.score(unseen)).max()
    assert moved <= bound + 1e-5
    assert collapsed.splits <= forest.splits - int(forest.splits * share)


def test_collapsing_cuts_first_where_no_calibration_row_comes() -> None:
    forest = random_forest(3, trees=3, depth=6)
    rows = np.full((50, FEATURES), -5.0, np.float32)
    dead = int(((forest.reach(rows) == 0) & ~forest.leaves).sum())
    collapsed = collapse_splits(forest, rows, 0.9 * dead / forest.splits)
    assert dead > 0 and collapsed.splits < forest.splits
    np.testing.assert_allclose(collapsed.score(rows), forest.score(rows), atol=1e-6)


@SLOW
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_leaves_have_at_most_two_to_the_bits_values(seed: int, bits: int) -> None:
    forest, rows = random_forest(seed, trees=8), random_rows(seed)
    quantized = quantize_leaves(forest, rows, bits)
    spoken = quantized.value[quantized.leaves & (forest.value[:, 0] != 0)]
    assert len(np.unique(spoken)) <= 2**bits
    worst = np.abs(quantized.value - forest.value).max() * len(forest.roots)
    assert np.abs(quantized.score(rows) - forest.score(rows)).max() <= worst + 1e-5


def test_as_many_leaf_levels_as_values_change_no_score() -> None:
    forest, rows = random_forest(5, trees=8), random_rows(5)
    quantized = quantize_leaves(forest, rows, 6)  # the grid has 17 values
    np.testing.assert_array_equal(quantized.value, forest.value)


def test_pruning_drops_the_trees_that_say_nothing_first() -> None:
    forest, rows = random_forest(2, trees=6, depth=5), random_rows(2)
    tree = forest.tree_of()
    dull = replace(forest, value=np.where((tree < 3)[:, None], 0.0, forest.value).astype("f"))
    pruned = prune_trees(dull, rows, 0.5)
    assert len(pruned.roots) == 3
    np.testing.assert_allclose(pruned.score(rows), dull.score(rows), atol=1e-4)


def test_pruning_equal_trees_of_a_mean_keeps_the_mean() -> None:
    one, rows = random_forest(4, trees=1, depth=5), random_rows(4)
    size = len(one.mode)
    starts = np.repeat(np.arange(8) * size, size)
    fields = {name: np.concatenate([getattr(one, name)] * 8) for name in PER_NODE}
    for side in ("true", "false"):
        fields[side] = np.where(fields[side] < 0, -1, fields[side] + starts)
    forest = replace(one, roots=np.arange(8) * size + one.roots, aggregate="AVERAGE", **fields)
    model = on_average(forest)
    np.testing.assert_allclose(run(model, rows), one.score(rows), atol=1e-5)
    packed = compact(model, rows)
    pruned = on_forests(packed, rows, lambda trees, seen: prune_trees(trees, seen, 0.75))
    np.testing.assert_allclose(run(pruned, rows), one.score(rows), atol=1e-4)


def test_pruning_trees_that_are_not_summed_is_refused() -> None:
    forest = replace(random_forest(0), aggregate="MAX")
    with pytest.raises(RecipeError, match="combined by MAX"):
        prune_trees(forest, random_rows(0), 0.5)


@SLOW
@given(
    st.integers(0, 10**6),
    st.permutations(["prune:0.5", "collapse:0.3", "thresholds:2", "leaves:2", "pack"]),
)
def test_steps_compose_in_any_order_and_never_grow_the_model(seed: int, steps: list[str]) -> None:
    model, rows = regressor(random_forest(seed, trees=6)), random_rows(seed)
    recipe = parse_recipe(" + ".join(steps))
    size = len(to_bytes(compact(model, rows)))
    made = apply_recipe(model, recipe, rows)
    assert len(to_bytes(made)) <= size
    assert np.isfinite(run(made, rows)).all()


def test_a_recipe_equals_its_steps_one_after_another() -> None:
    model, rows = regressor(random_forest(8, trees=6)), random_rows(8)
    whole = apply_recipe(model, parse_recipe("prune:0.5 + leaves:2"), rows)
    half = apply_recipe(model, parse_recipe("prune:0.5"), rows)
    parts = apply_recipe(half, parse_recipe("leaves:2"), rows)
    assert to_bytes(whole) == to_bytes(parts)


def test_a_transformation_leaves_its_model_as_it_was() -> None:
    model, rows = regressor(random_forest(8)), random_rows(8)
    before = model.SerializeToString()
    apply_recipe(model, parse_recipe("prune:0.5 + collapse:0.5 + thresholds:1 + leaves:1"), rows)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    "text",
    ["", "prune", "prune:1", "prune:-0.1", "leaves:0", "leaves:2.5", "coefficients:3", "shrink:2",
     "prune:nan", "prune:0.5 +"],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused_with_what_does(text: str) -> None:
    with pytest.raises(RecipeError, match="steps are pack"):
        parse_recipe(text)


def test_a_recipe_reads_back_as_it_is_written() -> None:
    recipe = parse_recipe("prune:0.50+thresholds:8 +leaves:8")
    assert str(recipe) == "prune:0.5 + thresholds:8 + leaves:8"
    assert parse_recipe(str(recipe)) == recipe
    assert recipe.file_name == "prune-0.5+thresholds-8+leaves-8.onnx"


def test_a_step_for_another_kind_of_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="coefficients does not apply"):
        apply_recipe(regressor(random_forest(0)), parse_recipe("coefficients:8"), random_rows(0))


def linear(features: int, seed: int = 0) -> onnx.ModelProto:
    weights = np.random.default_rng(seed).normal(size=features)
    node = helper.make_node(
        "LinearRegressor", ["X"], ["score"], domain="ai.onnx.ml",
        coefficients=weights.tolist(), intercepts=[0.5],
    )  # fmt: skip
    return model_of([node], 1, features)


@pytest.mark.parametrize(("bits", "times", "correlation"), [(8, 3.0, 0.9999), (4, 5.0, 0.98)])
def test_many_coefficients_shrink_to_their_bits(
    bits: int, times: float, correlation: float
) -> None:
    model = linear(2001)
    rows = np.random.default_rng(1).normal(size=(100, 2001)).astype(np.float32)
    made = quantize_coefficients(model, rows, bits)
    assert len(to_bytes(made)) * times < len(model.SerializeToString())
    assert np.corrcoef(run(made, rows).ravel(), run(model, rows).ravel())[0, 1] > correlation


def test_few_coefficients_are_left_alone() -> None:
    model, rows = linear(10), np.random.default_rng(1).normal(size=(50, 10)).astype(np.float32)
    assert quantize_coefficients(model, rows, 8) is model
    assert prune_features(model, rows, 0.3) is model


def test_a_pruned_feature_that_never_moves_costs_nothing() -> None:
    model = linear(400)
    rows = np.random.default_rng(1).normal(size=(50, 400)).astype(np.float32)
    rows[:, 100:] = 3.0  # large, and the same for every row
    made = prune_features(model, rows, 0.75)
    assert len(to_bytes(made)) < len(to_bytes(model)) / 2
    kept = read_linear(ranker_nodes(made, ["LinearRegressor"])[0])
    assert kept.weights.shape == (1, 100)
    np.testing.assert_allclose(run(made, rows), run(model, rows), atol=1e-3)


def svr(kernel: str, vectors: int = 60, seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    node = helper.make_node(
        "SVMRegressor", ["X"], ["score"], domain="ai.onnx.ml", kernel_type=kernel,
        kernel_params=[0.5, 0.0, 3.0], n_supports=vectors, rho=[0.25], post_transform="NONE",
        coefficients=rng.normal(size=vectors).tolist(),
        support_vectors=rng.normal(size=vectors * FEATURES).tolist(),
    )  # fmt: skip
    return model_of([node], 1)


def test_a_linear_kernel_becomes_its_weights() -> None:
    model, rows = svr("LINEAR"), np.random.default_rng(2).normal(size=(40, 3)).astype(np.float32)
    packed = compact(model, rows)
    assert [node.op_type for node in packed.graph.node] == ["LinearRegressor"]
    assert same_outputs(model, packed, rows)


def test_fewer_support_vectors_are_refitted_to_the_whole_decision() -> None:
    model, rows = svr("RBF", 200), np.random.default_rng(2).normal(size=(400, 3)).astype(np.float32)
    made = prune_vectors(model, rows, 0.5)
    assert len(to_bytes(made)) < 0.6 * len(to_bytes(model))
    fresh = np.random.default_rng(3).normal(size=(400, 3)).astype(np.float32)
    assert np.corrcoef(run(made, fresh).ravel(), run(model, fresh).ravel())[0, 1] > 0.99


def test_ndcg_of_ties_is_the_mean_over_their_orders() -> None:
    scores, groups = np.zeros(4), np.zeros(4, np.int64)
    expected = np.mean(1 / np.log2(np.arange(4) + 2))
    for place in range(4):
        found = ndcg_by_group(scores, np.eye(4)[place], groups)
        assert found == pytest.approx([expected])


def test_ndcg_takes_groups_apart_and_leaves_out_those_without_a_positive() -> None:
    labels = np.array([0.0, 1, 0, 0, 1, 0])
    scores = np.array([1.0, 2, 0, 9, 1, 3])
    groups = np.array([7, 7, 5, 5, 9, 9])
    found = ndcg_by_group(scores, labels, groups)
    np.testing.assert_allclose(found, [1.0, 1 / np.log2(3)])


def test_the_interval_of_no_difference_is_zero() -> None:
    assert bootstrap_interval(np.zeros(30)) == (0.0, 0.0)
    low, high = bootstrap_interval(np.random.default_rng(0).normal(1.0, 1.0, 100))
    assert 0.5 < low < 1.0 < high < 1.5
