"""The head start of a micro-batch's write: users whose lists are made go to Redis while those of
others are still being made, so that Redis and the model work side by side.

Only a head start: at the first trouble it is given up. Everything is held anyway, and written as a
whole when Redis is back (`worker/held.py`); what had arrived already is written once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from worker.cache import BatchWrite, Refused, UserKey

T = TypeVar("T")


class RedisAwayError(Exception):
    """Redis does not answer, or does not take what is written."""


class Attempt(Protocol):
    """Runs an operation of Redis; raises `RedisAwayError` where it fails."""

    def __call__(self, name: str, operation: Callable[[], T]) -> T:
        """Run `operation`, called `name` in metrics."""
        ...


class EarlyWrite:
    """One per micro-batch. For one thread.

    Args:
        begin: begins the write; None where there shall be no head start.
        attempt: runs each step of it.
    """

    def __init__(self, begin: Callable[[], BatchWrite] | None, attempt: Attempt) -> None:
        self._attempt = attempt
        self._write: BatchWrite | None = None
        #: Users that were sent.
        self.sent: set[UserKey] = set()
        #: Time in this object: packing, sending, waiting.
        self.seconds = 0.0
        if begin is not None:
            with suppress(RedisAwayError):
                self._write = self._timed(begin)

    @property
    def alive(self) -> bool:
        """Whether `finish` may follow."""
        return self._write is not None

    def users(self, histories: Mapping[UserKey, bytes], lists: Mapping[UserKey, bytes]) -> None:
        """Send what is kept of these users."""
        write = self._write
        if write is None or not histories:
            return
        try:
            self._timed(lambda: write.users(histories, lists))
        except RedisAwayError:
            self.close()
        else:
            self.sent.update(histories)

    def finish(
        self,
        histories: Mapping[UserKey, bytes],
        lists: Mapping[UserKey, bytes],
        rest: Mapping[str, Any],
    ) -> Refused:
        """Send the users that are left, and `rest` as `BatchWrite.finish` takes it.

        Raises:
            RedisAwayError: Redis did not take all of it.
        """
        write = self._write
        assert write is not None

        def finished() -> Refused:
            write.users(histories, lists)
            return write.finish(**rest)

        try:
            return self._timed(finished)
        finally:
            self.close()

    def close(self) -> None:
        """Give it up, unless it is finished."""
        if self._write is not None:
            self._write.close()
            self._write = None

    def _timed(self, operation: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return self._attempt("write_batch", operation)
        finally:
            self.seconds += time.perf_counter() - began
