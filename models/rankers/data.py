"""Calibration rows from .npz, .parquet or .csv files."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.rankers.errors import RankerError


@dataclass(frozen=True)
class Rows:
    """Feature rows, with what they are to be ranked by.

    `features` float32 `[rows, features]`; `labels` float64 `[rows]`, larger is better; `groups`
    int64 `[rows]`, rows of one query alike. Labels and groups are None where not given.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.float64] | None = None
    groups: NDArray[np.int64] | None = None


def read_rows(path: Path, labels: str | None = None, groups: str | None = None) -> Rows:
    """Read calibration rows.

    Columns of a .parquet or .csv file other than `labels` and `groups` are features, in order. A
    .npz file holds them as the matrix `X`, and labels and groups as arrays of their names.

    Raises:
        RankerError: the file cannot be read, a column is missing, or features are no numbers.
    """
    readers = {".npz": _read_npz, ".parquet": _read_table, ".csv": _read_table}
    reader = readers.get(path.suffix)
    if reader is None:
        raise RankerError(f"{path}: calibration data is a .npz, .parquet or .csv file")
    if not path.is_file():
        raise RankerError(f"{path} is missing: give a file with calibration rows")
    columns, features = reader(path, [name for name in (labels, groups) if name])
    if features.ndim != 2 or not features.size:
        raise RankerError(f"{path} has features of shape {list(features.shape)}; rows are needed")
    if any(len(column) != len(features) for column in columns.values()):
        raise RankerError(f"{path}: features, labels and groups differ in length")
    found_labels = None
    if labels:
        found_labels = _numbers(columns[labels], np.float64, f"{path}: labels {labels!r}")
        if not np.isfinite(found_labels).all() or (found_labels < 0).any():
            raise RankerError(f"{path}: labels {labels!r} must be 0 or above, and none missing")
    found_groups = None
    if groups:
        found_groups = np.unique(columns[groups], return_inverse=True)[1].astype(np.int64)
    return Rows(_numbers(features, np.float32, f"{path}: features"), found_labels, found_groups)


def _numbers(values: NDArray[Any], dtype: type[Any], what: str) -> NDArray[Any]:
    try:
        return np.ascontiguousarray(values, dtype=dtype)
    except (TypeError, ValueError):
        raise RankerError(f"{what} are not all numbers: encode or leave out the others") from None


def _read_npz(path: Path, extra: list[str]) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            held = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RankerError(f"{path} is not a whole .npz file ({error}): write it again") from None
    _must_hold(path, ["X", *extra], list(held))
    return {name: held[name] for name in extra}, held["X"]


def _read_table(path: Path, extra: list[str]) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    import pyarrow as pa  # noqa: PLC0415 - heavy
    from pyarrow import csv, parquet  # noqa: PLC0415

    try:
        table = parquet.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)
    except (pa.ArrowException, OSError) as error:
        raise RankerError(f"{path} cannot be read ({error}): write it again") from None
    _must_hold(path, extra, table.column_names)
    columns = {
        name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names
    }
    features = [columns[name] for name in table.column_names if name not in extra]
    if not features:
        raise RankerError(f"{path} has no feature columns")
    return {name: columns[name] for name in extra}, np.column_stack(features)


def _must_hold(path: Path, wanted: list[str], held: list[str]) -> None:
    for name in wanted:
        if name not in held:
            raise RankerError(f"{path} has no {name!r}; it has {', '.join(held[:20])}")
