"""Read what is cached, as an application would."""

from __future__ import annotations

from typing import Any

import msgspec

from worker.cache import REDIS_FAILURES, Cache, UserKey
from worker.errors import CacheError, SettingsError
from worker.events import parse_surface
from worker.settings import Settings


async def cached_recommendations(
    settings: Settings, user_id: str, surface: str
) -> dict[str, Any] | None:
    """What is cached for a user; None where nothing is.

    Raises:
        SettingsError: there is no such surface.
        CacheError: Redis does not answer.
    """
    try:
        key = UserKey(user_id, parse_surface(surface))
    except ValueError as error:
        raise SettingsError(str(error)) from None
    cache = Cache.from_settings(settings)
    try:
        found = await cache.read_recommendations(key)
    except REDIS_FAILURES as error:
        raise CacheError(
            f"Redis does not answer ({error}): start it, or set STREAMREC_REDIS to where it is"
        ) from None
    finally:
        await cache.close()
    return None if found is None else dict(msgspec.to_builtins(found))
