"""Train re-rankers on MovieLens 100K, compress them, and see what that saves and costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from models.rankers.data import Rows
from models.rankers.features import NAMES, Asked, rating_queries
from models.rankers.quality import AT, ndcg_by_group
from models.rankers.recipe import parse_recipe
from models.rankers.report import ORIGINAL, Variant, compress_ranker, report_table, write_variants
from worker.bundle import open_bundle
from worker.errors import StreamrecError
from worker.local.ml100k import load_ml100k
from worker.registry import LocalRegistry

TRAIN = Asked(0.02, 0.7, queries=4000, negatives=10)
CALIBRATION = Asked(0.7, 0.8, queries=400, negatives=50)
TEST = Asked(0.8, 1.0, queries=1000, negatives=50)
#: A kernel machine's training takes the square of its rows.
SVC_ROWS = 3000

TREE_RECIPES = (
    "pack",
    "prune:0.5",
    "collapse:0.5",
    "thresholds:5",
    "leaves:5",
    "thresholds:8 + leaves:8",
    "prune:0.5 + thresholds:8 + leaves:8",
    "prune:0.5 + collapse:0.7 + leaves:6",
    "prune:0.8 + collapse:0.9 + leaves:5",
)
LINEAR_RECIPES = ("pack", "prune:0.3", "coefficients:8")
SVM_RECIPES = ("pack", "prune:0.5", "prune:0.9", "prune:0.97")


def run_demo(registry: Path, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, compress, and `say` the tables; models and reports go to `out` where given.

    Returns:
        Reports by model name, and under "baselines" the NDCG@10 of single features.

    Raises:
        StreamrecError: the data, the shipped model or a package is missing.
    """
    try:
        import skl2onnx  # noqa: F401, PLC0415
        import sklearn  # noqa: F401, PLC0415 - heavy
    except ImportError as error:
        raise StreamrecError(
            f"the demo needs {error.name}: pip install 'streamrec[train,demo]'"
        ) from None
    bundles = LocalRegistry(registry)
    bundle = open_bundle(bundles.path("posts", bundles.serving("posts")))
    train, calibration, test = rating_queries(load_ml100k(), bundle, [TRAIN, CALIBRATION, TEST])
    assert test.labels is not None and test.groups is not None
    reports: dict[str, Any] = {"baselines": {}}
    say(
        f"{TEST.queries} queries of the last 20 % of events, {TEST.negatives} negatives each,"
        f" sampled by popularity; {len(NAMES)} features"
    )
    for name in ("popularity", "sasrec"):
        column = test.features[:, NAMES.index(name)].astype(np.float64)
        figure = float(ndcg_by_group(column, test.labels, test.groups).mean())
        reports["baselines"][name] = round(figure, 5)
        say(f"by {name} alone: NDCG@{AT} {figure:.4f}")
    for name, (model, recipes) in _trained(train).items():
        parsed = [parse_recipe(text) for text in recipes]
        original = bytes(model.SerializeToString())
        variants, report = compress_ranker(model, original, parsed, calibration, test, seconds=0.25)
        reports[name] = report
        say(f"\n{name}\n{report_table(report)}")
        if out is not None:
            stored = [Variant(ORIGINAL, original, "original.onnx"), *variants[1:]]
            write_variants(out / name, stored, report)
    return reports


def _trained(train: Rows) -> dict[str, tuple[onnx.ModelProto, tuple[str, ...]]]:
    """ONNX models by name, with the recipes that suit them."""
    from skl2onnx import to_onnx  # noqa: PLC0415 - heavy
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415
    from sklearn.svm import SVC, LinearSVR  # noqa: PLC0415

    estimators = {
        "gradient-boosting": (
            GradientBoostingClassifier(
                n_estimators=100, max_depth=4, subsample=0.5, random_state=0
            ),
            TREE_RECIPES,
        ),
        "random-forest": (
            RandomForestClassifier(50, min_samples_leaf=5, random_state=0),
            TREE_RECIPES,
        ),
        "logistic-regression": (
            make_pipeline(StandardScaler(), LogisticRegression()),
            LINEAR_RECIPES,
        ),
        "linear-svr": (
            make_pipeline(
                StandardScaler(),
                LinearSVR(epsilon=0, loss="squared_epsilon_insensitive", dual=False),
            ),
            LINEAR_RECIPES,
        ),
        "svc-rbf": (make_pipeline(StandardScaler(), SVC(class_weight="balanced")), SVM_RECIPES),
    }
    made = {}
    assert train.labels is not None
    for name, (estimator, recipes) in estimators.items():
        rows = SVC_ROWS if name == "svc-rbf" else len(train.features)
        estimator.fit(train.features[-rows:], train.labels[-rows:].astype(int))
        options = None if name == "linear-svr" else {id(estimator): {"zipmap": False}}
        model = to_onnx(estimator, train.features[:1], options=options)
        made[name] = (model, recipes)
    return made
