"""`streamrec models ...`: one module of commands/ a topic."""

from __future__ import annotations

import click

from models.commands import (
    compress,
    fetch,
    publish,
    rankers,
    releases,
    report,
    scale,
    search,
    sign,
    text,
    train,
)

_TOPICS = (train, compress, text, search, report, scale, rankers, fetch, publish, releases, sign)


@click.group(commands=[command for topic in _TOPICS for command in topic.COMMANDS])
def models() -> None:
    """Train, compress, evaluate and publish models."""
