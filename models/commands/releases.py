"""`streamrec models promote | canary | shadow | rollback | quarantine | unquarantine | status`."""

from __future__ import annotations

import asyncio
import getpass
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from models.commands.options import Percent
from models.commands.output import age, json_option, print_json, section
from models.commands.stores import opened, registry_option
from models.stores import Store
from worker.releases import (
    Release,
    canary_ended,
    newer,
    promoted,
    rolled_back,
    unquarantined,
    with_canary,
    with_quarantined,
    with_shadow,
)
from worker.settings import load_settings

#: Where what a change is pushed with lies in the context's meta.
_KAFKA, _TOPIC = "streamrec.kafka", "streamrec.releases_topic"


def push_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --kafka and --releases-topic, for what changes a release."""

    def kept(key: str) -> Callable[[click.Context, click.Parameter, str | None], None]:
        def keep(context: click.Context, _: click.Parameter, value: str | None) -> None:
            context.meta[key] = value

        return keep

    topic = click.option(
        "--releases-topic",
        default="model-releases",
        show_default=True,
        envvar="STREAMREC_RELEASES_TOPIC",
        expose_value=False,
        callback=kept(_TOPIC),
        help="Topic that it is pushed to.",
    )
    kafka = click.option(
        "--kafka",
        envvar="STREAMREC_KAFKA",
        expose_value=False,
        callback=kept(_KAFKA),
        metavar="HOST:PORT",
        help="Push the change to workers at once, instead of at their next look at the registry.",
    )
    return kafka(topic(command))


@click.command("promote")
@click.argument("name")
@click.argument("version")
@click.option("--force", is_flag=True, help="Even if it is quarantined, and lift that.")
@push_options
@registry_option
@json_option
def promote_model(name: str, version: str, force: bool, registry: str, as_json: bool) -> None:
    """Make VERSION of model NAME the one that serves; running workers swap to it.

    A canary or shadow of VERSION ends thereby; those of another version go on.
    """
    store = opened(registry)
    _read_again(store, name, version)
    release = promote(store, name, version, force=force)
    _done(name, release, as_json, f"{name}@{version} serves from now on")


@click.command("canary")
@click.argument("name")
@click.argument("version", required=False)
@click.option("--share", type=Percent(), help="Of the users, such as 10%.")
@click.option(
    "--no-auto", is_flag=True, help="Workers count, but leave it to you to promote or end it."
)
@click.option("--end", is_flag=True, help="End the canary; the stable version serves all users.")
@push_options
@registry_option
@json_option
def canary_model(
    name: str,
    version: str | None,
    share: float | None,
    no_auto: bool,
    end: bool,
    registry: str,
    as_json: bool,
) -> None:
    """Let VERSION of model NAME serve a share of the users, beside the stable version.

    Workers compare both by what users do, and promote the canary or roll it back when that is sure.
    """
    store, at, by = opened(registry), datetime.now(UTC), whoami()
    if end:
        if version is not None or share is not None or no_auto:
            raise click.UsageError("--end takes no VERSION, --share or --no-auto")
        release = _change(store, name, lambda old: canary_ended(old, by=by, at=at))
        _done(name, release, as_json, f"the canary of {name} ended; {release.stable} serves all")
        return
    if version is None or share is None:
        raise click.UsageError("say which VERSION and which --share, or --end")
    _read_again(store, name, version)
    release = _change(
        store, name, lambda old: with_canary(old, version, share, auto=not no_auto, by=by, at=at)
    )
    _done(name, release, as_json, f"{name}@{version} serves {share:.4g} of the users from now on")


@click.command("shadow")
@click.argument("name")
@click.argument("version", required=False)
@click.option("--off", is_flag=True, help="End the shadow.")
@push_options
@registry_option
@json_option
def shadow_model(name: str, version: str | None, off: bool, registry: str, as_json: bool) -> None:
    """Ask VERSION of model NAME beside the stable version, and show nobody its answers."""
    if (version is None) != off:
        raise click.UsageError("say which VERSION, or --off")
    store = opened(registry)
    if version is not None:
        _read_again(store, name, version)
    by, at = whoami(), datetime.now(UTC)
    release = _change(store, name, lambda old: with_shadow(old, version, by=by, at=at))
    said = "no version" if version is None else f"{name}@{version}"
    _done(name, release, as_json, f"{said} runs as shadow of {name} from now on")


@click.command("rollback")
@click.argument("name")
@click.option("--to", default=None, metavar="VERSION", help="Any version promoted before.")
@click.option(
    "--reason", default="rolled back", show_default=True, help="Why the one left is quarantined."
)
@push_options
@registry_option
@json_option
def rollback_model(name: str, to: str | None, reason: str, registry: str, as_json: bool) -> None:
    """Go back to the version of model NAME promoted before; again, to the one before that.

    The version left is quarantined, and a running canary ends.
    """
    by, at = whoami(), datetime.now(UTC)
    release = _change(
        opened(registry),
        name,
        lambda old: rolled_back(old, to, quarantine=reason, by=by, at=at),
    )
    _done(name, release, as_json, f"{name}@{release.stable} serves from now on")


@click.command("quarantine")
@click.argument("name")
@click.argument("version")
@click.option("--reason", default="by hand", show_default=True, help="For those who read status.")
@push_options
@registry_option
@json_option
def quarantine_model(name: str, version: str, reason: str, registry: str, as_json: bool) -> None:
    """Forbid that VERSION of model NAME serves; a canary or shadow of it ends."""
    by, at = whoami(), datetime.now(UTC)
    store = opened(registry)
    store.require(name, version)
    release = _change(store, name, lambda old: with_quarantined(old, version, reason, by=by, at=at))
    _done(name, release, as_json, f"{name}@{version} is quarantined: {reason}")


@click.command("unquarantine")
@click.argument("name")
@click.argument("version")
@push_options
@registry_option
@json_option
def unquarantine_model(name: str, version: str, registry: str, as_json: bool) -> None:
    """Allow again that VERSION of model NAME serves; it does so once promoted."""
    by, at = whoami(), datetime.now(UTC)
    release = _change(opened(registry), name, lambda old: unquarantined(old, version, by=by, at=at))
    _done(name, release, as_json, f"{name}@{version} may serve again")


@click.command("status")
@click.argument("name", required=False)
@registry_option
@json_option
def show_status(name: str | None, registry: str, as_json: bool) -> None:
    """Show which versions serve, of model NAME or of all."""
    store = opened(registry)
    rows = [_status(store, model) for model in ([name] if name is not None else store.names())]
    if as_json:
        print_json({"registry": store.url, "models": rows})
        return
    for row in rows:
        click.echo(row["name"])
        section("", _status_lines(row))
    if not rows:
        click.echo(f"{store.url} has no model yet: streamrec models publish BUNDLE")


COMMANDS: Sequence[click.Command] = (
    promote_model,
    canary_model,
    shadow_model,
    rollback_model,
    quarantine_model,
    unquarantine_model,
    show_status,
)


def promote(store: Store, name: str, version: str, *, force: bool = False) -> Release:
    """Make `version` the one that serves, as `Registry.promote`, and push that.

    Raises:
        BrokerError: Kafka does not answer, and nothing was changed; or it does not take the change,
            and the registry has it nevertheless.
    """
    by, at = whoami(), datetime.now(UTC)
    return _change(
        store, name, lambda old: promoted(old, version, force=force, by=by, at=at), repair=True
    )


def _change(
    store: Store,
    name: str,
    transition: Callable[[Release | None], Release],
    *,
    repair: bool = False,
) -> Release:
    """Change a release, and push that to the running workers where `--kafka` says how; else they
    find it when they look at the registry.

    What was pushed before may be newer than what the registry has, which workers cannot always
    write: a canary that they rolled back must not come to life again by the next change.
    """
    chosen = click.get_current_context().meta
    kafka = chosen.get(_KAFKA)
    if kafka is None:
        return store.change(name, transition, repair=repair)
    from worker.release_channel import newest_release, push_release  # noqa: PLC0415 - loads Kafka

    settings = load_settings(kafka=kafka, releases_topic=chosen[_TOPIC])
    pushed = asyncio.run(newest_release(settings, name))
    release = store.change(name, lambda old: transition(newer(old, pushed)), repair=repair)
    asyncio.run(push_release(settings, name, release))
    return release


def whoami() -> str:
    """`user@host`, for the history."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _read_again(store: Store, name: str, version: str) -> None:
    """Refuse a damaged version before workers try it."""
    store.verify(name, version, store.manifest(name, version))


