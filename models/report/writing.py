"""Put a report where it is wanted, whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from models.report.errors import ReportError
from models.report.html import render_html

JSON_FILE, HTML_FILE = "report.json", "report.html"


def write_report(report: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` to `directory`, over those of an earlier report.

    Raises:
        ReportError: the directory cannot be written to.
    """
    page = render_html(report).encode()
    data = msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=directory) as folder:
            for name, content in ((HTML_FILE, page), (JSON_FILE, data)):
                (Path(folder) / name).write_bytes(content)
            for name in (HTML_FILE, JSON_FILE):
                (Path(folder) / name).replace(directory / name)
    except OSError as error:
        raise ReportError(
            f"{directory} cannot be written to ({error.strerror or error}): give another --out"
        ) from None
    return directory / HTML_FILE, directory / JSON_FILE
