"""What each recipe saves and costs: size, load time, latency, scores, ranking."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from models.files import write_whole
from models.rankers.data import Rows
from models.rankers.errors import RankerError
from models.rankers.graph import feed, find_score, open_session, scores, to_bytes
from models.rankers.quality import AT, bootstrap_interval, ndcg_by_group
from models.rankers.recipe import PACK, Recipe, apply_recipes

BATCHES = (100, 1000)
ORIGINAL = "original"
REPORT_FILE = "report.json"
_LOADS = 5
_MIN_RUNS, _MAX_RUNS = 20, 200
#: Latency ratios closer to 1 than this are noise on a busy machine.
_NOISE = 0.05


@dataclass(frozen=True)
class Variant:
    """A model as it is stored."""

    name: str
    data: bytes
    file_name: str | None = None


def compress_ranker(
    model: ModelProto,
    original: bytes,
    recipes: Sequence[Recipe],
    calibration: Rows,
    test: Rows | None = None,
    *,
    seconds: float = 1.0,
) -> tuple[list[Variant], dict[str, Any]]:
    """Apply `recipes`; the variants, the original first, and their report.

    Args:
        original: the bytes that `model` was read from.
        calibration: what the methods look at.
        test: what the report is about; `calibration` where None.
        seconds: how long to measure the latency of a variant at a batch size, about.

    Raises:
        RecipeError: a step does not apply to this kind of model.
        RankerError: the data does not fit the model.
    """
    packed, *made = apply_recipes(model, [PACK, *recipes], calibration.features)
    variants = [
        Variant(ORIGINAL, original),
        *(
            Variant(str(recipe), to_bytes(smaller), recipe.file_name)
            for recipe, smaller in zip(recipes, made, strict=True)
        ),
    ]
    return variants, measure(
        model, variants, test or calibration, len(to_bytes(packed)), seconds=seconds
    )


def measure(
    model: ModelProto,
    variants: Sequence[Variant],
    rows: Rows,
    packed_bytes: int,
    *,
    seconds: float,
) -> dict[str, Any]:
    """The report on `variants` of `model`, the original first; `packed_bytes` is what the model
    takes that differs from the original in nothing but its form.

    Latencies of the variants are taken in turns, so that a busy machine is busy for all.
    """
    score = find_score(model)
    inputs = feed(model, rows.features)
    sessions = {variant.name: open_session(variant.data) for variant in variants}
    found = {name: scores(session, score, inputs) for name, session in sessions.items()}
    if not np.isfinite(found[ORIGINAL]).all():
        raise RankerError("the model's scores on this data are not all finite: check the features")
    latency = {
        batch: _latency(
            sessions, score.output, feed(model, _repeated(rows.features, batch)), seconds
        )
        for batch in BATCHES
    }
    base: dict[str, Any] = {}
    entries = []
    for variant in variants:
        entry: dict[str, Any] = {
            "recipe": variant.name,
            "file": variant.file_name,
            "bytes": len(variant.data),
            "load_ms": _load_ms(variant.data),
            "latency_ms": {str(batch): latency[batch][variant.name] for batch in BATCHES},
            **_agreement(found[ORIGINAL], found[variant.name]),
            **_ranking(found[ORIGINAL], found[variant.name], rows),
        }
        base = base or entry
        entry["size_ratio"] = round(base["bytes"] / entry["bytes"], 3)
        entry["latency_ratio"] = {
            str(b): round(latency[b][ORIGINAL]["cpu"] / latency[b][variant.name]["cpu"], 3)
            for b in BATCHES
        }
        entry["notes"] = _notes(entry, packed_bytes) if variant.name != ORIGINAL else []
        entries.append(entry)
    return {
        "onnxruntime": ort.__version__,
        "rows": len(rows.features),
        "features": rows.features.shape[1],
        "variants": entries,
    }


def write_variants(folder: Path, variants: Sequence[Variant], report: dict[str, Any]) -> None:
    """Write each variant but the original, then the report; each file appears whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        if variant.file_name is not None:
            write_whole(folder / variant.file_name, variant.data)
    write_whole(folder / REPORT_FILE, json.dumps(report, indent=1).encode() + b"\n")


