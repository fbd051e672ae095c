"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from worker.bundle_files import write_durably


def write_whole(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a broken-off write leaves what was there."""
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_durably(building, data)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
