"""The shell around Redis: recommendations, histories, popularity and the texts of cold items, one
round trip a batch.

Keys (docs/design.md): `rec:{<user>}:<surface>`, `hist:{<user>}:<surface>`,
`pop:{<surface>}:<topic>:<partition>`, `cold:{<surface>}`. User ids are percent-encoded, so that
none can reach another's key; the braces keep one user's keys in one Redis Cluster slot. No command
touches more than one key.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from worker.errors import CacheError
from worker.events import Surface
from worker.popularity import PopularityTable
from worker.ranking import Recommendations
from worker.settings import Settings

#: What a lost or failing Redis raises: redis-py's own errors, or the socket's.
REDIS_FAILURES = (RedisError, OSError, TimeoutError)

_ENCODE = msgspec.json.Encoder().encode
_DECODE_RECOMMENDATIONS = msgspec.json.Decoder(Recommendations).decode
_DECODE_COLD_ITEM = msgspec.json.Decoder(tuple[str, str]).decode
#: Field of a popularity hash with the offset counted so far; items have the prefix `i:`.
_OFFSET_FIELD = b"offset"


@dataclass(frozen=True, slots=True)
class UserKey:
    """One user on one surface."""

    user_id: str
    surface: Surface


@dataclass(frozen=True, slots=True)
class PartitionKey:
    """One surface's share of one partition."""

    surface: Surface
    topic: str
    partition: int


def _escaped(part: str) -> str:
    return quote(part, safe="", errors="surrogatepass")


def recommendation_key(key: UserKey) -> str:
    """Redis key of a user's recommendations."""
    return f"rec:{{{_escaped(key.user_id)}}}:{key.surface.value}"


def history_key(key: UserKey) -> str:
    """Redis key of a user's history."""
    return f"hist:{{{_escaped(key.user_id)}}}:{key.surface.value}"


def popularity_key(key: PartitionKey) -> str:
    """Redis key of a partition's popularity table."""
    return f"pop:{{{key.surface.value}}}:{_escaped(key.topic)}:{key.partition}"


def cold_items_key(surface: Surface) -> str:
    """Redis key of the texts of a surface's cold items."""
    return f"cold:{{{surface.value}}}"


