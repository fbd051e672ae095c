"""The `streamrec` command."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from worker import __version__
from worker.errors import SettingsError, StreamrecError
from worker.security import has_password
from worker.settings import PREFIX, Settings, is_flag, load_settings


class Commands(click.Group):
    """A group that adds commands from the entry points `streamrec.commands`, and shows
    `StreamrecError` as one line with its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands and those of other packages."""
        return sorted({*super().list_commands(ctx), *(e.name for e in _plugins())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by name, loading it where another package brings it."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for plugin in _plugins():
            if plugin.name == cmd_name:
                command = plugin.load()
                assert isinstance(command, click.Command)
                return command
        return None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except StreamrecError as error:
            click.echo(f"streamrec: {error}", err=True)
            ctx.exit(error.exit_code)


def _plugins() -> Any:
    return entry_points(group="streamrec.commands")


def settings_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for each setting in `names` (all where none is named)."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # Anybody on the machine reads the flags of a process, so that no secret is one.
        chosen = names or tuple(filter(is_flag, Settings.model_fields))
        for name in reversed(chosen):
            info = Settings.model_fields[name]
            default = info.get_default()
            shown = default.get_secret_value() if name == "redis" else default
            command = click.option(
                "--" + name.replace("_", "-"),
                name,
                default=None,
                metavar="VALUE",
                callback=_without_password if name == "redis" else None,
                help=f"{info.description} [{PREFIX}{name.upper()}; {shown}]",
            )(command)
        return command

    return decorate


def _without_password(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value and has_password(value):
        raise SettingsError(
            f"{option.opts[0]} holds a password, which others on this machine can read: set"
            " STREAMREC_REDIS_PASSWORD or STREAMREC_REDIS_PASSWORD_FILE"
        )
    return value


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="streamrec")
def main() -> None:
    """Streaming recommendations: Kafka events in, a quantized ONNX model in memory, Redis out.

    See it work on this machine: `streamrec demo`. Every setting is a flag of `streamrec worker` and
    an environment variable STREAMREC_<NAME>; flags win. Secrets are no flags: STREAMREC_<NAME>, or
    STREAMREC_<NAME>_FILE with the file that holds one.
    """


@main.command()
@settings_options()
def worker(**flags: Any) -> None:
    """Run one worker until SIGTERM or Ctrl-C.

    Start as many as the events topic has partitions; they share the work as a consumer group. Stops
    in order: events in flight are finished and committed. Exit codes: 0 stopped, 66 bad bundle,
    69 Kafka or Redis unreachable at start, 70 stalled (start it again), 78 bad setting.
    """
    from worker.run import run_worker  # noqa: PLC0415 - Faust takes a second to import

    sys.exit(run_worker(load_settings(**flags)))


@main.command()
@click.argument("user")
@click.option("--surface", default="posts", show_default=True, help="posts, friends or ads.")
@click.option(
    "--explain",
    is_flag=True,
    help="Add which items of the user's history moved each score, and by how much.",
)
@click.option("--text", is_flag=True, help="A table for people instead of JSON.")
@settings_options("redis", "redis_timeout_ms", "registry")
def recommend(user: str, surface: str, explain: bool, text: bool, **flags: Any) -> None:
    """Print what is cached for USER, as JSON. Exit code 1 where there is nothing.

    --explain asks the very bundle that made the list, so it must be in the registry; exit code 66
    where it is not.
    """
    from worker.lookup import explanations, read_cached  # noqa: PLC0415
    from worker.readable import as_text  # noqa: PLC0415
    from worker.registry import open_registry  # noqa: PLC0415

    settings = load_settings(**flags)
    cached = read_cached(settings, user, surface)
    if cached is None:
        click.echo(
            f"streamrec: nothing is cached for user {user!r} on {surface}: no event of theirs has"
            " been processed, or it has expired",
            err=True,
        )
        sys.exit(1)
    found = cached.as_builtins()
    if explain:
        registry = open_registry(settings.registry, settings.registry_mirror_dir)
        found["explanations"] = explanations(cached, registry)
    click.echo(as_text(found) if text else json.dumps(found, indent=2, ensure_ascii=False))


@main.command()
@click.argument("user")
@click.option("--wait", is_flag=True, help="Wait until nothing of them is left in Redis.")
@click.option(
    "--wait-s", type=float, default=60.0, show_default=True, help="Longest such wait, in seconds."
)
@settings_options("kafka", "events_topic", "redis", "redis_timeout_ms")
def forget(user: str, wait: bool, wait_s: float, **flags: Any) -> None:
    """Erase what is kept of USER: histories, lists, and what workers hold in memory.

    Writes a tombstone to the events topic (docs/privacy.md), which the workers carry out in its
    place among the user's events; where none runs, the next one does. Exit code 75 where --wait was
    in vain: the tombstone stays, and need not be sent again.
    """
    from worker.forget_command import forget as send  # noqa: PLC0415

    place = send(load_settings(**flags), user, wait_s=wait_s if wait else None)
    done = "erased" if wait else "will be erased when a worker reads the tombstone"
    click.echo(f"{done}: {place.topic}, partition {place.partition}, offset {place.offset}")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def validate(bundle: Path) -> None:
    """Check the model bundle in directory BUNDLE and explain what is wrong with it.

    Exit code 66 where it has errors; warnings alone pass.
    """
    from worker.bundle_checks import check_bundle  # noqa: PLC0415
    from worker.bundle_files import read_manifest  # noqa: PLC0415
    from worker.errors import BundleError  # noqa: PLC0415
    from worker.manifest import metric_summary  # noqa: PLC0415

    findings = check_bundle(bundle)
    for finding in findings:
        click.echo(f"{finding.level}: {finding.check}: {finding.message}")
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        raise BundleError(f"{bundle} has {errors} error{'s' if errors > 1 else ''}")
    manifest = read_manifest(bundle)
    size = sum(file.bytes for file in manifest.files.values())
    click.echo(
        f"ok: {manifest.reference} for {manifest.surface}: {manifest.precision},"
        f" {manifest.item_count} items, history {manifest.max_length}, {size / 1e6:.2f} MB;"
        f" {metric_summary(manifest.metrics)}"
    )


@main.command()
@click.option(
    "--rate", type=float, default=None, help="Events a second; as fast as can be without."
)
@click.option("--limit", type=int, default=None, help="Stop after this many events.")
@settings_options("kafka", "events_topic")
def replay(rate: float | None, limit: int | None, **flags: Any) -> None:
    """Send MovieLens 100K's ratings, in time order, to the events topic.

    A rating of 4 or 5 becomes a like, any other a view. Fetches the data set on first use.
    """
    from worker.replay import replay_ml100k  # noqa: PLC0415

    sent = asyncio.run(replay_ml100k(load_settings(**flags), rate=rate, limit=limit))
    click.echo(f"sent {sent} events")


@main.command()
@click.option("--events", type=int, default=None, help="Replay only the first so many events.")
@click.option("--keep", is_flag=True, help="Leave everything running afterwards; print addresses.")
@click.option(
    "--canary",
    is_flag=True,
    help="Give the small model to half of the users first, and let the gate decide about it.",
)
@click.option("--real-kafka", is_flag=True, help="Apache Kafka instead of the embedded broker.")
@click.option(
    "--compare/--no-compare",
    default=True,
    help="Also time a plain aiokafka loop that scores one event at a time.",
)
@click.option("--show-user", default=None, help="Whose recommendations to print at the end.")
def demo(**options: Any) -> None:
    """Broker, Redis and worker on this machine, with 100,000 real events. Takes a few minutes.

    Replays MovieLens 100K in time order, swaps the fp32 model for one ten times smaller halfway,
    and prints what came of it.
    """
    from worker.demo import run_demo  # noqa: PLC0415

    sys.exit(run_demo(**options))


if __name__ == "__main__":
    main()
