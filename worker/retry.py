"""Waiting for a dependency to come back: exponential backoff with jitter, without a bound."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from worker.logs import message_of

T = TypeVar("T")
log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


class StoppedError(Exception):
    """The worker stops: what waits for a dependency is given up."""


class _Attempts:
    """Counts and logs what failed, and says how long to wait."""

    def __init__(self, name: str, on_failure: Callable[[], None]) -> None:
        self._name = name
        self._on_failure = on_failure
        self._count = 0
        self._wait_s = FIRST_WAIT_S

    def failed(self, error: BaseException) -> float:
        """Seconds to wait before the next attempt."""
        self._count += 1
        self._on_failure()
        log.warning(
            "retry operation=%s attempt=%d wait_s=%.1f error=%s: %s",
            self._name, self._count, self._wait_s, type(error).__name__, message_of(error),
        )  # fmt: skip
        wait_s = self._wait_s * random.uniform(0.5, 1.0)
        self._wait_s = min(self._wait_s * 2, LONGEST_WAIT_S)
        return wait_s

    def succeeded(self) -> None:
        if self._count:
            log.info("recovered operation=%s attempts=%d", self._name, self._count)


async def until_it_works(
    operation: Callable[[], Awaitable[T]],
    *,
    name: str,
    failures: tuple[type[BaseException], ...],
    on_failure: Callable[[], None] = lambda: None,
) -> T:
    """Run `operation` until it does not raise one of `failures`.

    An accepted event may be late, never lost: so there is no last attempt. Cancellation ends it.
    """
    attempts = _Attempts(name, on_failure)
    while True:
        try:
            result = await operation()
        except failures as error:
            await asyncio.sleep(attempts.failed(error))
        else:
            attempts.succeeded()
            return result


def until_it_works_or_stops(
    operation: Callable[[], T],
    *,
    name: str,
    failures: tuple[type[BaseException], ...],
    stopping: threading.Event,
    on_failure: Callable[[], None] = lambda: None,
) -> T:
    """As `until_it_works`, for a thread.

    Raises:
        StoppedError: `stopping` was set before it worked.
    """
    attempts = _Attempts(name, on_failure)
    while True:
        try:
            result = operation()
        except failures as error:
            if stopping.wait(attempts.failed(error)):
                raise StoppedError(f"{name} was given up at a stop") from None
        else:
            attempts.succeeded()
            return result
