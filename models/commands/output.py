"""How commands print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from worker.manifest import Manifest

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")


def print_json(value: Any) -> None:
    """Print `value` as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def section(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Print a title and indented columns; nothing without rows."""
    if not rows:
        return
    if title:
        click.echo(title)
    click.echo(table([(f"  {first}", *rest) for first, *rest in rows]))


def size(manifest: Manifest) -> int:
    """Bytes of a bundle's files."""
    return sum(file.bytes for file in manifest.files.values())


def megabytes(manifest: Manifest) -> str:
    """Size of a bundle, for people."""
    return f"{size(manifest) / 1e6:.2f} MB"


def age(created: datetime) -> str:
    """Time since `created`, for people."""
    seconds = max(0.0, (datetime.now(UTC) - created).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
