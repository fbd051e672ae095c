"""What methods cost at large catalogues: SYNTHETIC ones, for speed, memory and recall only.

A model with random weights and an item table drawn from a mixture of Gaussians is exported and
compressed by each recipe. Its recommendations mean nothing, so no accuracy is given; recall@10 is
the share of the float32 model's ten best that a variant gives too. It depends on how clustered the
table is: the mixture's spectrum and lengths were set near those of a SASRec table trained on
MovieLens 100K, whose items are a little easier to tell apart.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.compress.draft import Context, open_draft, save
from models.compress.methods import METHODS
from models.compress.recipe import apply, parse
from models.dataset import Queries, padded
from models.export import export
from models.family import Params
from models.files import write_json
from models.measure import BATCHES, Footprint, Latency, footprints, latencies
from models.sasrec import Shape, init
from worker.bundle import Bundle, open_bundle, write_bundle
from worker.manifest import MODEL_FILE

NOTE = (
    "synthetic catalogues with Zipf popularity and random weights: speed, memory and recall only;"
    " the recommendations mean nothing"
)
RECIPES = (
    "topk",
    "int8",
    "int8 + topk",
    "int4 + topk",
    "pq:score=lookup + int8:parts=linear",
    "pq + int8:parts=linear + topk",
    "int8 + cells",
    "pq + int8:parts=linear + cells",
)
#: Zipf's exponent, with the flattened head of real catalogues (Mandelbrot).
_EXPONENT, _FLAT = 1.0, 20.0
_LENGTH = 50
_QUERIES = 512
_AT = 10
#: Scores of one batch above which few variants are open at a time: ONNX Runtime keeps what a
#: session once needed.
_MANY_SCORES = 50_000_000

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    batches: Sequence[int] = BATCHES
    rounds: int = 3
    runs: int = 8
    #: At most, for one variant and batch size.
    seconds: float = 6.0


@dataclass(frozen=True)
class Variant:
    """Figures of one recipe at one catalogue; bytes, seconds, milliseconds."""

    recipe: str
    bytes: int
    made_s: float
    footprint: Footprint
    latency: dict[int, Latency]
    recall: float
    #: What `cells` chose.
    note: str


def item_table(item_count: int, width: int, seed: int) -> NDArray[np.float32]:
    """Synthetic item vectors float32 `[1 + items, width]`; row 0 is zero.

    Centres and the items around them share one spectrum, which decays; lengths are log-normal.
    """
    rng = np.random.default_rng(seed)
    spectrum = (1.0 + np.arange(width)) ** -0.7
    spectrum /= math.sqrt(float((spectrum**2).mean()))
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    centres = rng.normal(size=(4 * math.isqrt(item_count), width))
    table = np.empty((item_count + 1, width), dtype=np.float32)
    step = 1 << 17
    for start in range(0, len(table), step):
        rows = len(table[start : start + step])
        own = 0.75 * centres[rng.integers(0, len(centres), rows)]
        own = (own + 0.66 * rng.normal(size=(rows, width))) * spectrum
        table[start : start + step] = own @ turn * np.exp(0.2 * rng.normal(size=(rows, 1))) * 0.07
    table[0] = 0.0
    return table


def zipf_histories(item_count: int, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Histories of 5 to 50 items, drawn by popularity; items are numbered by it."""
    rng = np.random.default_rng(seed)
    weights = (np.arange(item_count) + _FLAT) ** -_EXPONENT
    edges = np.cumsum(weights / weights.sum())
    return [
        np.searchsorted(edges[:-1], rng.random(rng.integers(5, _LENGTH + 1))).astype(np.int64) + 1
        for _ in range(count)
    ]


def write_synthetic(directory: Path, item_count: int, *, seed: int, length: int = _LENGTH) -> Path:
    """Write the float32 bundle of a synthetic catalogue; it reads histories of `length`."""
    shape = Shape.fresh(item_count, length=length, width=64, blocks=2, heads=2)
    params: Params = init(Shape.fresh(1, length=length, width=64, blocks=2, heads=2), seed)
    params["items"] = item_table(item_count, shape.width, seed)
    for block in params["blocks"]:
        for part in ("qkv", "out", "up", "down"):
            # As large as trained ones, so that a state is more than its last item.
            block[part]["w"] = 5.0 * block[part]["w"]
    histories = padded(zipf_histories(item_count, 4, seed + 1), length)
    return write_bundle(
        directory,
        model=export(params, shape),
        items=[f"item-{number}" for number in range(1, item_count + 1)],
        golden_histories=histories,
        name="synthetic",
        version=directory.name,
        surface="posts",
        created_at="2026-01-01T00:00:00+00:00",
        precision="fp32",
        recipe="synthetic: random weights",
        max_length=length,
        any_length=True,
        provenance={"note": NOTE},
    )


