"""`streamrec models fetch`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from models.commands.stores import opened, registry_option
from models.stores import Store
from worker.errors import BundleError


@click.command("fetch")
@click.argument("bundle")
@click.option("--precision", default=None, help="The newest version of it, such as fp32.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Directory to copy to, <out>/<name>/<version>/.",
)  # fmt: skip
@registry_option
def fetch_bundle(bundle: str, precision: str | None, out: Path, registry: str) -> None:
    """Copy BUNDLE from the registry: NAME@VERSION, or NAME for the one that serves.

    Prints the directory of the copy, which is made anew where it is there.
    """
    store = opened(registry)
    name, _, version = bundle.partition("@")
    if precision is not None:
        if version:
            raise click.UsageError("give a version or --precision, not both")
        version = _newest(store, name, precision)
    elif not version:
        version = store.serving(name)
    source = store.path(name, version)
    # What is copied is what its manifest says.
    store.verify(name, version, store.manifest(name, version))
    target = out / name / version
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    click.echo(target)


def _newest(store: Store, name: str, precision: str) -> str:
    for version in reversed(store.versions(name)):
        if store.manifest(name, version).precision == precision:
            return version
    raise BundleError(f"{store.url} has no {precision} version of {name}: publish one")


COMMANDS = [fetch_bundle]
