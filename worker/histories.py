"""Histories in the worker's memory, bounded in bytes, over those in Redis.

Redis is the truth: every history that a batch changed is written before the batch's offsets are
committed. What is cached here may be dropped once it is written; on a rebalance all of it is, since
another worker may have gone on with those users.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from worker.cache import UserKey
from worker.history import History, Shown
from worker.logs import hashed_user
from worker.metrics import Metrics

log = logging.getLogger(__name__)

#: Stored history and recommendations of each user.
Read = Callable[[Sequence[UserKey]], list[tuple[bytes | None, bytes | None]]]
#: Deletes stored histories.
Discard = Callable[[Sequence[UserKey]], None]

#: What a history takes in memory beside its stored form, which is about as large as its columns:
#: Python's own objects, and each item id that no model knows as a string of its own. Measured
#: (docs/design.md).
MEMORY_PER_HISTORY = 1400
#: The lists that the user was served; their items are the model's own strings, or read from Redis.
MEMORY_PER_SHOWN = 64
MEMORY_PER_SHOWN_ITEM = 40
MEMORY_PER_ITEM, MEMORY_PER_OWN_ITEM = 8, 54


class Histories:
    """A bounded cache of `History`, least recently used out first."""

    def __init__(
        self, read: Read, discard: Discard, *, length: int, max_bytes: float, metrics: Metrics
    ) -> None:
        self._read = read
        self._discard = discard
        self._length = length
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._cached: OrderedDict[UserKey, History] = OrderedDict()
        self._bytes: dict[UserKey, int] = {}
        self._total_bytes = 0
        #: Read since `trust` was called last.
        self._unproven: set[UserKey] = set()

    def __contains__(self, key: UserKey) -> bool:
        return key in self._cached

    def loaded(self, keys: Iterable[UserKey]) -> dict[UserKey, History]:
        """The histories of `keys`, which must be cached."""
        return {key: self._cached[key] for key in keys}

    def load(self, keys: Iterable[UserKey]) -> dict[UserKey, History]:
        """The histories of `keys`, read in one round trip where they are not cached."""
        cached = self._cached
        wanted = dict.fromkeys(keys)
        missing = [key for key in wanted if key not in cached]
        if missing:
            self._fetch(missing)
        self._metrics.history_reads.labels("cache").inc(len(wanted) - len(missing))
        for key in wanted:
            cached.move_to_end(key)
        return self.loaded(wanted)

    def trust(self) -> None:
        """Redis had lost nothing when the histories in memory were read."""
        self._unproven.clear()

    def doubt(self) -> list[UserKey]:
        """Forget what was read since `trust`: Redis has lost something. Returns what is left."""
        self.drop(self._unproven)
        self._unproven.clear()
        return list(self._cached)

    def _fetch(self, missing: Sequence[UserKey]) -> None:
        found = 0
        damaged: list[UserKey] = []
        read = self._read(missing)
        self._unproven.update(missing)
        for key, (data, recommendations) in zip(missing, read, strict=True):
            if data is None:
                self._cached[key] = History(self._length)
                continue
            try:
                self._cached[key] = History.from_bytes(data, self._length)
            except ValueError as error:
                # One damaged key must not stop everybody's stream; its user starts afresh.
                log.error(
                    "history_damaged surface=%s user=%s error=%s",
                    key.surface.value, hashed_user(key.user_id), error,
                )  # fmt: skip
                self._cached[key] = History(self._length)
                damaged.append(key)
                continue
            found += 1
            self._cached[key].served = _shown(recommendations)
            self._resize(key, len(data))
        if damaged:
            # Their marks, if those are whole, would refuse what is written from now on.
            self._discard(damaged)
        reads = self._metrics.history_reads
        reads.labels("redis").inc(found)
        reads.labels("damaged").inc(len(damaged))
        reads.labels("nowhere").inc(len(missing) - found - len(damaged))

    def put(self, key: UserKey, history: History) -> None:
        """`history` takes the place of what is cached of `key`, which must be; in memory alone."""
        self._cached[key] = history

    def stored(self, keys: Iterable[UserKey]) -> dict[UserKey, bytes]:
        """Stored forms of `keys`, which must be cached."""
        stored = {}
        for key in keys:
            stored[key] = data = self._cached[key].to_bytes()
            self._resize(key, len(data))
        return stored

    def trim(self) -> None:
        """Drop what is over the bound; to be called once all that changed is in Redis."""
        if self._total_bytes > self._max_bytes:
            self._evict()
        self._metrics.history_cache_bytes.set(self._total_bytes)
        self._metrics.history_cache_users.set(len(self._cached))

    def drop(self, keys: Iterable[UserKey]) -> None:
        """Forget these: Redis has something newer."""
        for key in keys:
            self._cached.pop(key, None)
            self._total_bytes -= self._bytes.pop(key, 0)

    def clear(self) -> None:
        """Forget everything: the partitions were taken away."""
        self._cached.clear()
        self._bytes.clear()
        self._total_bytes = 0
        self._unproven.clear()

    def _resize(self, key: UserKey, stored_bytes: int) -> None:
        history = self._cached[key]
        size = MEMORY_PER_HISTORY + stored_bytes + MEMORY_PER_ITEM * len(history.items)
        size += MEMORY_PER_OWN_ITEM * history.unshared()
        size += len(history.window) + len(history.carry or b"")
        for shown in (history.served, history.beside):
            if shown is not None:
                size += MEMORY_PER_SHOWN + MEMORY_PER_SHOWN_ITEM * len(shown.items)
        self._total_bytes += size - self._bytes.get(key, 0)
        self._bytes[key] = size

    def _evict(self) -> None:
        while self._cached and self._total_bytes > self._max_bytes:
            key, _ = self._cached.popitem(last=False)
            self._total_bytes -= self._bytes.pop(key, 0)


class _Served(msgspec.Struct, gc=False):
    """What is wanted of stored recommendations."""

    model_version: str
    items: tuple[str, ...]


_DECODE_SERVED = msgspec.json.Decoder(_Served).decode


def _shown(recommendations: bytes | None) -> Shown | None:
    """The list in stored recommendations; None where there is none that can be read."""
    if recommendations is None:
        return None
    try:
        served = _DECODE_SERVED(recommendations)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # ValueError: no UTF-8
        return None
    return Shown(served.model_version, served.items)
