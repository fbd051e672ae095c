"""`streamrec models ...`: one module of commands/ a topic."""

from __future__ import annotations

import click

from models.commands import compress, publish, rankers, report, scale, search, text, train

_TOPICS = (train, compress, text, search, report, scale, rankers, publish)


@click.group(commands=[command for topic in _TOPICS for command in topic.COMMANDS])
def models() -> None:
    """Train, compress, evaluate and publish models."""
