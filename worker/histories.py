"""Histories in the worker's memory, bounded in bytes, over those in Redis.

Redis is the truth: every history that a batch changed is written before the batch's offsets are
committed. What is cached here may be dropped at any time, except what is not yet written; on a
rebalance all of it is, since another worker may have gone on with those users.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence

from worker.cache import UserKey
from worker.history import History
from worker.metrics import Metrics

log = logging.getLogger(__name__)

Read = Callable[[Sequence[UserKey]], Awaitable[list[bytes | None]]]

#: Python objects take several times what MessagePack does. Measured: 200 items of 8 characters
#: are 3.6 kB stored and 22 kB in memory (docs/design.md).
MEMORY_PER_STORED_BYTE = 5.8
MEMORY_PER_HISTORY = 700


class Histories:
    """A bounded cache of `History`, least recently used out first."""

    def __init__(self, read: Read, *, length: int, max_bytes: float, metrics: Metrics) -> None:
        self._read = read
        self._length = length
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._cached: OrderedDict[UserKey, History] = OrderedDict()
        self._bytes: dict[UserKey, float] = {}
        self._total_bytes = 0.0
        #: Histories changed by batches that are not yet written, with how many such batches.
        self._unwritten: dict[UserKey, int] = {}

    async def load(self, keys: Iterable[UserKey]) -> dict[UserKey, History]:
        """The histories of `keys`, read in one round trip where they are not cached."""
        wanted = list(dict.fromkeys(keys))
        missing = [key for key in wanted if key not in self._cached]
        stored = await self._read(missing)
        found = damaged = 0
        for key, data in zip(missing, stored, strict=True):
            if data is None:
                self._cached[key] = History(self._length)
                continue
            try:
                self._cached[key] = History.from_bytes(data, self._length)
            except ValueError as error:
                # One damaged key must not stop everybody's stream; its user starts afresh.
                log.error("history_damaged surface=%s error=%s", key.surface.value, error)
                self._cached[key] = History(self._length)
                damaged += 1
                continue
            found += 1
            self._resize(key, len(data))
        reads = self._metrics.history_reads
        reads.labels("cache").inc(len(wanted) - len(missing))
        reads.labels("redis").inc(found)
        reads.labels("damaged").inc(damaged)
        reads.labels("nowhere").inc(len(missing) - found - damaged)
        for key in wanted:
            self._cached.move_to_end(key)
        return {key: self._cached[key] for key in wanted}

    def changed(self, keys: Iterable[UserKey]) -> dict[UserKey, bytes]:
        """Stored forms of `keys`, which stay cached until `written` is called for them."""
        stored = {}
        for key in keys:
            history = self._cached.get(key)
            if history is None:
                continue
            stored[key] = data = history.to_bytes()
            self._unwritten[key] = self._unwritten.get(key, 0) + 1
            self._resize(key, len(data))
        return stored

    def written(self, keys: Iterable[UserKey]) -> None:
        """Note that `keys` are in Redis, and drop what is over the bound."""
        for key in keys:
            left = self._unwritten.get(key, 0) - 1
            if left > 0:
                self._unwritten[key] = left
            else:
                self._unwritten.pop(key, None)
        if self._total_bytes > self._max_bytes:
            self._evict()
        self._metrics.history_cache_bytes.set(self._total_bytes)
        self._metrics.history_cache_users.set(len(self._cached))

    def clear(self) -> None:
        """Forget everything: the partitions were taken away."""
        self._cached.clear()
        self._bytes.clear()
        self._unwritten.clear()
        self._total_bytes = 0.0

    def _resize(self, key: UserKey, stored_bytes: int) -> None:
        size = MEMORY_PER_HISTORY + MEMORY_PER_STORED_BYTE * stored_bytes
        self._total_bytes += size - self._bytes.get(key, 0.0)
        self._bytes[key] = size

    def _evict(self) -> None:
        for key in list(self._cached):
            if self._total_bytes <= self._max_bytes:
                return
            if key not in self._unwritten:
                del self._cached[key]
                self._total_bytes -= self._bytes.pop(key, 0.0)