class Cache:
    """Redis, as the worker uses it. Methods raise one of `REDIS_FAILURES`; callers retry.

    Args:
        url: `redis://`, `rediss://` or `unix://` URL.
        timeout_ms: longest that one round trip may take.
        recommendations_ttl_s: expiry of recommendations; 10 % jitter keeps keys written together
            from expiring together.
        history_ttl_s: expiry of histories after the user's last event.
        cold_items_ttl_s: expiry of a cold item after it was first seen.
        cold_items_max: cold items kept per surface, the newest.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_ms: int,
        recommendations_ttl_s: int,
        history_ttl_s: int,
        cold_items_ttl_s: int = 0,
        cold_items_max: int = 0,
    ) -> None:
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=timeout_ms / 1000.0,
                socket_connect_timeout=timeout_ms / 1000.0,
                health_check_interval=30,
            )
        except ValueError as error:
            raise CacheError(f"STREAMREC_REDIS is not a Redis URL: {error}") from None
        self._recommendations_ttl_s = recommendations_ttl_s
        self._history_ttl_s = history_ttl_s
        self._cold_items_ttl_s = cold_items_ttl_s
        self._cold_items_max = cold_items_max

    @classmethod
    def from_settings(cls, settings: Settings) -> Cache:
        """The Redis that `settings` name; connects at first use."""
        return cls(
            settings.redis.get_secret_value(),
            timeout_ms=settings.redis_timeout_ms,
            recommendations_ttl_s=settings.recommendations_ttl_s,
            history_ttl_s=settings.history_ttl_s,
            cold_items_ttl_s=settings.cold_items_ttl_s,
            cold_items_max=settings.cold_items_max,
        )

    async def ping(self) -> None:
        """Raise unless Redis answers and takes commands."""
        await cast(Any, self._redis.ping())

    async def read_histories(self, keys: Sequence[UserKey]) -> list[bytes | None]:
        """Stored histories, in the order of `keys`; None where there is none."""
        if not keys:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for key in keys:
            pipe.get(history_key(key))
        return cast(list[bytes | None], await pipe.execute())

    async def write_batch(
        self,
        *,
        histories: Mapping[UserKey, bytes],
        recommendations: Mapping[UserKey, Recommendations],
        popularity: Mapping[PartitionKey, PopularityTable],
        cold_items: Mapping[Surface, Mapping[str, str]] | None = None,
    ) -> None:
        """Write all effects of a batch in one round trip; repeating it changes nothing."""
        pipe = self._redis.pipeline(transaction=False)
        for key, data in histories.items():
            pipe.set(history_key(key), data, ex=self._history_ttl_s)
        for key, recommendation in recommendations.items():
            jitter = random.uniform(0.9, 1.1)
            pipe.set(
                recommendation_key(key),
                _ENCODE(recommendation),
                px=max(1, int(self._recommendations_ttl_s * 1000 * jitter)),
            )
        for place, table in popularity.items():
            name = popularity_key(place)
            fields: dict[bytes, str] = {
                _OFFSET_FIELD: f"{table.offset}:{table.record_time_ms}",
                **{
                    b"i:" + item.encode("utf-8", "surrogatepass"): repr(table.weights[item])
                    for item in table.changed
                },
            }
            pipe.hset(name, mapping=cast(Any, fields))
            if table.removed:
                pipe.hdel(name, *(b"i:" + item.encode("utf-8") for item in table.removed))
            pipe.expire(name, self._history_ttl_s)
        for surface, texts in (cold_items or {}).items():
            # Sorted by when an item was first seen: a reader asks for what is new.
            name, now_s = cold_items_key(surface), time.time()
            members = {_ENCODE(pair): now_s for pair in texts.items()}
            pipe.zadd(name, cast(Any, members), nx=True)
            pipe.zremrangebyscore(name, "-inf", now_s - self._cold_items_ttl_s)
            pipe.zremrangebyrank(name, 0, -self._cold_items_max - 1)
            pipe.expire(name, self._cold_items_ttl_s)
        if len(pipe):
            await pipe.execute()

    async def read_popularity(self, key: PartitionKey, into: PopularityTable) -> None:
        """Fill an empty table with what the partition's last owner counted."""
        stored = cast(dict[bytes, bytes], await cast(Any, self._redis.hgetall(popularity_key(key))))
        into.weights = {
            field[2:].decode("utf-8", "surrogatepass"): float(value)
            for field, value in stored.items()
            if field.startswith(b"i:")
        }
        offset, _, record_time_ms = stored.get(_OFFSET_FIELD, b"-1:-1").partition(b":")
        into.offset, into.record_time_ms = int(offset), int(record_time_ms)

    async def read_cold_items(
        self, surface: Surface, since_s: float
    ) -> list[tuple[str, str, float]]:
        """Id, text and Unix time of the cold items that any worker saw first after `since_s`."""
        since_s = max(since_s, time.time() - self._cold_items_ttl_s)
        found = cast(
            list[tuple[bytes, float]],
            await self._redis.zrangebyscore(
                cold_items_key(surface), since_s, "+inf", withscores=True
            ),
        )
        read = []
        for member, seen_s in found:
            # Something else's member must not stop the worker.
            with suppress(msgspec.MsgspecError):
                read.append((*_DECODE_COLD_ITEM(member), seen_s))
        return read

    async def read_recommendations(self, key: UserKey) -> Recommendations | None:
        """What is served to this user now."""
        data = await cast(Any, self._redis.get(recommendation_key(key)))
        return None if data is None else _DECODE_RECOMMENDATIONS(data)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()
