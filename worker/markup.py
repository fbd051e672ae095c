"""HTML and SVG from values: whatever is not markup already is escaped. No I/O.

Nothing here writes a `style` attribute: the pages' content security policy forbids them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

#: Width and height of a chart in SVG units.
_WIDTH, _HEIGHT = 240.0, 40.0


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as markup."""
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element; `class_` becomes `class`, and `_` in other names `-`. None leaves one out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{shown}>{''.join(map(text, content))}</{name}>")


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: int = 0
) -> Markup:
    """A table whose first column names its rows.

    Args:
        numbers: this many columns, from the right, hold numbers.
    """
    first = len(head) - numbers

    def kind(column: int) -> str | None:
        return "n" if column >= first else None

    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=kind(at)) for at, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    columns = [tag("th", one, scope="col", class_=kind(at)) for at, one in enumerate(head)]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption, class_="unseen"),
            tag("thead", tag("tr", *columns)),
            tag("tbody", *body),
        ),
        class_="wide",
    )


def sparkline(values: Sequence[float | None], label: str) -> Markup:
    """A line over time from 0 to the largest value; gaps where a value is None.

    Args:
        label: what it shows, for those who cannot see it.
    """
    known = [value for value in values if value is not None]
    top = max(known, default=0.0) or 1.0
    step = _WIDTH / max(len(values) - 1, 1)
    runs: list[list[str]] = [[]]
    for at, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{at * step:.1f},{_HEIGHT - 1 - value / top * (_HEIGHT - 3):.1f}")
    lines = []
    for run in filter(None, runs):
        start, end = run[0].partition(",")[0], run[-1].partition(",")[0]
        lines.append(
            tag("path", d=f"M{start},{_HEIGHT}L{' '.join(run)}L{end},{_HEIGHT}Z", class_="area")
        )
        lines.append(tag("polyline", points=" ".join(run), class_="line"))
    return tag(
        "svg", *lines, viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}", preserveAspectRatio="none",
        role="img", aria_label=label, class_="spark",
    )  # fmt: skip


def interval(
    low: float, estimate: float, high: float, *, axis: tuple[float, float], kind: str, label: str
) -> Markup:
    """An estimate with its bounds on an axis; 0 is marked where it is inside.

    Args:
        kind: class that gives the colour.
        label: what it shows, for those who cannot see it.
    """
    left, right = axis
    width = (right - left) or 1.0

    def place(value: float) -> str:
        return f"{min(max((value - left) / width, 0.0), 1.0) * (_WIDTH - 10) + 5:.1f}"

    zero: tuple[Markup, ...] = ()
    if left < 0.0 < right:
        zero = (tag("line", x1=place(0), x2=place(0), y1=0, y2=16, class_="zero"),)
    return tag(
        "svg",
        *zero,
        tag("line", x1=place(low), x2=place(high), y1=8, y2=8, class_="bounds"),
        tag("circle", cx=place(estimate), cy=8, r=4),
        viewBox=f"0 0 {_WIDTH:.0f} 16", role="img", aria_label=label, class_=f"interval {kind}",
    )  # fmt: skip
