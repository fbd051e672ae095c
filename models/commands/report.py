"""`streamrec models report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from models.commands.options import Percent, read, source_options, training_code

_PATH = click.Path(path_type=Path)


@click.command("report")
@click.argument("bundles", nargs=-1, required=True, type=_PATH, metavar="BUNDLE_DIR...")
@source_options(required=True)
@click.option("--out", required=True, type=_PATH, help="Directory for report.html, report.json.")
@click.option(
    "--reference", type=_PATH, default=None, help="Compare with it, not with the first bundle."
)
@click.option(
    "--max-loss", type=Percent(), default=0.01, show_default=True,
    help="Relative loss of NDCG@10 up to which a variant may be shipped, such as 1%.",
)  # fmt: skip
@click.option("--baselines", is_flag=True, help="Also fit popularity, EASE, item-kNN, rules.")
@click.option(
    "--rankers", type=_PATH, default=None, help="report.json of `models compress-ranker`."
)
@click.option("--seed", default=0, show_default=True, help="Of resamples and of who is asked.")
def report_bundles(
    bundles: tuple[Path, ...],
    source: str,
    split: str | None,
    limit: int,
    skip_bad: bool,
    out: Path,
    reference: Path | None,
    max_loss: float,
    baselines: bool,
    rankers: Path | None,
    seed: int,
) -> None:
    """Compare bundles with the first one: size, memory, latency, accuracy, and who pays."""
    with training_code():
        from models.report import DataInfo, build_report, open_bundles, write_report  # noqa: PLC0415
        from models.report.rankers import read_rankers  # noqa: PLC0415
        from models.trainer import Options, prepare  # noqa: PLC0415

        # What is broken is found before anything long is begun.
        opened = open_bundles(bundles, reference)
        table = read_rankers(rankers) if rankers is not None else None
        manifest = opened[0].manifest
        events = read(source, manifest.surface, skip_bad)
        options = Options(split=split or manifest.provenance.get("split", "time"), queries=limit)
        _, parts = prepare(events, options, manifest.surface, opened[0].items)
        made = build_report(
            opened,
            parts,
            DataInfo(events.name, events.sha256),
            max_loss=max_loss,
            baselines=baselines,
            rankers=table,
            seed=seed,
            command=["streamrec", *sys.argv[1:]],
            progress=True,
        )
        page, _ = write_report(made, out)
    click.echo(summary(made))
    click.echo(f"written: {page}")


COMMANDS: Sequence[click.Command] = (report_bundles,)


def summary(report: dict[str, Any]) -> str:
    """The verdicts, and what each variant costs."""
    verdicts = report["verdicts"]
    lines = [verdicts["size"]["text"], verdicts["latency"]["text"], *verdicts["notes"]]
    for variant in report["variants"][1:]:
        lines.append(f"{variant['label']}:")
        lines += [f"  {finding['text']}" for finding in variant["findings"]]
    return "\n".join(lines)
