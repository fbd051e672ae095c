"""`streamrec models compress` and `streamrec models methods`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from models.commands.options import (
    draft_with_context,
    local_registry,
    slug,
    source_options,
    stamp,
    training_code,
)
from worker.bundle_files import read_manifest
from worker.manifest import MODEL_FILE

if TYPE_CHECKING:
    from models.compress.draft import Draft


@click.command("compress")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--recipe", "recipes", multiple=True, required=True, help="Steps joined by +.")
@local_registry
@click.option("--name", default=None, help="Model name; the bundle's by default.")
@source_options(required=False)
@click.option("--seed", default=7, show_default=True)
def compress_bundle(
    bundle: Path,
    recipes: tuple[str, ...],
    registry: Path,
    name: str | None,
    source: str | None,
    split: str | None,
    limit: int,
    skip_bad: bool,
    seed: int,
) -> None:
    """Compress the float32 bundle in directory BUNDLE, once for each --recipe.

    A recipe is a list of steps such as "layers:1 + finetune:3 + prune:0.5 + int8"; `streamrec
    models methods` lists what there is. Methods that look at events need --events. Each result is a
    bundle of its own in the registry, with its accuracy on the test events in the manifest.
    """
    with training_code():
        from models.compress.methods import METHODS  # noqa: PLC0415
        from models.compress.recipe import apply, parse  # noqa: PLC0415

        parsed = [(text, parse(text, METHODS)) for text in recipes]
        draft, context, about = draft_with_context(bundle, source, split, limit, skip_bad, seed)
        if name is not None:
            draft = replace(draft, manifest=msgspec.structs.replace(draft.manifest, name=name))
        before = draft.manifest.files[MODEL_FILE].bytes
        when = stamp()
        for text, steps in parsed:
            made = apply(steps, draft, context)
            path = write(made, registry, f"{when}-{slug(text)}", about, seed)
            manifest = read_manifest(path)
            after = manifest.files[MODEL_FILE].bytes
            figures = "  ".join(f"{key} {value:.4f}" for key, value in manifest.metrics.items())
            click.echo(
                f"{path}  {made.precision}  {after / 1e6:.3f} MB"
                f" ({before / after:.1f}x smaller)  {figures}"
            )


def write(draft: Draft, registry: Path, version: str, about: dict[str, Any], seed: int) -> Path:
    """Save a compressed draft with its figures on the test events, where `about` has any."""
    from models.compress.draft import save  # noqa: PLC0415
    from models.compress.trial import in_memory  # noqa: PLC0415
    from models.evaluate import bundle_accuracy  # noqa: PLC0415
    from models.provenance import provenance  # noqa: PLC0415

    metrics: dict[str, float] = {}
    origin: dict[str, str] = {}
    if about:
        events = about["events"]
        origin = provenance(events.name, events.sha256, split=about["split"], seed=str(seed))
        if len(about["test"]):
            metrics = bundle_accuracy(in_memory(draft), about["test"]).as_metrics()
    directory = registry / draft.manifest.name / version
    return save(draft, directory, metrics=metrics, provenance=origin)


@click.command("methods")
def list_methods() -> None:
    """List the compression methods with their options."""
    with training_code():
        from models.compress.methods import METHODS  # noqa: PLC0415

        for name, method in METHODS.items():
            options = [
                parameter
                for parameter in inspect.signature(method).parameters.values()
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            ]
            shown = ", ".join(
                f"{option.name}={option.default}"
                if option.default is not inspect.Parameter.empty
                else option.name
                for option in options
            )
            summary = (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ")
            click.echo(f"{name:<9} {summary}\n{'':<9} {shown}")


COMMANDS = [compress_bundle, list_methods]
