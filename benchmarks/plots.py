"""Plots of what was measured, as small SVG files."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Run
from benchmarks.peers import CASES
from benchmarks.results import Results, shares_of
from benchmarks.scale import Point, ScaleResults

_SIZE = (8.0, 4.0)


def plot_compare(results: Results, out: Path) -> list[Path]:
    """Throughput of the whole path, and its latency by load."""
    plt = _pyplot()
    whole = [name for name in results.cases() if CASES[name].level == "whole"]
    figure, axes = plt.subplots(figsize=_SIZE)
    spreads = [results.spread(name, lambda run: run.full.rate) for name in whole]
    medians = [spread.median for spread in spreads]
    errors = [
        [spread.median - spread.least for spread in spreads],
        [spread.most - spread.median for spread in spreads],
    ]
    axes.barh(whole, medians, xerr=errors, color="#4477aa", capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"events/s on {len(results.machine['cpus']['sut'])} CPU, median and range")
    made = [_save(figure, out / "bench-throughput.svg")]
    shares = [share for share in shares_of(results) if share is not None]
    if shares:
        figure, panels = plt.subplots(1, 2, figsize=_SIZE, sharey=True)
        for axes, quantile in zip(panels, ("p50", "p99"), strict=True):
            for name in whole:
                axes.plot(
                    [100 * share for share in shares],
                    [_median_latency(results.of(name), share, quantile) for share in shares],
                    marker="o",
                    label=name,
                )
            axes.set_yscale("log")
            axes.set_xlabel("load, % of own full speed")
            axes.set_title(f"event due -> Redis, {quantile}")
        panels[0].set_ylabel("ms")
        panels[0].legend(fontsize="small", loc="upper left")
        made.append(_save(figure, out / "bench-latency.svg"))
    return made


def plot_scale(results: ScaleResults, out: Path) -> list[Path]:
    """How the worker's cost grows."""
    plt = _pyplot()
    figure, panels = plt.subplots(2, 4, figsize=(12.0, 5.0))
    rows: list[tuple[str, Callable[[Run], float]]] = [
        ("events/s", lambda run: run.full.rate),
        ("PSS, MB", lambda run: run.peak_pss / 1e6),
    ]
    for column, axis in enumerate(("catalogue", "history", "users", "group")):
        points = results.of(axis)
        labels = [_short(point) for point in points]
        for row, (name, value) in enumerate(rows):
            axes = panels[row][column]
            axes.bar(labels, [_median(point.runs, value) for point in points], color="#4477aa")
            axes.set_ylim(bottom=0)
            axes.tick_params(axis="x", labelsize="small")
            if column == 0:
                axes.set_ylabel(name)
            if row == 0:
                axes.set_title("partitions/workers" if axis == "group" else axis)
    return [_save(figure, out / "bench-scale.svg")]


def _short(point: Point) -> str:
    if point.axis != "group":
        return point.label.replace(",000,000", " M").replace(",000", " k")
    partitions, _, workers = point.label.partition(" partitions, ")
    return f"{partitions}/{workers.split()[0]}"


def _median(runs: list[Run], value: Callable[[Run], float]) -> float:
    return statistics.median(map(value, runs))


def _median_latency(runs: list[Run], share: float, quantile: str) -> float:
    found = [
        getattr(steady.latency, quantile)
        for run in runs
        for steady in run.steady
        if steady.share == share
    ]
    return statistics.median(found) if found else float("nan")


def _pyplot() -> Any:
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    # The same file for the same figures.
    mpl.rcParams["svg.hashsalt"] = "streamrec"
    import matplotlib.pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    return plt


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    return path
