"""Read what is cached, as an application would."""

from __future__ import annotations

from typing import Any

import msgspec

from worker.cache import REDIS_FAILURES, Cache, UserKey
from worker.errors import CacheError, SettingsError
from worker.events import Surface
from worker.settings import Settings


async def cached_recommendations(
    settings: Settings, user_id: str, surface: str
) -> dict[str, Any] | None:
    """What is cached for a user; None where nothing is.

    Raises:
        SettingsError: there is no such surface.
        CacheError: Redis does not answer.
    """
    if surface not in {known.value for known in Surface}:
        known = ", ".join(known.value for known in Surface)
        raise SettingsError(f"unknown surface {surface!r}; known: {known}")
    cache = Cache(
        settings.redis.get_secret_value(),
        timeout_ms=settings.redis_timeout_ms,
        recommendations_ttl_s=1,
        history_ttl_s=1,
    )
    try:
        found = await cache.read_recommendations(UserKey(user_id, Surface(surface)))
    except REDIS_FAILURES as error:
        raise CacheError(
            f"Redis does not answer ({error}): start it, or set STREAMREC_REDIS to where it is"
        ) from None
    finally:
        await cache.close()
    return None if found is None else dict(msgspec.to_builtins(found))
