"""Events from records as the worker reads them (docs/events.md): JSON Lines here, Kafka beside."""

from __future__ import annotations

import gzip
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, cast

import numpy as np

from models.events import TYPE_CODES, BadRecords, EventLog, SourceError
from worker.events import Decoder, Event, Record, Records
from worker.settings import load_settings

_CHUNK = 8192


class RecordIntake:
    """Decodes records with the worker's decoder and limits, and gathers those of one surface.

    Args:
        keyed: the records have keys, which must be what the worker asks of them.

    Raises:
        SettingsError: a STREAMREC_ variable is out of range.
    """

    def __init__(self, log: EventLog, bad: BadRecords, surface: str, *, keyed: bool) -> None:
        settings = load_settings()
        self._decoder = Decoder(
            max_bytes=settings.event_max_bytes,
            max_future_ms=int(settings.event_max_future_s * 1000),
            require_user_key=keyed and settings.require_user_key,
        )
        self._log = log
        self._bad = bad
        self._surface = surface

    def take(self, records: Records, where: Callable[[Record], str]) -> None:
        """Gather `records`; `where` tells people the place of one.

        Raises:
            SourceError: a record breaks the contract, and such are not skipped.
        """
        batch = self._decoder.decode(records, now_ms=int(time.time() * 1000))
        for rejected in batch.rejected:
            self._bad.reject(where(rejected.record), rejected.reason, rejected.detail)
        for part in batch.cut():
            self._gather(part.events)
            for user in self._log.users.codes(one.user_id for one in part.tombstones):
                self._log.forget(int(user))

    def _gather(self, read: Sequence[Event]) -> None:
        events = [event for event in read if event.surface == self._surface]
        self._log.elsewhere += len(read) - len(events)
        self._log.extend(
            self._log.users.codes(event.user_id for event in events),
            self._log.items.codes(event.item_id for event in events),
            np.array([TYPE_CODES[event.event_type] for event in events], dtype=np.int8),
            np.array([event.timestamp_ms for event in events], dtype=np.int64),
        )
        for event in events:
            if event.text is not None:
                self._log.note_text(event.item_id, event.timestamp_ms, event.text)


def read_jsonl(path: Path, log: EventLog, bad: BadRecords, surface: str) -> None:
    """Gather the events of a .jsonl or .jsonl.gz file.

    Raises:
        SourceError: the file cannot be read, or a record breaks the contract.
    """
    intake = RecordIntake(log, bad, surface, keyed=False)
    name = str(path)
    try:
        with _opened(path) as stream:
            numbered = enumerate(stream, start=1)
            while lines := list(islice(numbered, _CHUNK)):
                intake.take(_records(name, lines), lambda record: f"{name}, line {record.offset}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(
            f"{name} is no whole gzip file ({error}): fetch or write it again"
        ) from None
    except OSError as error:
        raise SourceError(f"{name} cannot be read: {error.strerror or error}") from None


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _records(name: str, lines: Sequence[tuple[int, bytes]]) -> Records:
    numbers = [number for number, _ in lines]
    values = [line.rstrip(b"\r\n") for _, line in lines]
    return Records(name, 0, numbers, [None] * len(lines), values, [0] * len(lines))
