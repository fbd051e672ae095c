"""Compressing re-rankers that scikit-learn made, through the command line and the whole way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from models.commands.rankers import compress_ranker
from models.rankers.compact import compact, same_outputs
from models.rankers.graph import load_ranker, to_bytes
from models.rankers.recipe import apply_recipe, parse_recipe
from worker.errors import StreamrecError


@dataclass(frozen=True)
class Toy:
    """A few groups of rows with labels that a tree can learn."""

    rows: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    groups: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def toy() -> Toy:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(600, 5)).astype(np.float32)
    labels = (rows[:, 0] * rows[:, 1] + 0.3 * rng.normal(size=600) > 0.5).astype(np.int64)
    return Toy(rows, labels, np.arange(600) // 20)


def exported(path: Path, estimator: Any, toy: Toy, **options: Any) -> Path:
    from skl2onnx import to_onnx

    estimator.fit(toy.rows, toy.labels)
    given = {id(estimator): options} if options else None
    path.write_bytes(to_onnx(estimator, toy.rows[:1], options=given).SerializeToString())
    return path


@pytest.fixture(scope="module")
def boosted(tmp_path_factory: pytest.TempPathFactory, toy: Toy) -> Path:
    from sklearn.ensemble import GradientBoostingClassifier

    path = tmp_path_factory.mktemp("rankers") / "boosted.onnx"
    return exported(path, GradientBoostingClassifier(n_estimators=20), toy, zipmap=False)


def stored(folder: Path, toy: Toy) -> Path:
    path = folder / "rows.npz"
    np.savez(path, X=toy.rows, label=toy.labels, query=toy.groups)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(compress_ranker, [str(a) for a in arguments])


def estimators() -> dict[str, Callable[[], Any]]:
    from sklearn.ensemble import (
        ExtraTreesClassifier,
        GradientBoostingRegressor,
        RandomForestClassifier,
        RandomForestRegressor,
    )
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler
    from sklearn.svm import SVC, SVR, LinearSVR

    return {
        "forest": lambda: RandomForestClassifier(8, random_state=0),
        "forest-regressor": lambda: RandomForestRegressor(8, random_state=0),
        "extra-trees": lambda: ExtraTreesClassifier(4, max_depth=5, random_state=0),
        "boosting-regressor": lambda: GradientBoostingRegressor(n_estimators=8),
        "scaled-forest": lambda: make_pipeline(
            StandardScaler(), RandomForestRegressor(4, random_state=0)
        ),
        "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression()),
        "linear": lambda: make_pipeline(Normalizer(), LinearRegression()),
        "linear-svr": lambda: make_pipeline(StandardScaler(), LinearSVR()),
        "svr": SVR,
        "svr-linear": lambda: SVR(kernel="linear"),
        "svc": SVC,
    }


@pytest.mark.parametrize("name", sorted(estimators()))
def test_packing_any_kind_of_ranker_keeps_its_outputs(name: str, toy: Toy, tmp_path: Path) -> None:
    model = load_ranker(exported(tmp_path / "m.onnx", estimators()[name](), toy))
    packed = compact(model, toy.rows[:300])
    assert same_outputs(model, packed, toy.rows[300:])
    assert len(to_bytes(packed)) <= len(model.SerializeToString())
    if "forest" in name or "trees" in name or "boosting" in name:
        assert len(to_bytes(packed)) * 2.5 < len(model.SerializeToString())


@pytest.mark.parametrize("name", sorted(estimators()))
def test_half_of_any_kind_of_ranker_still_ranks_alike(name: str, toy: Toy, tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    from models.rankers.graph import feed, find_score, open_session, scores

    model = load_ranker(exported(tmp_path / "m.onnx", estimators()[name](), toy))
    made = apply_recipe(model, parse_recipe("prune:0.5"), toy.rows)
    score = find_score(model)
    one, two = (
        scores(open_session(to_bytes(m)), score, feed(model, toy.rows)) for m in (model, made)
    )
    assert spearmanr(one, two).statistic > 0.8
    assert len(to_bytes(made)) <= len(model.SerializeToString())


def test_a_classifier_is_ranked_by_its_second_class(toy: Toy, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    from models.rankers.graph import feed, find_score, open_session, scores

    for estimator in (SVC(), LogisticRegression()):
        model = load_ranker(exported(tmp_path / "m.onnx", estimator, toy))
        session = open_session(model.SerializeToString())
        found = scores(session, find_score(model), feed(model, toy.rows))
        assert np.corrcoef(found, estimator.decision_function(toy.rows))[0, 1] > 0.9


def test_three_classes_are_packed_too(toy: Toy, tmp_path: Path) -> None:
    from sklearn.ensemble import GradientBoostingClassifier

    three = Toy(toy.rows, np.digitize(toy.rows[:, 0], [-0.5, 0.5]), toy.groups)
    path = exported(tmp_path / "m.onnx", GradientBoostingClassifier(n_estimators=5), three)
    model = load_ranker(path)
    made = apply_recipe(model, parse_recipe("prune:0.3 + leaves:4"), toy.rows)
    assert "TreeEnsemble" in [node.op_type for node in made.graph.node]
    assert not same_outputs(model, made, toy.rows)
    assert same_outputs(model, compact(model, toy.rows), toy.rows)


def test_the_command_writes_a_model_per_recipe_and_a_report(
    boosted: Path, toy: Toy, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = invoke(
        boosted, "--recipe", "pack", "--recipe", "prune:0.5 + thresholds:8 + leaves:4",
        "--data", stored(tmp_path, toy), "--labels", "label", "--groups", "query", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "pack.onnx", "prune-0.5+thresholds-8+leaves-4.onnx", "report.json",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    original, pack, half = report["variants"]
    assert original["bytes"] == boosted.stat().st_size
    assert pack["size_ratio"] > 2.5 and pack["max_difference"] < 1e-6
    assert half["bytes"] == (out / half["file"]).stat().st_size < pack["bytes"]
    assert half["groups"] <= 30 and abs(half["ndcg_difference"]) < 0.1
    assert "NDCG@10" in done.output and "prune:0.5 + thresholds:8 + leaves:4" in done.output
    load_ranker(out / "pack.onnx")


def test_a_recipe_that_gains_nothing_is_reported_so(toy: Toy, tmp_path: Path) -> None:
    from sklearn.linear_model import LinearRegression

    model = exported(tmp_path / "m.onnx", LinearRegression(), toy)
    done = invoke(
        model,
        "--recipe",
        "coefficients:8",
        "--data",
        stored(tmp_path, toy),
        "--out",
        tmp_path / "o",
    )
    assert done.exit_code == 0, done.output
    assert "not worth it: no smaller than pack" in done.output


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_tables_are_read_with_labels_and_groups_apart(
    form: str, boosted: Path, toy: Toy, tmp_path: Path
) -> None:
    import pyarrow as pa
    from pyarrow import csv, parquet

    columns = {f"f{i}": toy.rows[:, i] for i in range(5)}
    table = pa.table({"query": [f"q{g}" for g in toy.groups], **columns, "label": toy.labels})
    path = tmp_path / f"rows.{form}"
    if form == "csv":
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
    done = invoke(
        boosted, "--recipe", "leaves:4", "--data", path, "--labels", "label",
        "--groups", "query", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["features"] == 5


def cut_short(path: Path, _: Toy, boosted: Path) -> None:
    path.write_bytes(boosted.read_bytes()[:-2000])


def not_onnx(path: Path, _: Toy, boosted: Path) -> None:
    path.write_bytes(b"PK\x03\x04 this is no model")


def empty(path: Path, _: Toy, boosted: Path) -> None:
    path.write_bytes(b"")


def damaged(path: Path, _: Toy, boosted: Path) -> None:
    path.write_bytes(boosted.read_bytes().replace(b"BRANCH_LEQ", b"BRANCH_XXX", 1))


def without_ranker(path: Path, _: Toy, boosted: Path) -> None:
    from tests.conftest import tiny_model

    path.write_bytes(tiny_model())


def wrong_width(path: Path, toy: Toy, boosted: Path) -> None:
    from sklearn.linear_model import LinearRegression

    exported(path, LinearRegression(), Toy(toy.rows[:, :3], toy.labels, toy.groups))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "cannot be read"),
        (cut_short, "cut short|does not load"),
        (not_onnx, "not an ONNX"),
        (empty, "not an ONNX"),
        (damaged, "does not load"),
        (without_ranker, "holds no ranker"),
        (wrong_width, "the data has 5 features, the model wants 3"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_and_nothing_is_written(
    make: Callable[[Path, Toy, Path], None] | None,
    message: str,
    boosted: Path,
    toy: Toy,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.onnx"
    if make is not None:
        make(path, toy, boosted)
    out = tmp_path / "out"
    done = invoke(path, "--recipe", "pack", "--data", stored(tmp_path, toy), "--out", out)
    assert isinstance(done.exception, StreamrecError)
    with pytest.raises(StreamrecError, match=message):
        raise done.exception
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.npz", b"PK\x03\x04 cut", "not a whole .npz"),
        ("rows.csv", b"a,b\n1,x\n", "not all numbers"),
        ("rows.parquet", b"PAR1", "cannot be read"),
        ("rows.txt", b"1 2 3", ".npz, .parquet or .csv"),
        ("missing.csv", None, "is missing"),
    ],
)
def test_calibration_data_that_cannot_be_used_is_refused(
    name: str, content: bytes | None, message: str, boosted: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = invoke(boosted, "--recipe", "pack", "--data", tmp_path / name, "--out", tmp_path / "out")
    assert isinstance(done.exception, StreamrecError)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_missing_label_column_is_named(boosted: Path, toy: Toy, tmp_path: Path) -> None:
    done = invoke(
        boosted, "--recipe", "pack", "--data", stored(tmp_path, toy), "--labels", "clicks",
        "--groups", "query", "--out", tmp_path / "out",
    )  # fmt: skip
    assert "has no 'clicks'; it has X, label, query" in str(done.exception)