def _done(name: str, release: Release, as_json: bool, said: str) -> None:
    if as_json:
        print_json({"name": name, **msgspec.to_builtins(release)})
    else:
        click.echo(said)


def _status(store: Store, name: str) -> dict[str, Any]:
    release = store.release(name)
    fields = {} if release is None else msgspec.to_builtins(release)
    return {
        "name": name,
        "stable": store.serving(name),
        "promoted": release is not None,
        "canary": fields.get("canary"),
        "shadow": fields.get("shadow"),
        "quarantined": fields.get("quarantined", {}),
        "revision": fields.get("revision", 0),
        "at": fields.get("at", ""),
        "by": fields.get("by", ""),
    }


def _status_lines(row: dict[str, Any]) -> list[tuple[str, ...]]:
    newest = "" if row["promoted"] else "  (the newest; none is promoted)"
    lines: list[tuple[str, ...]] = [("stable", row["stable"] + newest)]
    canary = row["canary"]
    if canary is not None:
        for_how_long = age(datetime.fromisoformat(canary["since"]))
        decides = "the gate decides" if canary.get("auto", True) else "you decide"
        lines.append(
            ("canary", f"{canary['version']}  {canary['share']:.4g} of the users for {for_how_long}"
             f", {decides}")
        )  # fmt: skip
    if row["shadow"] is not None:
        lines.append(("shadow", row["shadow"]))
    for version, reason in row["quarantined"].items():
        lines.append(("quarantined", f"{version}  {reason}"))
    if row["at"]:
        lines.append(("changed", f"{row['at']} by {row['by'] or 'nobody named'}"))
    return lines
