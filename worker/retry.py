"""Waiting for a dependency to come back: exponential backoff with jitter, without a bound."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


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
    wait_s = FIRST_WAIT_S
    attempt = 0
    while True:
        try:
            result = await operation()
        except failures as error:
            attempt += 1
            on_failure()
            log.warning(
                "retry operation=%s attempt=%d wait_s=%.1f error=%s: %s",
                name, attempt, wait_s, type(error).__name__, error,
            )  # fmt: skip
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, LONGEST_WAIT_S)
        else:
            if attempt:
                log.info("recovered operation=%s attempts=%d", name, attempt)
            return result
