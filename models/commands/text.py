"""`streamrec models text`: give a bundle an encoder for items that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from worker.errors import ExtraMissingError

if TYPE_CHECKING:
    from models.text_eval import Row


@click.command("text")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--events", "source", required=True, help="Events with text: see `streamrec models train`."
)
@click.option(
    "--train-share",
    type=click.FloatRange(0.1, 1.0, min_open=True),
    default=0.8,
    show_default=True,
    help="Share of the events, by time, that the bundle was trained on.",
)
@click.option(
    "--max-warm-loss",
    type=click.FloatRange(0.0, 1.0),
    default=0.02,
    show_default=True,
    help="NDCG@10 on known items, as a share, that recommending new ones may cost.",
)
@click.option(
    "--buckets",
    type=click.IntRange(256, 1 << 20),
    default=8192,
    show_default=True,
    help="Rows of the table of grams; 72 bytes each at width 64.",
)
@click.option(
    "--queries", default=5000, show_default=True, help="At most, to choose and to judge by."
)
@click.option("--seed", default=7, show_default=True)
def text(
    bundle: Path,
    source: str,
    train_share: float,
    max_warm_loss: float,
    buckets: int,
    queries: int,
    seed: int,
) -> None:
    """Train a text encoder for BUNDLE; write the bundle with it as VERSION-text, beside it.

    The encoder's reach is chosen on the first half of the events after those of the training, and
    judged on the second half.
    """
    try:
        from models.sources import read_events  # noqa: PLC0415 - needs the train extra
        from models.text import TextRecipe  # noqa: PLC0415
        from models.text_bundle import make_text_bundle  # noqa: PLC0415
    except ImportError as error:
        raise ExtraMissingError(
            f"text encoders need {error.name}: pip install 'streamrec[train]'"
        ) from None
    made = make_text_bundle(
        bundle,
        read_events(source),
        TextRecipe(buckets=buckets, seed=seed),
        train_share=train_share,
        max_warm_loss=max_warm_loss,
        queries=queries,
    )
    click.echo(
        f"{made.items} items with text; penalty {made.penalty:g}, explains {made.r2:.1%} of unseen"
        f" vectors; gain {made.gain:g}; text.onnx {made.bytes / 1e3:.0f} kB"
    )
    if made.rows:
        click.echo(table(made.rows))
    click.echo(f"wrote {made.path}")


def table(rows: list[Row]) -> str:
    """The comparison as text."""
    first = rows[0]
    lines = [
        f"{first.cold.queries} events with a cold target, {first.warm.queries} with a warm one;"
        " all items ranked; 95 % intervals over users",
        f"{'cold items by':<14}  {'cold HR@10':<25}  {'cold NDCG@10':<25}  {'among cold':<10}"
        "  warm loss",
    ]
    for row in rows:
        hit, ndcg, loss = (
            f"{value:.4f} ({low:.4f} to {high:.4f})"
            for value, (low, high) in (
                (row.cold.hit_rate, row.cold_hit_rate_interval),
                (row.cold.ndcg, row.cold_ndcg_interval),
                (row.warm_loss, row.warm_loss_interval),
            )
        )
        lines.append(
            f"{row.name:<14}  {hit:<25}  {ndcg:<25}  {row.among_cold.hit_rate:<10.4f}  {loss}"
        )
    return "\n".join(lines)


COMMANDS = [text]
