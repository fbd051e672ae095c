"""`streamrec models compress-ranker` and `streamrec models rankers-demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compress-ranker")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    required=True,
    help='Such as "prune:0.5 + thresholds:8 + leaves:8"; may be given several times.',
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Calibration rows: .npz (matrix X), .parquet or .csv.",
)
@click.option("--labels", help="Column of relevance labels, for NDCG@10.")
@click.option("--groups", help="Column that says which rows are ranked against each other.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
def compress_ranker(
    model: Path,
    recipes: tuple[str, ...],
    data: Path,
    labels: str | None,
    groups: str | None,
    out: Path,
) -> None:
    """Compress the re-ranker MODEL, an ONNX file with trees, a linear model or an SVM.

    Writes one ONNX file per recipe and report.json to --out, and prints what each saves and costs.
    See docs/rankers.md.
    """
    from models.rankers.data import read_rows  # noqa: PLC0415 - heavy
    from models.rankers.errors import RecipeError  # noqa: PLC0415
    from models.rankers.graph import load_ranker  # noqa: PLC0415
    from models.rankers.recipe import parse_recipe  # noqa: PLC0415
    from models.rankers.report import (  # noqa: PLC0415
        compress_ranker,
        report_table,
        write_variants,
    )

    if (labels is None) != (groups is None):
        raise RecipeError("NDCG needs both --labels and --groups; give both or neither")
    parsed = list(dict.fromkeys(parse_recipe(text) for text in recipes))
    loaded = load_ranker(model)
    rows = read_rows(data, labels, groups)
    variants, report = compress_ranker(loaded, model.read_bytes(), parsed, rows)
    write_variants(out, variants, report)
    click.echo(report_table(report))


@click.command("rankers-demo")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory to write the models and reports to."
)
@click.option(
    "--registry",
    type=click.Path(path_type=Path),
    default=Path("models/shipped"),
    show_default=True,
    help="Where the shipped SASRec is, whose score is a feature.",
)
def rankers_demo(out: Path | None, registry: Path) -> None:
    """Train re-rankers on MovieLens 100K, compress them, and print what that saves and costs.

    Fetches the data. Takes about two minutes on two cores.
    """
    from models.rankers.demo import run_demo  # noqa: PLC0415 - heavy

    run_demo(registry, out, click.echo)


COMMANDS = [compress_ranker, rankers_demo]
