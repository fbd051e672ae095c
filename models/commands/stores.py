"""The registry that a command works on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from models.stores import Store, open_store

registry_option = click.option(
    "--registry",
    default="models/shipped",
    show_default=True,
    envvar="STREAMREC_REGISTRY",
    metavar="DIR_OR_URL",
    help="Where <name>/<version>/ lie: a directory, or a URL such as s3://bucket/models.",
)


def opened(url: str) -> Store:
    """The store at a directory or URL; what is copied from it is dropped after the command."""
    scratch = click.get_current_context().with_resource(
        tempfile.TemporaryDirectory(prefix="streamrec-")
    )
    return open_store(url, Path(scratch))
