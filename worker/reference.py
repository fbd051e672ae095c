"""The tables of settings and metrics in docs/, written from the code: `make docs`.

A page says where its table goes:

    <!-- reference:settings -->
    <!-- /reference -->
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import SecretStr

from worker.metrics import Metrics
from worker.settings import PREFIX, Settings, is_flag

_PLACE = re.compile(r"(<!-- reference:(\w+) -->\n).*?(<!-- /reference -->)", re.DOTALL)


def settings_table() -> str:
    """Every setting: variable, flag, default, meaning."""
    rows = []
    for name, info in Settings.model_fields.items():
        default = info.get_default()
        shown = default.get_secret_value() if isinstance(default, SecretStr) else default
        told = "" if shown is None else str(shown)
        told = told.replace(tempfile.gettempdir(), "<temporary directory>")
        rows.append((
            f"`{PREFIX}{name.upper()}`",
            f"`--{name.replace('_', '-')}`" if is_flag(name) else "no flag",
            f"`{told}`" if told else "none",
            _prose(info.description or ""),
        ))  # fmt: skip
    return _table(("variable", "flag", "default", "meaning"), rows)


def metrics_table() -> str:
    """Every metric of our own: name, type, labels, meaning."""
    labels: dict[str, Sequence[str]] = {}
    metrics = Metrics()
    for metric in vars(metrics).values():
        # What has no labels of its own has no such attribute either.
        for family in (
            metric.collect() if metric not in (metrics.registry, metrics.versions) else ()
        ):
            labels[family.name] = getattr(metric, "_labelnames", ())
    rows = [
        (
            f"`{family.name}{'_total' if family.type == 'counter' else ''}`",
            family.type,
            ", ".join(labels[family.name]) or "-",
            _prose(family.documentation),
        )
        for family in metrics.registry.collect()
        if family.name.startswith("streamrec_")
    ]
    return _table(("name", "type", "labels", "meaning"), rows)


TABLES: Mapping[str, Callable[[], str]] = {"settings": settings_table, "metrics": metrics_table}


def renewed(page: str) -> str:
    """The page with the tables as the code has them."""
    return _PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}{place[3]}", page)


def _prose(told: str) -> str:
    """Text whose `<name>` Markdown would take for a tag."""
    return told.replace("<", "&lt;")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    # A bar within a cell would end it.
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def main(pages: Sequence[str]) -> None:
    """Renew the tables of these files."""
    for page in map(Path, pages):
        before = page.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
