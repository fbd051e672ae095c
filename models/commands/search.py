"""`streamrec models search`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from models.commands import compress
from models.commands.options import (
    Percent,
    draft_with_context,
    local_registry,
    slug,
    source_options,
    stamp,
    training_code,
)


@click.command("search")
@click.argument("bundle", type=click.Path(path_type=Path))
@source_options(required=True)
@local_registry
@click.option(
    "--max-loss", type=Percent(), default=0.01, show_default=True,
    help="Relative loss of validation NDCG@10 that is allowed, such as 1%.",
)  # fmt: skip
@click.option("--objective", type=click.Choice(["size", "latency"]), default="size",
              show_default=True, help="What is to be small.")  # fmt: skip
@click.option("--trials", default=12, show_default=True, help="Combinations tried at most.")
@click.option("--finetunes", default=2, show_default=True, help="Cuts fine-tuned; 0 for none.")
@click.option("--finetune-epochs", default=3, show_default=True, help="Epochs each at most.")
@click.option("--queries", default=3000, show_default=True, help="Validation queries to judge by.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=None,
    help="Directory for search.json, front.svg and front.png.",
)  # fmt: skip
@click.option("--write/--no-write", default=False, help="Write the best as a bundle, too.")
@click.option("--seed", default=7, show_default=True)
def search_recipes(
    bundle: Path,
    source: str,
    split: str | None,
    limit: int,
    skip_bad: bool,
    registry: Path,
    max_loss: float,
    objective: str,
    trials: int,
    finetunes: int,
    finetune_epochs: int,
    queries: int,
    out: Path | None,
    write: bool,
    seed: int,
) -> None:
    """Search compression recipes for the float32 bundle in directory BUNDLE.

    Tries each option alone, then the combinations that these promise most of, and prints the Pareto
    front of size, latency and accuracy on validation events.
    """
    with training_code():
        from models.compress.methods import METHODS  # noqa: PLC0415
        from models.compress.recipe import apply, parse  # noqa: PLC0415
        from models.files import write_json  # noqa: PLC0415
        from models.front import draw_front  # noqa: PLC0415
        from models.search import line, search  # noqa: PLC0415

        draft, context, about = draft_with_context(bundle, source, split, limit, skip_bad, seed)

        def progress(text: str) -> None:
            click.echo(text, err=True)

        found = search(
            draft, context, max_loss=max_loss, objective=objective, trials=trials,
            finetunes=finetunes, finetune_epochs=finetune_epochs, queries=queries,
            progress=progress,
        )  # fmt: skip
        click.echo(f"Pareto front ({len(found.trials)} recipes tried, on validation events):")
        for trial in found.front:
            mark = "*" if trial == found.best else " "
            click.echo(f"{mark} {line(trial)}")
        click.echo(f"* smallest {objective} with at most {max_loss:.1%} loss: {found.best.recipe}")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "search.json", found.as_dict())
            for suffix in ("svg", "png"):
                draw_front(found, max_loss, out / f"front.{suffix}")
            click.echo(f"written: {out}/search.json, front.svg, front.png")
        if write and found.best.recipe != "fp32":
            made = apply(parse(found.best.recipe, METHODS), draft, context)
            version = f"{stamp()}-{slug(found.best.recipe)}"
            click.echo(f"written: {compress.write(made, registry, version, about, seed)}")
    sys.stdout.flush()


COMMANDS = [search_recipes]
