"""Waiting for a dependency to come back: exponential backoff with jitter, without a bound."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from worker.logs import message_of

T = TypeVar("T")
log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0
#: As `LONGEST_WAIT_S`, where other work goes on meanwhile.
LONGEST_LOOK_S = 1.0


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


class Outage:
    """Whether a dependency is away, and when to ask it again. For one thread."""

    def __init__(self, on_change: Callable[[bool], None] = lambda away: None) -> None:
        self._on_change = on_change
        self._attempts: _Attempts | None = None
        self._again_at = 0.0

    @property
    def away(self) -> bool:
        """Whether the last attempt failed."""
        return self._attempts is not None

    def due_in_s(self) -> float:
        """Seconds until the next attempt; 0 where it may be made now."""
        return max(0.0, self._again_at - time.monotonic()) if self.away else 0.0

    def failed(self, name: str, error: BaseException) -> None:
        """Operation `name` failed."""
        if self._attempts is None:
            self._attempts = _Attempts(name, lambda: None)
            self._on_change(True)
        wait_s = min(self._attempts.failed(error), LONGEST_LOOK_S)
        self._again_at = time.monotonic() + wait_s

    def over(self) -> None:
        """An operation that must work, did."""
        if self._attempts is not None:
            self._attempts.succeeded()
            self._attempts = None
            self._on_change(False)
