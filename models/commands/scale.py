"""`streamrec models scale`."""

from __future__ import annotations

from pathlib import Path

import click

from models.commands.options import training_code


@click.command("scale")
@click.option(
    "--items",
    "item_counts",
    default="10000,100000,1000000",
    show_default=True,
    help="Sizes of catalogue. A million takes gigabytes of memory and many minutes.",
)
@click.option(
    "--recipe", "recipes", multiple=True, help="Instead of the usual ones; steps joined by +."
)
@click.option("--batches", default="1,16,64,256", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Rounds in which variants take turns.")
@click.option("--seed", default=7, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="For scale.json.")
def measure_scale(
    item_counts: str,
    recipes: tuple[str, ...],
    batches: str,
    rounds: int,
    seed: int,
    out: Path,
) -> None:
    """Measure methods at large catalogues, which are SYNTHETIC.

    Item popularity is Zipf's, weights are random: this shows speed, memory and how many of the
    exact best items approximate scoring finds, not accuracy.
    """
    with training_code():
        from models.scale import RECIPES, Effort, measure_all, table  # noqa: PLC0415

        found = measure_all(
            _numbers(item_counts, "--items", least=100),
            recipes or RECIPES,
            out,
            effort=Effort(batches=_numbers(batches, "--batches", least=1), rounds=rounds),
            seed=seed,
            progress=lambda step: click.echo(step, err=True),
        )
    click.echo(table(found))
    click.echo(f"\n{out / 'scale.json'}")


def _numbers(text: str, option: str, *, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise click.BadParameter(
            f"{option} must be whole numbers from {least} on, such as 100,1000"
        )
    return numbers


COMMANDS = [measure_scale]