def measure_catalogue(
    item_count: int,
    recipes: Sequence[str],
    work: Path,
    *,
    effort: Effort,
    seed: int = 7,
    progress: Progress = lambda _: None,
) -> list[Variant]:
    """Make and measure float32 and every recipe at one size of catalogue.

    Args:
        work: an existing directory for the bundles; they stay there.

    Raises:
        CompressionError: a recipe is none, or does not apply.
    """
    parsed = [parse(recipe, METHODS) for recipe in recipes]
    progress(f"{item_count:,} items: fp32")
    started = time.perf_counter()
    paths = [write_synthetic(work / "fp32", item_count, seed=seed)]
    seconds = [time.perf_counter() - started]
    draft = open_draft(paths[0])
    context = Context(
        validation=Queries(
            zipf_histories(item_count, _QUERIES, seed + 2), np.ones(_QUERIES, dtype=np.int64)
        ),
        seed=seed,
    )
    notes = [""]
    for number, steps in enumerate(parsed, start=1):
        progress(f"{item_count:,} items: {recipes[number - 1]}")
        started = time.perf_counter()
        made = apply(steps, draft, context)
        paths.append(save(made, work / f"variant-{number}"))
        seconds.append(time.perf_counter() - started)
        notes.append(made.manifest.provenance.get("cells", ""))
        del made
    del draft
    tests = zipf_histories(item_count, _QUERIES, seed + 3)
    few = item_count * max(effort.batches) > _MANY_SCORES
    latency = _latencies(paths, tests, effort, 1 if few else len(paths), progress)
    recalls = _recalls(paths, tests)
    variants = []
    for place, path in enumerate(paths):
        progress(f"memory of {path.name}")
        bundle = open_bundle(path, verify=False)
        manifest = bundle.manifest
        (footprint,) = footprints([bundle], [tests], repeats=1)
        variants.append(
            Variant(
                recipe="fp32" if place == 0 else recipes[place - 1],
                bytes=manifest.files[MODEL_FILE].bytes,
                made_s=seconds[place],
                footprint=footprint,
                latency=latency[place],
                recall=recalls[place],
                note=notes[place],
            )
        )
    return variants


def _latencies(
    paths: Sequence[Path],
    histories: Sequence[NDArray[np.int64]],
    effort: Effort,
    together: int,
    progress: Progress,
) -> list[dict[int, Latency]]:
    """Beside float32, the first, in groups; float32's own are of the first group."""
    found: list[dict[int, Latency]] = []
    for start in range(1, len(paths), together):
        group = [paths[0], *paths[start : start + together]]
        progress(f"latency of {len(group)} variants")
        bundles = [open_bundle(path, verify=False) for path in group]
        part = latencies(
            bundles,
            [histories] * len(bundles),
            batches=effort.batches,
            rounds=effort.rounds,
            runs=effort.runs,
            seconds=effort.seconds,
        )
        found += part if not found else part[1:]
    return found


def _recalls(paths: Sequence[Path], histories: Sequence[NDArray[np.int64]]) -> list[float]:
    tensor = padded(histories, _LENGTH)
    lists = [_best(open_bundle(path, verify=False), tensor) for path in paths]
    exact = lists[0]
    return [
        float(np.mean([len(np.intersect1d(a, b)) / _AT for a, b in zip(own, exact, strict=True)]))
        for own in lists
    ]


def _best(bundle: Bundle, tensor: NDArray[np.int64]) -> NDArray[np.int64]:
    parts = [bundle.score(tensor[n : n + 16], _AT)[0] for n in range(0, len(tensor), 16)]
    return np.concatenate(parts)


def measure_all(
    item_counts: Sequence[int],
    recipes: Sequence[str],
    out: Path,
    *,
    effort: Effort,
    seed: int = 7,
    progress: Progress = lambda _: None,
) -> dict[int, list[Variant]]:
    """Measure catalogues of several sizes; write `scale.json` to `out`, whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[int, list[Variant]] = {}
    for item_count in item_counts:
        work = Path(tempfile.mkdtemp(prefix=".scale-", dir=out))
        try:
            found[item_count] = measure_catalogue(
                item_count, recipes, work, effort=effort, seed=seed, progress=progress
            )
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report = {
        "note": NOTE,
        "seed": seed,
        "catalogues": [{"items": count, "variants": variants} for count, variants in found.items()],
    }
    write_json(out / "scale.json", report)
    return found


def table(found: dict[int, list[Variant]]) -> str:
    """The figures as text."""
    lines = [NOTE]
    for item_count, variants in found.items():
        batches = list(variants[0].latency)
        width = max(len(variant.recipe) for variant in variants)
        lines.append("")
        lines.append(f"{item_count:,} items; ms a batch, one thread: p50 / p99 (times fp32's)")
        head = "".join(f"  {f'batch {size}':>24}" for size in batches)
        lines.append(f"{'':<{width}}  {'MB':>7}  {'load s':>6}  {'RSS MB':>7}  recall{head}")
        for variant in variants:
            cells = "".join(f"  {_cell(variant.latency[size]):>24}" for size in batches)
            lines.append(
                f"{variant.recipe:<{width}}  {variant.bytes / 1e6:7.2f}"
                f"  {variant.footprint.load_s:6.2f}"
                f"  {variant.footprint.resident_bytes / 1e6:7.1f}  {variant.recall:6.4f}{cells}"
            )
        lines += [f"{variant.recipe}: cells {variant.note}" for variant in variants if variant.note]
    return "\n".join(lines)


def _cell(latency: Latency) -> str:
    p99 = f"{latency.p99_ms:.2f}" if latency.p99_ms is not None else "-"
    return f"{latency.p50_ms:.2f} / {p99} ({latency.ratio.median:.2f})"
