"""Events from Parquet, column by column: no Python object per event."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.events import TYPE_CODES, TYPES, BadRecords, EventLog, SourceError, Vocabulary
from worker.events import EARLIEST_TIMESTAMP_MS, MAX_ID_LENGTH, EventType, Reason, Surface
from worker.settings import load_settings

REQUIRED = ("user_id", "item_id", "timestamp")
OPTIONAL = ("event_type", "surface", "text")
_ROWS = 65536
#: Stands for what is no number: before every timestamp that is accepted.
_UNREADABLE = -(2**63)


def read_parquet(path: Path, log: EventLog, bad: BadRecords, surface: str) -> None:
    """Gather the events of a Parquet file.

    Columns: `user_id`, `item_id` (strings), `timestamp` (integer milliseconds, a timestamp type, or
    RFC 3339 strings), and perhaps `event_type` (else all are views), `surface` (else all are of the
    surface asked for) and `text`; others are ignored. Values keep to docs/events.md.

    Raises:
        SourceError: the file is damaged, lacks a column, has one of a wrong type, or holds a row
            that breaks the contract.
        SettingsError: a STREAMREC_ variable is out of range.
    """
    latest_ms = int((time.time() + load_settings().event_max_future_s) * 1000)
    try:
        with pq.ParquetFile(path) as file:
            columns = _checked_columns(path, file.schema_arrow)
            first_row = 1
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                batch.validate(full=True)
                _take(_Rows(path, first_row, batch), log, bad, surface, latest_ms)
                first_row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{path} cannot be read as Parquet ({_line(error)}): write or fetch it again"
        ) from None


def _checked_columns(path: Path, schema: Any) -> list[str]:
    missing = [name for name in REQUIRED if name not in schema.names]
    if missing:
        raise SourceError(
            f"{path} has no column {', '.join(missing)} (it has {', '.join(schema.names)}):"
            " rename or add it"
        )
    columns = [name for name in (*REQUIRED, *OPTIONAL) if name in schema.names]
    for name in columns:
        kind = schema.field(name).type
        if name == "timestamp":
            if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_timestamp(kind)):
                raise SourceError(
                    f"{path}: column timestamp is {kind}: make it integer milliseconds, a timestamp"
                    " type, or RFC 3339 strings"
                )
        elif not _is_text(kind):
            raise SourceError(f"{path}: column {name} is {kind}: cast it to string")
    return columns


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


class _Rows:
    """A batch of rows, and for each the first thing that is wrong with it."""

    def __init__(self, path: Path, first_row: int, batch: Any) -> None:
        self.path = path
        self.first_row = first_row
        self.batch = batch
        self.good = np.ones(batch.num_rows, dtype=bool)
        self._problems: list[tuple[int, Reason, str]] = []

    def has(self, name: str) -> bool:
        """Whether there is such a column."""
        return name in self.batch.schema.names

    def strings(self, name: str) -> Any:
        """A column of strings, as Arrow holds it."""
        return self.batch.column(name).cast(pa.large_string())

    def require(self, right: Any, reason: Reason, describe: Callable[[int], str]) -> None:
        """Rows that were good so far and are not `right`, bool `[rows]`, are bad for `reason`."""
        wrong = self.good & ~np.asarray(right, dtype=bool)
        for row in np.flatnonzero(wrong).tolist():
            self._problems.append((row, reason, describe(row)))
        self.good &= ~wrong

    def report(self, bad: BadRecords) -> None:
        """Report the bad rows in file order."""
        for row, reason, detail in sorted(self._problems):
            bad.reject(f"{self.path}, row {self.first_row + row}", reason, detail)


def _take(rows: _Rows, log: EventLog, bad: BadRecords, surface: str, latest_ms: int) -> None:
    for name in (*REQUIRED, "event_type", "surface"):
        if rows.has(name):
            _require_present(rows, name)
    for name in ("user_id", "item_id"):
        _require_length(rows, name)
    for name, known in (("event_type", TYPES), ("surface", tuple(one.value for one in Surface))):
        if rows.has(name):
            _require_known(rows, name, known)
    times = _timestamps(rows)
    rows.require(
        (times >= EARLIEST_TIMESTAMP_MS) & (times < 10**15),
        Reason.TIMESTAMP_RANGE,
        lambda row: (
            f"timestamp {times[row]} is not epoch milliseconds after 1973-03-03 (is it in seconds?)"
        ),
    )
    rows.require(
        times <= latest_ms,
        Reason.TIMESTAMP_FUTURE,
        lambda row: f"timestamp {times[row]} lies in the future; check the producer's clock",
    )
    rows.report(bad)
    wanted = rows.good
    if rows.has("surface"):
        wanted = wanted & np.asarray(
            pc.fill_null(pc.equal(rows.strings("surface"), surface), False)
        )
        log.elsewhere += int(rows.good.sum() - wanted.sum())
    _gather(rows, wanted, times[wanted], log)


def _require_present(rows: _Rows, name: str) -> None:
    rows.require(rows.batch.column(name).is_valid(), Reason.MISSING_FIELD, lambda _: f"no {name}")


def _require_length(rows: _Rows, name: str) -> None:
    lengths = _numbers(pc.utf8_length(rows.strings(name)))
    rows.require(
        (lengths >= 1) & (lengths <= MAX_ID_LENGTH),
        Reason.INVALID_VALUE,
        lambda row: f"{name} has {lengths[row]} characters; 1 to {MAX_ID_LENGTH} are accepted",
    )


def _require_known(rows: _Rows, name: str, known: tuple[str, ...]) -> None:
    column = rows.strings(name)
    rows.require(
        pc.is_in(column, pa.array(known, pa.large_string())),
        Reason.UNKNOWN_VALUE,
        lambda row: f"unknown {name} {column[row].as_py()!r}; known: {', '.join(known)}",
    )


def _gather(
    rows: _Rows, wanted: NDArray[np.bool_], times: NDArray[np.int64], log: EventLog
) -> None:
    chosen = pa.array(wanted)
    items = rows.strings("item_id").filter(chosen)
    item_codes = _codes(items, log.items)
    types = np.full(len(times), TYPE_CODES[EventType.VIEW], dtype=np.int8)
    if rows.has("event_type"):
        found = pc.index_in(
            rows.strings("event_type").filter(chosen), pa.array(TYPES, pa.large_string())
        )
        types = _numbers(found).astype(np.int8)
    log.extend(_codes(rows.strings("user_id").filter(chosen), log.users), item_codes, types, times)
    if rows.has("text"):
        texts = rows.strings("text").filter(chosen)
        for row in _newest(item_codes, times, np.asarray(texts.is_valid(), dtype=bool)).tolist():
            log.note_text(items[row].as_py(), int(times[row]), texts[row].as_py())


def _codes(column: Any, vocabulary: Vocabulary) -> NDArray[np.int32]:
    encoded = column.dictionary_encode()
    codes: NDArray[np.int32] = vocabulary.codes(encoded.dictionary.to_pylist())
    return codes[_numbers(encoded.indices)]


def _newest(
    items: NDArray[np.int32], times: NDArray[np.int64], valid: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The row of each item's newest text, of equally new ones the last; all arguments `[rows]`."""
    rows = np.flatnonzero(valid)
    order = rows[np.lexsort((rows, times[rows], items[rows]))]
    last = np.append(items[order][1:] != items[order][:-1], True)[: len(order)]
    newest: NDArray[np.int64] = order[last]
    return newest


def _timestamps(rows: _Rows) -> NDArray[np.int64]:
    """Epoch milliseconds, int64 `[rows]`; rows whose strings are no time are bad from now on."""
    column = rows.batch.column("timestamp")
    kind = column.type
    if pa.types.is_timestamp(kind):
        return _numbers(column.cast(pa.timestamp("ms", kind.tz), safe=False).cast(pa.int64()))
    if pa.types.is_integer(kind):
        return _numbers(column.cast(pa.int64(), safe=False))
    texts = rows.strings("timestamp")
    times = np.array([_milliseconds(text) for text in texts.to_pylist()], dtype=np.int64)
    rows.require(
        times != _UNREADABLE,
        Reason.INVALID_VALUE,
        lambda row: f"timestamp {texts[row].as_py()!r} is no RFC 3339 date-time",
    )
    return times


def _milliseconds(text: str | None) -> int:
    try:
        moment = msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        return _UNREADABLE
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return int(aware.timestamp() * 1000.0)


def _numbers(column: Any) -> NDArray[np.int64]:
    filled = pc.fill_null(column.cast(pa.int64()), _UNREADABLE)
    return np.asarray(filled.to_numpy(zero_copy_only=False), dtype=np.int64)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
