"""The report as one HTML file: no scripts, nothing that is fetched."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from models.report.plots import plots
from models.report.verdicts import LATENCY_BATCH, percent

#: A cell without a figure.
_NONE = "\N{EN DASH}"


def render_html(report: Mapping[str, Any]) -> str:
    """Render what `build_report` returned, or what a report.json holds."""
    environment = Environment(
        loader=PackageLoader("models.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "megabytes": lambda value: f"{value / 1e6:,.2f}",
        "estimate": _estimate,
        "percent": lambda change: _NONE if change is None else percent(change),
        "times": lambda value, reference: f"{value / reference:.2f}x" if reference else _NONE,
        "ratio": lambda ratio: (
            f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        ),
        "shade": _shade,
        "command": shlex.join,
        "figure": _figure,
    }
    pictures = {
        name: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        for name, svg in plots(report).items()
    }
    return environment.get_template("page.html.jinja").render(
        report=report, pictures=pictures, latency_batch=LATENCY_BATCH
    )


def _estimate(found: Mapping[str, float] | None) -> str:
    if found is None:
        return _NONE
    return f"{found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})"


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f})"


def _shade(change: Mapping[str, float] | None) -> str:
    """CSS class: a change that is beyond chance is seen at a glance."""
    if change is None or change["low"] <= 0.0 <= change["high"]:
        return ""
    return "loss" if change["high"] < 0.0 else "gain"


def _figure(value: Any) -> str:
    """A cell of a table that is passed through."""
    if isinstance(value, bool) or value is None:
        return _NONE if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