def report_table(report: dict[str, Any]) -> str:
    """The report as text."""
    graded = "ndcg" in report["variants"][0]
    head = f"{'recipe':<42}{'bytes':>10}{'size':>7}{'load ms':>9}"
    head += "".join(f"{f'p50/p99 ms @{batch}':>20}{'speed':>7}" for batch in BATCHES)
    head += f"{'max diff':>10}{'mean diff':>10}{'kendall':>9}{'spearman':>9}"
    head += f"{f'NDCG@{AT}':>9}{'difference (95 % interval)':>31}" if graded else ""
    lines = [head]
    for row in report["variants"]:
        line = f"{row['recipe']:<42}{row['bytes']:>10,}{row['size_ratio']:>6.1f}x"
        line += f"{row['load_ms']:>9.2f}"
        for batch in map(str, BATCHES):
            times = row["latency_ms"][batch]
            line += (
                f"{times['p50']:>12.3f}/{times['p99']:<7.3f}{row['latency_ratio'][batch]:>6.2f}x"
            )
        line += f"{row['max_difference']:>10.2g}{row['mean_difference']:>10.2g}"
        line += f"{_figure(row['kendall'])}{_figure(row['spearman'])}"
        if graded:
            low, high = row["ndcg_difference_95"]
            line += f"{row['ndcg']:>9.4f}{row['ndcg_difference']:>+13.4f}"
            line += f" ({low:+.4f}, {high:+.4f})"
        lines.append(line.rstrip() + (f"  {'; '.join(row['notes'])}" if row["notes"] else ""))
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:>9.4f}"


def _notes(entry: dict[str, Any], packed_bytes: int) -> list[str]:
    notes = []
    if entry["size_ratio"] < 1:
        notes.append("LARGER than the original")
    elif entry["size_ratio"] == 1:
        notes.append("not worth it: no smaller")
    elif entry["recipe"] != str(PACK) and entry["bytes"] >= packed_bytes:
        notes.append("not worth it: no smaller than pack")
    slower = [b for b, ratio in entry["latency_ratio"].items() if ratio < 1 - _NOISE]
    if slower:
        notes.append(f"SLOWER at batch {' and '.join(slower)}")
    if "ndcg_difference_95" in entry and entry["ndcg_difference_95"][1] < 0:
        notes.append(f"NDCG@{AT} is lower beyond chance")
    return notes


def _agreement(one: NDArray[np.float64], two: NDArray[np.float64]) -> dict[str, Any]:
    from scipy.stats import kendalltau, spearmanr  # noqa: PLC0415 - heavy

    difference = np.abs(one - two)
    constant = np.ptp(one) == 0 or np.ptp(two) == 0
    kendall, spearman = math.nan, math.nan
    if not constant:
        kendall, spearman = kendalltau(one, two).statistic, spearmanr(one, two).statistic
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "kendall": None if math.isnan(kendall) else round(float(kendall), 6),
        "spearman": None if math.isnan(spearman) else round(float(spearman), 6),
    }


def _ranking(one: NDArray[np.float64], two: NDArray[np.float64], rows: Rows) -> dict[str, Any]:
    if rows.labels is None or rows.groups is None:
        return {}
    before = ndcg_by_group(one, rows.labels, rows.groups)
    after = ndcg_by_group(two, rows.labels, rows.groups)
    if not len(before):
        raise RankerError("no group has a label above 0: NDCG needs one (check --labels)")
    low, high = bootstrap_interval(after - before)
    return {
        "groups": len(before),
        "ndcg": round(float(after.mean()), 5),
        "ndcg_difference": round(float((after - before).mean()), 5),
        "ndcg_difference_95": [round(low, 5), round(high, 5)],
    }


def _repeated(features: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    return features[np.arange(count) % len(features)]


def _latency(
    sessions: dict[str, ort.InferenceSession],
    output: str,
    inputs: dict[str, NDArray[Any]],
    seconds: float,
) -> dict[str, dict[str, float]]:
    """Milliseconds by variant: `p50` and `p99` on the clock, and `cpu`, the median of the calling
    thread's own time, which tells variants apart on a busy machine too."""
    clock: dict[str, list[float]] = {name: [] for name in sessions}
    own: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run([output], inputs)
    spent = 0.0
    for number in range(_MAX_RUNS):
        if number >= _MIN_RUNS and spent > seconds * len(sessions):
            break
        for name, session in sessions.items():
            started, started_own = time.perf_counter(), time.thread_time()
            session.run([output], inputs)
            own[name].append(time.thread_time() - started_own)
            clock[name].append(time.perf_counter() - started)
            spent += clock[name][-1]
    return {
        name: {
            "p50": round(float(np.percentile(clock[name], 50)) * 1000, 4),
            "p99": round(float(np.percentile(clock[name], 99)) * 1000, 4),
            "cpu": round(float(np.median(own[name])) * 1000, 4),
        }
        for name in sessions
    }


def _load_ms(data: bytes) -> float:
    times = []
    for _ in range(_LOADS):
        started = time.perf_counter()
        open_session(data)
        times.append(time.perf_counter() - started)
    return round(float(np.median(times)) * 1000, 3)
