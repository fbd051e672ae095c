"""The shipped model, made from MovieLens 100K: train, export, quantize, evaluate, write bundles.

Two trainings, since they answer two questions:

- leave-one-out, the protocol of the published figures: how good is the model, and what does int8
  cost? It leaks the future across users, so it says little about a live stream.
- global time: trained on the first 80 % of events only. This one ships, so that the demo's hit rate
  over the last 20 % is about events that the model cannot have seen.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.dataset import (
    Interactions,
    Queries,
    index_interactions,
    leave_one_out,
    next_events,
    padded,
)
from models.evaluate import Accuracy, Score, accuracy, bundle_score, popularity_score, ranks
from models.export import export
from models.quantize import quantize_int8
from models.sasrec import Params, Shape
from models.train import Recipe, fit
from worker.bundle import Bundle, open_bundle, write_bundle
from worker.local.ml100k import load_ml100k

NAME = "posts"
#: Share of the events, by time, that the shipped model is trained on.
TRAIN_SHARE = 0.8
#: Share that chooses the number of epochs, before training on all of TRAIN_SHARE.
VALIDATION_START = 0.7
LATENCY_BATCHES = (1, 16, 64, 256)


@dataclass(frozen=True)
class Made:
    """Bundles of one training, and what they score."""

    fp32: Path
    int8: Path
    report: dict[str, Any]


def train_ml100k(registry: Path, work: Path, recipe: Recipe, *, stamp: str) -> dict[str, Any]:
    """Train both models; the global-time one goes to `registry`, the other to `work`.

    Args:
        stamp: begins the versions, a time such as `20261124T1400Z`.

    Returns:
        The report, as written to `<registry>/report.json`.
    """
    source = load_ml100k()
    data = index_interactions(source.users.tolist(), source.items.tolist())
    shape = Shape(data.item_count)
    provenance = {"data": "MovieLens 100K", "data_sha256": source.sha256, "seed": str(recipe.seed)}

    started = time.monotonic()
    train, validation, test = leave_one_out(data)
    params, epochs = fit(train, shape, recipe, validation=validation)
    popularity = popularity_score(np.concatenate(train), data.item_count)
    loo = _make(
        work, f"{stamp}-loo", params, shape, data, test, popularity,
        {**provenance, "split": "leave-one-out", "epochs": str(epochs)},
    )  # fmt: skip
    loo.report["training_s"] = round(time.monotonic() - started, 1)

    started = time.monotonic()
    _, epochs = fit(
        data.until(VALIDATION_START).sequences(),
        shape,
        recipe,
        validation=next_events(data, VALIDATION_START, TRAIN_SHARE),
    )
    past = data.until(TRAIN_SHARE)
    params, _ = fit(past.sequences(), shape, replace(recipe, epochs=epochs), validation=None)
    popularity = popularity_score(past.items, data.item_count)
    timed = _make(
        registry, stamp, params, shape, data, next_events(data, TRAIN_SHARE, 1.0), popularity,
        {**provenance, "split": f"first {TRAIN_SHARE:.0%} of events", "epochs": str(epochs)},
    )  # fmt: skip
    timed.report["training_s"] = round(time.monotonic() - started, 1)

    report = {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": msgspec.to_builtins(recipe),
        "leave_one_out": loo.report,
        "global_time": timed.report,
        "cost": {
            precision: _cost(open_bundle(path))
            for precision, path in (("fp32", timed.fp32), ("int8", timed.int8))
        },
    }
    (registry / "report.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
    )
    return report


def _make(
    registry: Path,
    stamp: str,
    params: Params,
    shape: Shape,
    data: Interactions,
    test: Queries,
    popularity: Score,
    provenance: dict[str, str],
) -> Made:
    """Write the fp32 and the int8 bundle, with their accuracy on `test` in the manifests."""
    golden = padded(_golden_histories(test), shape.length)
    report: dict[str, Any] = {"queries": len(test)}
    report["popularity"] = accuracy(ranks(popularity, test, length=shape.length)).as_metrics()
    fp32 = export(params, shape)
    paths: dict[str, Path] = {}
    for precision, model, recipe in (
        ("fp32", fp32, "SASRec, 2 blocks, d=64, cross-entropy over the catalogue"),
        ("int8", quantize_int8(fp32), "fp32 + full dynamic int8, item table by row"),
    ):
        version = f"{stamp}-{precision}"
        fields: dict[str, Any] = {
            "model": model,
            "items": data.item_ids,
            "golden_histories": golden,
            "name": NAME,
            "version": version,
            "surface": "posts",
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "precision": precision,
            "recipe": recipe,
            "max_length": shape.length,
            "min_length": 1,
            "parents": [] if precision == "fp32" else [f"{stamp}-fp32"],
            "provenance": provenance,
            # int8 sums differ in their last bits between processors' instruction sets.
            "golden_tolerance": 1e-3 if precision == "fp32" else 0.25,
        }
        # The figures belong into the manifest, and come from the bundle itself.
        trial = write_bundle(registry / ".trial" / version, **fields)
        measured = _measured(open_bundle(trial), test)
        report[precision] = measured.as_metrics()
        paths[precision] = write_bundle(
            registry / NAME / version, metrics=measured.as_metrics(), **fields
        )
        shutil.rmtree(trial)
    shutil.rmtree(registry / ".trial")
    return Made(paths["fp32"], paths["int8"], report)


def _measured(bundle: Bundle, test: Queries) -> Accuracy:
    return accuracy(ranks(bundle_score(bundle), test, length=bundle.manifest.max_length))


def _golden_histories(test: Queries) -> Sequence[NDArray[np.int64]]:
    return [test.histories[place] for place in np.linspace(0, len(test) - 1, 4).astype(int)]


def _cost(bundle: Bundle) -> dict[str, Any]:
    """Size on disk in bytes, and milliseconds per batch with one thread (median of 30)."""
    manifest = bundle.manifest
    rng = np.random.default_rng(0)
    latency = {}
    for batch in LATENCY_BATCHES:
        history = rng.integers(1, manifest.item_count + 1, (batch, manifest.max_length))
        times = []
        for _ in range(33):
            started = time.perf_counter()
            bundle.score(history, 60)
            times.append(time.perf_counter() - started)
        latency[str(batch)] = round(float(np.median(times[3:])) * 1000, 3)
    return {
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "latency_ms_by_batch": latency,
    }
