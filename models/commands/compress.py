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
        from models.compress.draft import lower, save  # noqa: PLC0415
        from models.compress.methods import METHODS  # noqa: PLC0415
        from models.compress.recipe import apply, parse  # noqa: PLC0415
        from models.provenance import provenance  # noqa: PLC0415

        parsed = [(text, parse(text, METHODS)) for text in recipes]
        draft, context, about = draft_with_context(bundle, source, split, limit, skip_bad, seed)
        if name is not None:
            draft = replace(draft, manifest=msgspec.structs.replace(draft.manifest, name=name))
        before = len(lower(draft))
        when = stamp()
        for text, steps in parsed:
            made = apply(steps, draft, context)
            metrics = accuracy_of(made, about)
            more: dict[str, str] = {}
            if about:
                more = provenance(
                    about["events"].name, about["events"].sha256, split=about["split"],
                    seed=str(seed),
                )  # fmt: skip
            path = save(
                made, registry / made.manifest.name / f"{when}-{slug(text)}",
                metrics=metrics, provenance=more,
            )  # fmt: skip
            after = (path / "model.onnx").stat().st_size
            figures = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            click.echo(
                f"{path}  {made.precision}  {after / 1e6:.3f} MB"
                f" ({before / after:.1f}x smaller)  {figures}"
            )


def accuracy_of(draft: Draft, about: dict[str, Any]) -> dict[str, float]:
    """Figures on the test events; none without."""
    if not about or not len(about["test"]):
        return {}
    from models.compress.trial import in_memory  # noqa: PLC0415
    from models.evaluate import accuracy, bundle_score, ranks  # noqa: PLC0415

    made = in_memory(draft)
    found = ranks(bundle_score(made), about["test"], length=made.manifest.max_length)
    return accuracy(found).as_metrics()


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
