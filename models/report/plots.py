"""The report's pictures as SVG. Colours are Okabe and Ito's, told apart by the colour-blind too."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from models.report.verdicts import LATENCY_BATCH

#: Of variants; the reference is black.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8A8A")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Changes beyond this are drawn at the edge: the interval of a small bucket would fill the picture.
_MOST_CHANGE = 60.0

Variants = Sequence[Mapping[str, Any]]


def plots(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name."""
    variants, fronts = report["variants"], report["verdicts"]["pareto"]
    drawn: dict[str, Callable[[], Figure]] = {
        "size": lambda: _trade_off(
            variants,
            lambda v: v["size"]["bundle_bytes"] / 1e6,
            "size of the bundle, MB (log scale)",
            fronts["size"],
        ),
        "latency": lambda: _trade_off(
            variants,
            lambda v: v["latency"][LATENCY_BATCH]["ratio"]["median"],
            f"latency of a batch of {LATENCY_BATCH}, times the reference (range of rounds)",
            fronts["latency"],
            lambda v: v["latency"][LATENCY_BATCH]["ratio"],
        ),
        "batches": lambda: _batches(variants),
        "parts": lambda: _parts(variants),
    }
    if len(variants) > 1:
        drawn["popularity"] = lambda: _changes(variants, "popularity", "popularity of the target")
        drawn["history"] = lambda: _changes(variants, "history", "items in the history")
    # Names are the makers' of bundles: nothing in them is a formula. Paths need no fonts.
    with mpl.rc_context(
        {
            "text.parse_math": False,
            "svg.fonttype": "path",
            "svg.hashsalt": "streamrec",
            "font.size": 10.0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e3e3e3",
            "legend.frameon": False,
        }
    ):
        return {name: _svg(draw()) for name, draw in drawn.items()}


def _trade_off(
    variants: Variants,
    cost: Callable[[Mapping[str, Any]], float],
    title: str,
    front: Sequence[str],
    reach: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None,
) -> Figure:
    figure, (axes,) = _figure(variants, 1, height=3.8)
    places = {v["label"]: (cost(v), v["accuracy"]["ndcg@10"]["value"]) for v in variants}
    axes.plot(
        *zip(*(places[label] for label in front), strict=True),
        color="#b0b0b0", linewidth=1.2, linestyle="--", zorder=1,
    )  # fmt: skip
    for number, variant in enumerate(variants):
        x, y = places[variant["label"]]
        colour, marker = _look(number)
        axes.errorbar(
            [x], [y], xerr=_reach(x, reach(variant)) if reach is not None else None,
            yerr=_reach(y, variant["accuracy"]["ndcg@10"]), color=colour, marker=marker,
            markersize=11 if number == 0 else 7, capsize=3, elinewidth=1, linestyle="none",
        )  # fmt: skip
    ends = [reach(v)[end] for v in variants for end in ("low", "high")] if reach else []
    _log(axes, [*ends, *(x for x, _ in places.values())])
    axes.set_xlabel(title)
    axes.set_ylabel("NDCG@10 (95 % interval)")
    _legend(figure, variants, dashed="Pareto front")
    return figure


def _batches(variants: Variants) -> Figure:
    figure, (left, right) = _figure(variants, 2, height=3.6)
    batches = list(variants[0]["latency"])
    places = np.arange(len(batches))
    for number, variant in enumerate(variants):
        colour, marker = _look(number)
        costs = [variant["latency"][batch] for batch in batches]
        shift = (number - (len(variants) - 1) / 2) * 0.6 / len(variants)
        left.plot(places, [c["cpu_ms"] for c in costs], color=colour, marker=marker, markersize=6)
        ratios = [c["ratio"] for c in costs]
        medians = np.array([r["median"] for r in ratios])
        reach = [medians - [r["low"] for r in ratios], [r["high"] for r in ratios] - medians]
        right.errorbar(
            places + shift, medians, yerr=reach, color=colour, marker=marker, markersize=6,
            capsize=3, elinewidth=1, linestyle="none",
        )  # fmt: skip
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylabel("median ms of CPU per batch (log scale)")
    right.axhline(1.0, color="#000000", linewidth=0.8)
    right.set_ylabel("times the reference (range of rounds)")
    for axes in (left, right):
        axes.set_xticks(places, batches)
        axes.set_xlabel("batch")
    _legend(figure, variants)
    return figure


