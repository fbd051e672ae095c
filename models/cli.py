"""`streamrec models ...`: one module of commands/ a topic."""

from __future__ import annotations

import click

from models.commands import compress, publish, search, train


@click.group(commands=[*train.COMMANDS, *compress.COMMANDS, *search.COMMANDS, *publish.COMMANDS])
def models() -> None:
    """Train, compress, evaluate and publish models."""
