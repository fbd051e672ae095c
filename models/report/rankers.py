"""The table of `streamrec models compress-ranker`, to be shown in the same report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from models.report.errors import ReportError


def read_rankers(path: Path) -> dict[str, Any]:
    """Rows and columns of a report of compressed rankers.

    Raises:
        ReportError: the file cannot be read, or is no such report.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Rankers)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from None
    except msgspec.MsgspecError as error:
        raise ReportError(
            f"{path} is no report of `streamrec models compress-ranker`: {error}"
        ) from None
    rows = [_flat(variant) for variant in found.variants]
    return {"columns": list(dict.fromkeys(key for row in rows for key in row)), "rows": rows}


class _Rankers(msgspec.Struct):
    variants: list[dict[str, Any]]


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Figures and words of a row; those of nested objects by path."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key} ")
        elif isinstance(value, list):
            flat[prefix + key] = "; ".join(map(str, value))
        else:
            flat[prefix + key] = value
    return flat
