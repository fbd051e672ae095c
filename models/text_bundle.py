"""A bundle with a text encoder, from one without."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import onnxruntime as ort

from models.sources import Events
from models.text import TextRecipe
from models.text_eval import (
    Row,
    ask,
    catalogue,
    choose_gain,
    compare,
    fit_to_bundle,
    ways_to_compare,
)
from models.text_export import export_text, with_state
from worker.bundle import open_bundle, write_bundle
from worker.errors import BundleError
from worker.manifest import MODEL_FILE
from worker.text import TextEncoder

_LAST_TENTH = 0.9
#: Fields of a manifest that `write_bundle` derives.
_DERIVED = ("format_version", "item_count", "inputs", "outputs", "files", "text")


@dataclass(frozen=True)
class Made:
    """A bundle with a text encoder, and what the encoder is worth."""

    path: Path
    #: Items that the encoder was fitted on.
    items: int
    penalty: float
    #: Share of the variance of held-out items' vectors that it explains.
    r2: float
    gain: float
    #: Of text.onnx.
    bytes: int
    #: Empty where no later event names a cold item.
    rows: list[Row]


def make_text_bundle(
    path: Path,
    events: Events,
    recipe: TextRecipe,
    *,
    train_share: float,
    max_warm_loss: float,
    queries: int = 5000,
) -> Made:
    """Write `<version>-text` beside the bundle at `path`.

    The gain is chosen on the first half of the time after `train_share` and judged on the second;
    where nothing comes after, it is chosen on the last tenth and not judged.

    Raises:
        BundleError: the bundle is broken, or the new version exists.
        TextError: an encoder cannot be trained for it from these events.
    """
    opened = open_bundle(path)
    before = opened.manifest
    version = f"{before.version}-text"
    if (path.parent / version).exists():
        raise BundleError(f"{path.parent / version} exists; versions are never overwritten")
    fields = {
        name: value
        for name, value in msgspec.structs.asdict(before).items()
        if name not in _DERIVED
    } | {
        "model": with_state((path / MODEL_FILE).read_bytes()),
        "items": opened.items,
        "version": version,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": f"{before.recipe} + text encoder",
        "parents": [before.version],
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle = open_bundle(write_bundle(Path(folder) / "with-state", **fields))
        known = catalogue(bundle, events.users, events.items, events.texts, train_share)
        later = train_share < 1.0
        middle = (1.0 + train_share) / 2 if later else 1.0
        chosen_by = ask(bundle, known, train_share if later else _LAST_TENTH, middle, queries)
        found, vectors, used = fit_to_bundle(bundle, known, events.texts, chosen_by, recipe)
        gain = choose_gain(chosen_by, vectors, used, found, max_warm_loss=max_warm_loss)
        encoder = found.encoder.with_gain(gain)
        text_model = export_text(encoder)
        cold_texts = [
            events.texts.get(item, "")
            for item, warm in zip(known.item_ids, known.warm, strict=True)
            if not warm
        ]
        rows: list[Row] = []
        if later and cold_texts:
            int8 = TextEncoder(recipe.spec, ort.InferenceSession(text_model)).encode(cold_texts)
            rows = compare(
                ask(bundle, known, middle, 1.0, queries),
                known,
                vectors,
                ways_to_compare(encoder, int8, cold_texts, vectors[known.warm]),
            )
    metrics = dict(before.metrics)
    if rows:
        metrics |= {
            "cold_hr@10": rows[-1].cold.hit_rate,
            "cold_ndcg@10": rows[-1].cold.ndcg,
            "cold_warm_loss": rows[-1].warm_loss,
        }
    fields |= {
        "metrics": metrics,
        "provenance": {
            **before.provenance,
            "text_data": events.name,
            "text_data_sha256": events.sha256,
            "text_gain": f"{gain:g}",
            "text_penalty": f"{found.penalty:g}",
        },
    }
    written = write_bundle(path.parent / version, text_model=text_model, text=recipe.spec, **fields)
    return Made(written, int(used.sum()), found.penalty, found.r2, gain, len(text_model), rows)
