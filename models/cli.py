"""`streamrec models ...`."""

from __future__ import annotations

import logging
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from worker.bundle import metric_summary, read_manifest
from worker.errors import StreamrecError
from worker.logs import set_up_logging
from worker.registry import find, names, promote, serving_version, versions

REGISTRY = click.option(
    "--registry",
    type=click.Path(path_type=Path),
    default=Path("models/shipped"),
    show_default=True,
    envvar="STREAMREC_REGISTRY",
    help="Directory of bundles, <registry>/<name>/<version>/.",
)


class ExtraMissingError(StreamrecError):
    """A package of an optional extra is not installed."""

    exit_code = 69


@click.group()
def models() -> None:
    """Train, list and promote models."""


@models.command("list")
@REGISTRY
def list_models(registry: Path) -> None:
    """List the versions in the registry; * marks the one that serves."""
    for name in names(registry):
        serving = serving_version(registry, name)
        for version in versions(registry, name):
            manifest = read_manifest(find(registry, name, version))
            size = sum(file.bytes for file in manifest.files.values())
            mark = "*" if version == serving else " "
            click.echo(
                f"{mark} {name}@{version}  {manifest.surface}  {manifest.precision}"
                f"  {size / 1e6:.2f} MB  {metric_summary(manifest.metrics)}"
            )


@models.command("promote")
@click.argument("name")
@click.argument("version")
@REGISTRY
def promote_model(name: str, version: str, registry: Path) -> None:
    """Make VERSION of model NAME the one that serves; running workers swap to it."""
    promote(registry, name, version)
    click.echo(f"{name}@{version} serves from now on")


@models.command("train-ml100k")
@REGISTRY
@click.option("--seed", default=7, show_default=True)
@click.option("--epochs", default=200, show_default=True, help="At most; training stops early.")
@click.option("--verbose", is_flag=True, help="Log each validation.")
def train(registry: Path, seed: int, epochs: int, verbose: bool) -> None:
    """Train SASRec on MovieLens 100K; write fp32 and int8 bundles and report.json to REGISTRY.

    Trains twice: leave-one-out, for figures comparable with published ones, and on the first 80 %
    of events, for the bundles. Takes minutes on two cores.
    """
    set_up_logging("info" if verbose else "warning")
    # The quantizer advises a preprocessing step that these graphs do not need.
    logging.getLogger().setLevel(logging.ERROR)
    try:
        from models.ml100k import train_ml100k  # noqa: PLC0415 - needs the train extra
        from models.train import Recipe  # noqa: PLC0415
    except ImportError as error:
        raise ExtraMissingError(
            f"training needs {error.name}: pip install 'streamrec[train,demo]'"
        ) from None
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%MZ")
    with tempfile.TemporaryDirectory() as work:
        report = train_ml100k(registry, Path(work), Recipe(seed=seed, epochs=epochs), stamp=stamp)
    click.echo(report_table(report))


def report_table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    for split, title in (
        ("leave_one_out", "leave-one-out, full ranking"),
        ("global_time", "trained on the first 80 % of time, every later event asked"),
    ):
        part = report[split]
        lines.append(f"{title} ({part['queries']} queries, trained in {part['training_s']} s)")
        for variant in ("popularity", "fp32", "int8"):
            figures = part[variant]
            lines.append(
                f"  {variant:<11} HR@10 {figures['hr@10']:.4f}  NDCG@10 {figures['ndcg@10']:.4f}"
                f"  MRR@10 {figures['mrr@10']:.4f}"
            )
    for variant, cost in report["cost"].items():
        latency = "  ".join(f"{b}: {ms} ms" for b, ms in cost["latency_ms_by_batch"].items())
        lines.append(f"{variant}: {cost['bytes'] / 1e6:.3f} MB; one thread, by batch: {latency}")
    return "\n".join(lines)
