"""Where a bundle's bytes are."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from models.graph import ATTENTION_WEIGHTS
from worker.manifest import ITEMS_FILE, MANIFEST_FILE, MODEL_FILE, Manifest

#: Parts by names of weights, as our exports give them; compression keeps them as prefixes.
_PATTERNS = {
    "item table": re.compile(r"item_(?!indexes)"),
    "attention": re.compile(rf"block\d+_({'|'.join(ATTENTION_WEIGHTS)})_"),
    "recurrence": re.compile(r"block\d+_(drive|read)_"),
    "feed-forward": re.compile(r"block\d+_(up|down)_"),
}
OTHER = "graph and other"


def size_parts(path: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes by part; they add up to the bundle. Weights of foreign models fall under "other"."""
    parts = dict.fromkeys((*_PATTERNS, OTHER), 0)
    model = onnx.load(path / MODEL_FILE, load_external_data=False)
    weights = [(weight.name, weight.ByteSize()) for weight in model.graph.initializer]
    weights += [
        (weight.values.name, weight.ByteSize()) for weight in model.graph.sparse_initializer
    ]
    for name, size in weights:
        part = next((part for part, at in _PATTERNS.items() if at.match(name)), OTHER)
        parts[part] += size
    parts[OTHER] = manifest.files[MODEL_FILE].bytes - sum(
        size for part, size in parts.items() if part != OTHER
    )
    parts[ITEMS_FILE] = manifest.files[ITEMS_FILE].bytes
    for name, file in manifest.files.items():
        if name not in (MODEL_FILE, ITEMS_FILE):
            parts[name] = file.bytes
    parts[MANIFEST_FILE] = (path / MANIFEST_FILE).stat().st_size
    return parts