def _changes(variants: Variants, kind: str, title: str) -> Figure:
    """Relative change of NDCG@10 in each bucket, and in all queries, by variant."""
    figure, (axes,) = _figure(variants, 1, height=3.8)
    buckets = variants[0]["buckets"][kind]
    others = variants[1:]
    width = 0.8 / len(others)
    for number, variant in enumerate(others):
        colour, _ = _look(number + 1)
        changes = [variant["change"]["relative"], *(b["change"] for b in variant["buckets"][kind])]
        for place, change in enumerate(changes):
            if change is None:
                continue
            x = place + (number - (len(others) - 1) / 2) * width
            value, low, high = (100 * change[key] for key in ("value", "low", "high"))
            axes.bar(
                x, value, width * 0.9, color=colour, hatch=_hatch(number + 1), edgecolor="#ffffff",
                linewidth=0,
            )  # fmt: skip
            axes.plot([x, x], [low, high], color="#444444", linewidth=1.2)
    axes.axhline(0.0, color="#000000", linewidth=0.8)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -_MOST_CHANGE), min(high, _MOST_CHANGE))
    for place, bucket in enumerate(buckets, start=1):
        if bucket["change"] is None:
            axes.annotate(
                "the reference\nfinds none", (place, 0), (0, 3), textcoords="offset points",
                ha="center", color="#555555", fontsize=8.5,
            )  # fmt: skip
    names = [f"{b['label']}\n{b['queries']:,} queries" for b in buckets]
    axes.set_xticks(range(len(buckets) + 1), ["all", *names])
    axes.set_xlim(-0.5, len(buckets) + 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(title)
    axes.set_ylabel("change of NDCG@10, %\n(95 % interval)")
    _legend(figure, variants, bars=True)
    return figure


def _parts(variants: Variants) -> Figure:
    figure = Figure(figsize=(9.0, 1.3 + 0.42 * len(variants)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for v in variants for name in v["size"]["parts"]))
    left = np.zeros(len(variants))
    places = np.arange(len(variants))[::-1]
    for number, name in enumerate(names):
        sizes = np.array([v["size"]["parts"].get(name, 0) / 1e6 for v in variants])
        colour = _COLOURS[number % len(_COLOURS)]
        axes.barh(places, sizes, 0.7, left=left, color=colour, label=name)
        left += sizes
    for place, total in zip(places, left, strict=True):
        axes.annotate(
            f"{total:.2f}", (total, place), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, left.max() * 1.08)
    axes.set_yticks(places, [v["label"] for v in variants])
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("MB")
    figure.legend(loc="outside right upper")
    return figure


def _figure(variants: Variants, columns: int, *, height: float) -> tuple[Figure, Sequence[Axes]]:
    tall = max(height, 0.9 + 0.21 * len(variants))
    figure = Figure(figsize=(9.0, tall), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _legend(
    figure: Figure, variants: Variants, *, dashed: str | None = None, bars: bool = False
) -> None:
    """To the right of the axes: labels inside would overlap where variants are alike."""
    handles: list[Artist] = []
    for number, variant in enumerate(variants):
        colour, marker = _look(number)
        label = variant["label"]
        if not bars:
            size = 11 if number == 0 else 7
            handles.append(
                Line2D([], [], color=colour, marker=marker, ls="none", ms=size, label=label)
            )
        elif number:
            hatch = _hatch(number)
            handles.append(
                Patch(fc=colour, hatch=hatch, edgecolor="#ffffff", linewidth=0, label=label)
            )
    if dashed:
        handles.append(Line2D([], [], color="#b0b0b0", linestyle="--", label=dashed))
    figure.legend(handles=handles, loc="outside right upper")


def _look(number: int) -> tuple[str, str]:
    """Colour and marker; beyond seven variants colours come again with other markers."""
    if number == 0:
        return "#000000", "*"
    turn, place = divmod(number - 1, len(_COLOURS))
    return _COLOURS[place], _MARKERS[(place + turn) % len(_MARKERS)]


def _hatch(number: int) -> str:
    """Where colours come again, bars are told apart by their hatching."""
    return ("", "///", "...", "xxx")[(number - 1) // len(_COLOURS) % 4]


def _reach(value: float, ends: Mapping[str, float]) -> list[list[float]]:
    return [[value - ends["low"]], [ends["high"] - value]]


def _log(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with numbers that can be read, however narrow its range."""
    axes.set_xscale("log")
    low, high = min(values) / 1.25, max(values) * 1.25
    axes.set_xlim(low, high)
    ticks = [value for value in _round_numbers() if low <= value <= high]
    while len(ticks) > 8:
        ticks = ticks[::2]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _round_numbers() -> Iterator[float]:
    for power in range(-4, 6):
        for first in (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0):
            yield first * 10.0**power


def _svg(figure: Figure) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
