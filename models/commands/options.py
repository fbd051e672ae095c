"""Options that several commands share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worker.errors import ExtraMissingError
from worker.events import Surface
from worker.logs import set_up_logging

if TYPE_CHECKING:
    from models.compress.draft import Context, Draft
    from models.events import Events

SPLITS = ("leave-one-out", "time", "all")

local_registry = click.option(
    "--registry",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models/shipped"),
    show_default=True,
    envvar="STREAMREC_REGISTRY",
    help="Directory to write to, <registry>/<name>/<version>/.",
)


class Percent(click.ParamType):
    """A share, written 0.01 or 1%."""

    name = "share"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read it."""
        if isinstance(value, float):
            return value
        try:
            share = float(value[:-1]) / 100.0 if value.endswith("%") else float(value)
        except ValueError:
            self.fail(f"{value!r} is not a share: write 0.01 or 1%", param, ctx)
        if not 0.0 <= share < 1.0:
            self.fail(f"{value} must be at least 0 and below 100%", param, ctx)
        return share


def source_options(required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add --events, --split, --limit and --skip-bad."""
    options = [
        click.option(
            "--events",
            "source",
            required=required,
            help="ml-100k, ml-1m, a path or glob of .jsonl, .jsonl.gz or .parquet, or"
            " kafka://host:port/topic?from=...&to=... (docs/models.md).",
        ),
        click.option(
            "--split",
            type=click.Choice(SPLITS),
            default=None,
            help="How events are divided; that of the bundle's training by default.",
        ),
        click.option(
            "--limit", type=int, default=20_000, show_default=True,
            help="Validation and test queries at most, drawn at random.",
        ),
        click.option("--skip-bad", is_flag=True, help="Count and skip bad records."),
    ]  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@contextmanager
def training_code(verbose: bool = False) -> Iterator[None]:
    """Around a command that needs the train extra: quiet logs, and words where it is missing."""
    set_up_logging("info" if verbose else "warning")
    # onnxruntime's quantizer logs advice through the root logger at every call.
    logging.getLogger().setLevel(logging.INFO if verbose else logging.ERROR)
    warnings.filterwarnings("ignore", module="onnxruntime")
    try:
        yield
    except ImportError as error:
        raise ExtraMissingError(
            f"this command needs {error.name}: pip install 'streamrec[train,demo]'"
        ) from None


def read(source: str, surface: str, skip_bad: bool) -> Events:
    """Events of a source, with what its surface needs."""
    from models.friends import follows  # noqa: PLC0415 - slow to import
    from models.sources import read_events  # noqa: PLC0415

    events = read_events(source, surface=surface, skip_bad=skip_bad)
    return follows(events) if surface == Surface.FRIENDS else events


def draft_with_context(
    bundle: Path, source: str | None, split: str | None, limit: int, skip_bad: bool, seed: int = 7
) -> tuple[Draft, Context, dict[str, Any]]:
    """A bundle opened for compression, with the events that its methods may look at.

    Returns:
        The draft, the context, and the test queries with what names them, under `test`, `events`
        and `split`; empty without events.
    """
    from models.compress.draft import Context, open_draft  # noqa: PLC0415
    from models.trainer import Options, prepare  # noqa: PLC0415

    draft = open_draft(bundle)
    if source is None:
        return draft, Context(seed=seed), {}
    if draft.manifest.provenance.get("refit") == "true":
        click.echo(
            f"warning: {bundle} was trained on its validation events too (--refit), so what is"
            " chosen by them will look better than it is",
            err=True,
        )
    events = read(source, draft.manifest.surface, skip_bad)
    chosen = split or draft.manifest.provenance.get("split", "time")
    options = Options(split=chosen, queries=limit)
    _, parts = prepare(events, options, draft.manifest.surface, draft.items)
    context = Context(parts.train, parts.validation, seed)
    return draft, context, {"test": parts.test, "events": events, "split": chosen}


def stamp() -> str:
    """Now, as versions begin."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def slug(recipe: str) -> str:
    """A recipe as the end of a version: letters, digits, dots and dashes."""
    kept = "".join(c if c.isalnum() or c == "." else "-" for c in recipe.replace(" + ", "_"))
    while "--" in kept:
        kept = kept.replace("--", "-")
    return kept.strip("-")[:80]


def default_work(name: str) -> Path:
    """Where checkpoints go."""
    from worker.local.kafka import cache_directory  # noqa: PLC0415

    return cache_directory() / "training" / name
