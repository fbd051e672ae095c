"""Read events: data in, columns out.

A source is one of

- `ml-100k`, `ml-1m`: MovieLens, fetched from the package index (models/movielens.py);
- `synthetic-follows`: a made-up follow graph (models/synthetic.py), surface `friends`;
- a path or glob ending in `.jsonl`, `.jsonl.gz` (records of docs/events.md) or `.parquet`
  (columns of the same names, models/sources_parquet.py);
- `kafka://host:port[,host:port]/topic?from=OFFSET|earliest|TIME&to=OFFSET|latest|TIME`.
"""

from __future__ import annotations

import glob
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from models.events import BadRecords, EventLog, Events, SourceError, at_least
from models.sources_records import read_jsonl
from models.synthetic import synthetic_follows
from worker.errors import ExtraMissingError
from worker.events import EventType, Surface, UserEvent, parse_surface

__all__ = ["Events", "SourceError", "at_least", "read_events", "write_jsonl"]

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_FORMS = (
    "ml-100k, ml-1m, synthetic-follows, a path or glob ending in .jsonl, .jsonl.gz or .parquet, or"
    " kafka://..."
)


def read_events(
    source: str, *, surface: str = "posts", skip_bad: bool = False, limit: int | None = None
) -> Events:
    """The events of `source` on `surface`, in time order.

    A `hide` is no event here: it takes out the user's earlier events with the item.

    Args:
        surface: other surfaces' events are left out; sources that name none are taken to be of it.
        skip_bad: count bad records, warn, and go on, where the default is an error.
        limit: keep the first `limit` events by time; the source is read to its end all the same.

    Raises:
        SourceError: the source cannot be read, a record breaks the contract, or nothing is left.
        DatasetError: MovieLens could not be fetched.
        ExtraMissingError: Parquet, and pyarrow is not installed.
        SettingsError: a STREAMREC_ variable, which set the limits on records, is out of range.
    """
    try:
        parse_surface(surface)
    except ValueError as error:
        raise SourceError(str(error)) from None
    if limit is not None and limit < 1:
        raise SourceError(f"a limit of {limit} leaves no events: give 1 or more")
    if source == "synthetic-follows":
        if surface != Surface.FRIENDS:
            raise SourceError("synthetic-follows is of the surface friends: give that surface")
        return synthetic_follows(2_000, 60_000, 7, limit=limit)
    if source in ("ml-100k", "ml-1m"):
        from models import movielens  # noqa: PLC0415 - needs what the demo extra brings

        load = movielens.ml_100k if source == "ml-100k" else movielens.ml_1m
        return load(limit=limit)
    log, bad = EventLog(), BadRecords(skip=skip_bad)
    if source.startswith("kafka://"):
        from models.sources_kafka import read_kafka  # noqa: PLC0415 - slow to import

        digest = read_kafka(source, log, bad, surface)
    else:
        digest = _read_files(source, log, bad, surface)
    bad.warn(source)
    return log.events(name=source, sha256=digest, limit=limit)


def write_jsonl(events: Events, path: Path, *, surface: str = "posts") -> None:
    """Write `events` as records of docs/events.md; an item's text goes with its last event.

    Raises:
        SourceError: the file cannot be written.
    """
    encode = msgspec.json.Encoder().encode
    last = {item: number for number, item in enumerate(events.items.tolist())}
    rows = zip(
        events.users.tolist(),
        events.items.tolist(),
        events.types.tolist(),
        events.timestamps_ms.tolist(),
        strict=True,
    )
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / path.name
            with part.open("wb") as stream:
                for number, (user, item, kind, timestamp_ms) in enumerate(rows):
                    text = events.texts.get(item) if last[item] == number else None
                    event = UserEvent(
                        user, item, EventType(kind), timestamp_ms, Surface(surface), text=text
                    )
                    stream.write(encode(event) + b"\n")
            part.replace(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror or error}") from None


def _read_files(source: str, log: EventLog, bad: BadRecords, surface: str) -> str:
    """Gather from each file; returns the sha256 of their bytes one after the other."""
    digest = hashlib.sha256()
    for path in _files(source):
        try:
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None
        if path.suffix == ".parquet":
            try:
                from models.sources_parquet import read_parquet  # noqa: PLC0415 - pyarrow is heavy
            except ImportError as error:
                raise ExtraMissingError(
                    f"Parquet needs {error.name}: pip install 'streamrec[train]'"
                ) from None
            read_parquet(path, log, bad, surface)
        else:
            read_jsonl(path, log, bad, surface)
    return digest.hexdigest()


def _files(source: str) -> Sequence[Path]:
    # A file's own name may hold what a glob takes for a pattern.
    exists = Path(source).exists()
    found = [source] if exists else sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - absolute patterns
    if not found:
        raise SourceError(f"no file matches {source}: correct the path, or give {_FORMS}")
    for name in found:
        if not name.endswith(_SUFFIXES):
            raise SourceError(f"{name} is no source: give {_FORMS}")
    return [Path(name) for name in found]
