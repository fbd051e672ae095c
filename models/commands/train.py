"""`streamrec models train`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from models.commands.options import (
    SPLITS,
    default_work,
    local_registry,
    read,
    training_code,
)

_COUNT = click.IntRange(min=1)


@click.command("train")
@click.argument("source")
@local_registry
@click.option("--name", default=None, help="Model name; the surface's by default.")
@click.option("--version", default=None, help="Version; the time and -fp32 by default.")
@click.option(
    "--surface", type=click.Choice(["posts", "friends", "ads"]), default="posts", show_default=True
)
@click.option("--split", type=click.Choice(SPLITS), default="time", show_default=True)
@click.option(
    "--min-item-events", type=_COUNT, default=1, show_default=True, help="Leave rarer items out."
)
@click.option(
    "--length", type=_COUNT, default=50, show_default=True, help="Items of a history that are read."
)
@click.option(
    "--width", type=_COUNT, default=64, show_default=True, help="Dimensions of an item vector."
)
@click.option(
    "--family",
    type=click.Choice(["sasrec", "lrurec"]),
    default="sasrec",
    show_default=True,
    help="Attention, or a state that moves on by one item at a time (docs/recurrent.md).",
)
@click.option("--blocks", type=_COUNT, default=2, show_default=True, help="Blocks of the model.")
@click.option(
    "--heads", type=_COUNT, default=2, show_default=True, help="Attention heads of a block."
)
@click.option(
    "--channels", type=_COUNT, default=64, show_default=True,
    help="Complex numbers of the state of a block (lrurec).",
)  # fmt: skip
@click.option(
    "--epochs", type=_COUNT, default=200, show_default=True, help="At most; training stops early."
)
@click.option(
    "--patience",
    type=_COUNT,
    default=8,
    show_default=True,
    help="Validations without a better one.",
)
@click.option(
    "--validate-every",
    type=_COUNT,
    default=3,
    show_default=True,
    help="Epochs between validations.",
)
@click.option(
    "--batch", type=_COUNT, default=128, show_default=True, help="Full-length windows a step."
)
@click.option("--dropout", default=0.4, show_default=True)
@click.option("--rate", default=1e-3, show_default=True, help="Learning rate.")
@click.option(
    "--negatives", default=0, show_default=True,
    help="Items scored beside each target, shared by a step; 0: the whole catalogue.",
)  # fmt: skip
@click.option("--seed", default=7, show_default=True)
@click.option(
    "--refit", is_flag=True, help="Train once more, on validation events too, as long as was best."
)
@click.option("--baselines/--no-baselines", default=True, show_default=True)
@click.option(
    "--limit", type=_COUNT, default=20_000, show_default=True, help="Test queries at most."
)
@click.option("--skip-bad", is_flag=True, help="Count and skip bad records.")
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=None,
    help="Directory of checkpoints; the same command goes on from there where it was broken off.",
)  # fmt: skip
@click.option("--verbose", is_flag=True, help="Log each validation.")
def train_model(source: str, registry: Path, verbose: bool, **given: Any) -> None:
    """Train a sequential recommender on SOURCE and write a float32 bundle.

    SOURCE: ml-100k, ml-1m, a path or glob of .jsonl, .jsonl.gz or .parquet, or
    kafka://host:port/topic?from=...&to=... Prints HR, NDCG and MRR at 10 on the test events beside
    baselines and, where there are any, published figures.
    """
    with training_code(verbose):
        from models.train import Recipe  # noqa: PLC0415
        from models.trainer import Options, train  # noqa: PLC0415

        name, surface = given["name"] or given["surface"], given["surface"]
        recipe = Recipe(
            dropout=given["dropout"], learning_rate=given["rate"], batch=given["batch"],
            epochs=given["epochs"], patience=given["patience"], negatives=given["negatives"],
            validate_every=given["validate_every"], seed=given["seed"],
        )  # fmt: skip
        options = Options(
            split=given["split"], minimum_item_events=given["min_item_events"],
            length=given["length"], width=given["width"], blocks=given["blocks"],
            family=given["family"], heads=given["heads"], channels=given["channels"],
            refit=given["refit"], baselines=given["baselines"], queries=given["limit"],
            recipe=recipe,
        )  # fmt: skip
        trained = train(
            read(source, surface, given["skip_bad"]),
            options,
            registry=registry,
            name=name,
            surface=surface,
            version=given["version"],
            work=given["work"] or default_work(f"{name}-{_mark(source, given)}"),
        )
    click.echo(f"{trained.path}  ({trained.epochs} epochs, {trained.seconds} s)")
    if trained.rows:
        click.echo(f"split {options.split}, {trained.queries} test queries, full ranking:")
        click.echo(table(trained.rows))


def _mark(source: str, given: Mapping[str, Any]) -> str:
    """Of the training that these options ask for; more epochs are the same training."""
    other = {"epochs", "patience", "verbose", "version", "name", "baselines", "work"}
    asked = sorted((key, value) for key, value in given.items() if key not in other)
    return hashlib.sha256(repr((source, asked)).encode()).hexdigest()[:12]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of figures as text."""
    lines = [f"  {'model':<24} {'HR@10':>7} {'NDCG@10':>8} {'MRR@10':>7}  source"]
    for row in rows:
        mrr = f"{row['mrr@10']:.4f}" if "mrr@10" in row else ""
        lines.append(
            f"  {row['model']:<24} {row['hr@10']:>7.4f} {row['ndcg@10']:>8.4f} {mrr:>7}"
            f"  {row['source']}"
        )
    return "\n".join(lines)


COMMANDS = [train_model]
