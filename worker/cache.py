"""The shell around Redis: recommendations, histories, popularity, tallies of trials and the texts
of cold items, one connection a batch.

Keys (docs/design.md): `rec:{<user>}:<surface>`, `hist:{<user>}:<surface>`,
`pop:{<surface>}:<topic>:<partition>`, `trial:{<surface>}:<topic>:<partition>`, `cold:{<surface>}`,
`done:{<topic>}:<partition>`.
User ids are percent-encoded, so that none can reach another's key; the braces keep one user's keys
in one Redis Cluster slot. The one command that touches two keys, a script of `worker/versions.py`,
touches those of one user and surface. Redis 6.2 or later, or Valkey.

Commands are packed once for a whole batch and their replies read over one connection of redis-py's
synchronous client: its pipelines, the asynchronous ones above all, take several times as long to
build and read (docs/benchmarks.md). So methods block, and may be called from any thread.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import chain
from typing import Any, cast
from urllib.parse import quote

import hiredis
import msgspec
from redis import Redis
from redis.exceptions import NoScriptError, RedisError

from worker.errors import CacheError
from worker.events import Surface
from worker.popularity import PopularityTable
from worker.ranking import Recommendations
from worker.redis_security import redis_login
from worker.settings import Settings
from worker.versions import ADVANCE, WRITE, WRITE_TABLE, digest

#: What a lost or failing Redis raises: redis-py's own errors, or the socket's.
REDIS_FAILURES = (RedisError, OSError, TimeoutError)

_ENCODE = msgspec.json.Encoder().encode
_DECODE_RECOMMENDATIONS = msgspec.json.Decoder(Recommendations).decode
_DECODE_COLD_ITEM = msgspec.json.Decoder(tuple[str, str]).decode
#: Field of a popularity hash with the offset counted so far; items have the prefix `i:`.
_OFFSET_FIELD = b"offset"
_YEAR_10000_MS = 253_402_300_800_000
_WRITE_DIGEST, _WRITE_TABLE_DIGEST = digest(WRITE), digest(WRITE_TABLE)
_ADVANCE_DIGEST = digest(ADVANCE)
#: Ids that need no escape.
_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+").fullmatch

Command = tuple[str | bytes | int | float, ...]
_LOAD_SCRIPTS: Sequence[Command] = [
    ("SCRIPT", "LOAD", one) for one in (WRITE, WRITE_TABLE, ADVANCE)
]
#: redis-py does the same after a look at each argument, which takes four times as long.
_PACK = cast(Callable[[Command], bytes], hiredis.pack_command)


class UserKey(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """One user on one surface."""

    user_id: str
    surface: Surface


class PartitionKey(msgspec.Struct, frozen=True, gc=False):
    """One surface's share of one partition."""

    surface: Surface
    topic: str
    partition: int


#: Topic and number.
Partition = tuple[str, int]


class Refused(msgspec.Struct, frozen=True):
    """What was not written, since Redis holds something newer, by another worker."""

    users: list[UserKey] = []
    popularity: list[PartitionKey] = []
    tallies: list[PartitionKey] = []
    #: Stored positions that are below the expected ones; then nothing at all was written.
    lost: dict[Partition, int] = {}


class Position(msgspec.Struct, frozen=True):
    """How far a partition has been taken, as the next offset."""

    #: What Redis must hold at least, all effects before which were written.
    expected: int
    #: What it shall hold.
    next: int


def _escaped(part: str) -> str:
    return part if _PLAIN(part) else quote(part, safe="", errors="surrogatepass")


def recommendation_key(key: UserKey) -> str:
    """Redis key of a user's recommendations."""
    return f"rec:{{{_escaped(key.user_id)}}}:{key.surface}"


def history_key(key: UserKey) -> str:
    """Redis key of a user's history."""
    return f"hist:{{{_escaped(key.user_id)}}}:{key.surface}"


def popularity_key(key: PartitionKey) -> str:
    """Redis key of a partition's popularity table."""
    return f"pop:{{{key.surface.value}}}:{_escaped(key.topic)}:{key.partition}"


def tally_key(key: PartitionKey) -> str:
    """Redis key of what a partition's users did with what they were served."""
    return f"trial:{{{key.surface.value}}}:{_escaped(key.topic)}:{key.partition}"


def position_key(partition: Partition) -> str:
    """Redis key of the offset before which all effects of a partition are in Redis."""
    topic, number = partition
    return f"done:{{{_escaped(topic)}}}:{number}"


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
        forget_ttl_s: expiry of the empty history of a user who was erased.
        cold_items_ttl_s: expiry of a cold item after it was first seen.
        cold_items_max: cold items kept per surface, the newest.
        login: TLS and the user, as `redis_login` gives them.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_ms: int,
        recommendations_ttl_s: int,
        history_ttl_s: int,
        forget_ttl_s: int = 86400,
        cold_items_ttl_s: int = 0,
        cold_items_max: int = 0,
        login: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=timeout_ms / 1000.0,
                socket_connect_timeout=timeout_ms / 1000.0,
                health_check_interval=30,
                **(login or {}),
            )
        except ValueError as error:
            raise CacheError(f"STREAMREC_REDIS is not a Redis URL: {error}") from None
        self._recommendations_ttl_s = recommendations_ttl_s
        self._history_ttl_s = history_ttl_s
        self._forget_ttl_s = forget_ttl_s
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
            forget_ttl_s=settings.forget_ttl_s,
            cold_items_ttl_s=settings.cold_items_ttl_s,
            cold_items_max=settings.cold_items_max,
            login=redis_login(settings),
        )

    def ping(self) -> None:
        """Raise unless Redis answers and takes commands."""
        self._run([("PING",)])

    def check(self) -> None:
        """Raise unless Redis answers, and lets the worker read and bring its scripts."""
        nobody = history_key(UserKey("", Surface.POSTS))
        self._run([("PING",), ("GET", nobody), *_LOAD_SCRIPTS])

    def read_users(self, keys: Sequence[UserKey]) -> list[tuple[bytes | None, bytes | None]]:
        """Stored history and recommendations of each of `keys`, in order; None where there is no
        such key."""
        commands: list[Command] = []
        for key in keys:
            commands += (("GET", history_key(key)), ("GET", recommendation_key(key)))
        found = self._run(commands)
        return list(zip(found[::2], found[1::2], strict=True))

    def delete_histories(self, keys: Sequence[UserKey]) -> None:
        """Delete stored histories, whatever they hold."""
        self._run([("DEL", history_key(key)) for key in keys])

    def write_batch(
        self,
        *,
        histories: Mapping[UserKey, bytes],
        recommendations: Mapping[UserKey, bytes],
        popularity: Mapping[PartitionKey, PopularityTable],
        forgotten: Mapping[UserKey, bytes] | None = None,
        cold_items: Mapping[Surface, Mapping[str, str]] | None = None,
        tallies: Mapping[PartitionKey, bytes] | None = None,
        positions: Mapping[Partition, Position] | None = None,
    ) -> Refused:
        """Write all effects of a batch; repeating it changes nothing.

        Nothing is written where Redis has lost something, that is, where a stored position is
        below the one that is expected.

        Args:
            histories: with their marks (`worker/versions.py`).
            recommendations: as `encode` gives them, for some of the keys of `histories`.
            forgotten: empty histories of users who were erased, with marks that refuse late writes;
                their recommendations go.
            tallies: of trials, with marks; written after the histories that they count.
            positions: how far partitions have been taken; written last.

        Returns:
            What was not written, since Redis holds something newer.
        """
        with closing(self.begin(positions or {})) as write:
            write.users(histories, recommendations)
            return write.finish(
                popularity=popularity, forgotten=forgotten, cold_items=cold_items, tallies=tallies
            )

    def begin(self, positions: Mapping[Partition, Position]) -> BatchWrite:
        """Begin to write a batch, of which not all effects are known yet; it must be closed."""
        return BatchWrite(self, positions)

    def _user_commands(
        self, histories: Mapping[UserKey, bytes], recommendations: Mapping[UserKey, bytes]
    ) -> Iterator[Command]:
        ttl_s, ttl_ms = self._history_ttl_s, self._recommendations_ttl_s * 1000
        for key, data in histories.items():
            made = recommendations.get(key)
            listed: Command = (
                () if made is None else (made, max(1, int(ttl_ms * random.uniform(0.9, 1.1))))
            )
            yield _write_user(key, data, ttl_s, listed)

    def _forgotten_commands(self, forgotten: Mapping[UserKey, bytes]) -> Iterator[Command]:
        for key, data in forgotten.items():
            yield _write_user(key, data, self._forget_ttl_s, (b"", 0))

    def _tally_commands(self, tallies: Mapping[PartitionKey, bytes]) -> Iterator[Command]:
        for place, data in tallies.items():
            yield "EVALSHA", _WRITE_DIGEST, 1, tally_key(place), data, self._history_ttl_s

    def _cold_commands(self, cold_items: Mapping[Surface, Mapping[str, str]]) -> list[Command]:
        commands: list[Command] = []
        for surface, texts in cold_items.items():
            # Sorted by when an item was first seen: a reader asks for what is new.
            name, now_s = cold_items_key(surface), time.time()
            members = [part for pair in texts.items() for part in (now_s, _ENCODE(pair))]
            commands += [
                ("ZADD", name, "NX", *members),
                ("ZREMRANGEBYSCORE", name, "-inf", now_s - self._cold_items_ttl_s),
                ("ZREMRANGEBYRANK", name, 0, -self._cold_items_max - 1),
                ("EXPIRE", name, self._cold_items_ttl_s),
            ]
        return commands

    def _popularity_command(self, name: str, table: PopularityTable) -> Command:
        weights = [
            part
            for item in table.changed
            for part in (_item_field(item), repr(table.weights[item]))
        ]
        return (
            "EVALSHA",
            _WRITE_TABLE_DIGEST,
            1,
            name,
            table.offset,
            table.record_time_ms,
            self._history_ttl_s,
            len(weights),
            *weights,
            *map(_item_field, table.removed),
        )

    def read_popularity(self, key: PartitionKey, into: PopularityTable) -> None:
        """Fill an empty table with what the partition's last owner counted."""
        (flat,) = self._run([("HGETALL", popularity_key(key))])
        stored = _pairs(flat)
        into.weights = {
            field[2:].decode("utf-8", "surrogatepass"): float(value)
            for field, value in stored.items()
            if field.startswith(b"i:")
        }
        offset, _, record_time_ms = stored.get(_OFFSET_FIELD, b"-1:-1").partition(b":")
        into.offset, into.record_time_ms = int(offset), int(record_time_ms)

    def read_position(self, partition: Partition) -> int | None:
        """How far a partition has been taken; None where that is not known."""
        (found,) = self._run([("GET", position_key(partition))])
        return None if found is None else int(found)

    def read_tallies(self, keys: Sequence[PartitionKey]) -> list[bytes | None]:
        """What the users of partitions did with what they were served; None where none is known."""
        return self._run([("GET", tally_key(key)) for key in keys])

    def read_cold_items(self, surface: Surface, since_s: float) -> list[tuple[str, str, float]]:
        """Id, text and Unix time of the cold items that any worker saw first after `since_s`."""
        since_s = max(since_s, time.time() - self._cold_items_ttl_s)
        (found,) = self._run(
            [("ZRANGEBYSCORE", cold_items_key(surface), since_s, "+inf", "WITHSCORES")]
        )
        read = []
        for member, seen_s in _scored(found):
            # Something else's member must not stop the worker.
            with suppress(msgspec.MsgspecError):
                read.append((*_DECODE_COLD_ITEM(member), seen_s))
        return read

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Replies to `commands`, sent together.

        Raises:
            RedisError: the first that Redis refused, or that it does not answer.
        """
        if not commands:
            return []
        with self._connection() as connection:
            return _exchange(connection, commands)

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        pool = self._redis.connection_pool
        connection: Any = pool.get_connection()
        try:
            yield connection
        except BaseException:
            # Replies may be under way still: they must not be taken for those of the next batch.
            connection.disconnect()
            raise
        finally:
            pool.release(connection)


class BatchWrite:
    """The effects of one batch on their way to Redis, over one connection.

    What is known is sent at once, so that Redis works on it while the rest is made; replies are
    read at the end. The stored positions are asked for first, and where one is below what is
    expected nothing is sent. One connection, since it does not outlive a Redis that comes back
    with less.
    """

    def __init__(self, cache: Cache, positions: Mapping[Partition, Position]) -> None:
        self._cache = cache
        self._positions = positions
        self._users: list[UserKey] = []
        self._commands: list[Command] = []
        self._lost: dict[Partition, int] | None
        self._connection: Any
        #: Whether nothing was sent over the connection yet.
        self._fresh: bool
        self._connect()

    def users(
        self, histories: Mapping[UserKey, bytes], recommendations: Mapping[UserKey, bytes]
    ) -> None:
        """Send what is kept of some users; as in `Cache.write_batch`. Each user once."""
        self._users += histories
        self._send(list(self._cache._user_commands(histories, recommendations)))

    def finish(
        self,
        *,
        popularity: Mapping[PartitionKey, PopularityTable],
        forgotten: Mapping[UserKey, bytes] | None = None,
        cold_items: Mapping[Surface, Mapping[str, str]] | None = None,
        tallies: Mapping[PartitionKey, bytes] | None = None,
    ) -> Refused:
        """Send the rest, the positions last, and wait until all is written.

        Returns:
            What was not written, since Redis holds something newer.
        """
        cache, emptied, tallied = self._cache, forgotten or {}, tallies or {}
        rest = [
            *cache._forgotten_commands(emptied),
            *(cache._popularity_command(popularity_key(at), it) for at, it in popularity.items()),
            *cache._tally_commands(tallied),
            *cache._cold_commands(cold_items or {}),
        ]
        for partition, position in self._positions.items():
            if position.next > position.expected:
                name = position_key(partition)
                rest.append(("EVALSHA", _ADVANCE_DIGEST, 1, name, position.next))
        self._send(rest)
        try:
            replies = self._replies()
        except NoScriptError:
            # A Redis that was started anew. What was written meanwhile is written once more.
            self.close()
            cache._run(_LOAD_SCRIPTS)
            self._connect()
            commands, self._commands = self._commands, []
            self._send(commands)
            replies = self._replies()
        if self._lost:
            return Refused(lost=self._lost)
        written = iter(replies)
        return Refused(
            users=[key for key in chain(self._users, emptied) if not next(written)],
            popularity=[place for place in popularity if not next(written)],
            tallies=[place for place in tallied if not next(written)],
        )

    def close(self) -> None:
        """Let go of the connection; what is under way is not waited for."""
        if self._connection is not None:
            # Replies may be under way still: they must not be taken for those of the next batch.
            self._connection.disconnect()
            self._release()

    def _connect(self) -> None:
        self._connection = self._cache._redis.connection_pool.get_connection()
        self._fresh, self._lost = True, None
        if self._positions:
            self._pack_and_send([("GET", position_key(one)) for one in self._positions])

    def _check(self) -> None:
        """Compare the stored positions with those that are expected, once."""
        if self._lost is None:
            stored = [int(self._connection.read_response() or 0) for _ in self._positions]
            self._lost = {
                partition: found
                for (partition, position), found in zip(
                    self._positions.items(), stored, strict=True
                )
                if found < position.expected
            }

    def _send(self, commands: list[Command]) -> None:
        self._check()
        if commands and not self._lost:
            self._commands += commands
            self._pack_and_send(commands)

    def _pack_and_send(self, commands: Sequence[Command]) -> None:
        # Before its first use a connection may be looked at; after that there may be replies that
        # nobody has read yet, which a look would take for its own.
        _send(self._connection, commands, check_health=self._fresh)
        self._fresh = False

    def _replies(self) -> list[Any]:
        if self._lost:
            self.close()
            return []
        replies = [self._connection.read_response() for _ in self._commands]
        self._release()
        return replies

    def _release(self) -> None:
        self._cache._redis.connection_pool.release(self._connection)
        self._connection = None


def _send(connection: Any, commands: Sequence[Command], *, check_health: bool = True) -> None:
    connection.send_packed_command([b"".join(map(_PACK, commands))], check_health=check_health)


def _exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:
    if commands:
        _send(connection, commands)
    return [connection.read_response() for _ in commands]


def encode(recommendations: Recommendations) -> bytes:
    """The JSON that is cached and published."""
    return _ENCODE(recommendations)


def decode(data: bytes) -> Recommendations:
    """The recommendations in such JSON.

    Raises:
        CacheError: it is none: something else wrote to the key.
    """
    try:
        found = _DECODE_RECOMMENDATIONS(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CacheError(f"what is cached is no list of recommendations: {error}") from None
    if len(found.items) != len(found.scores) or not 0 <= found.generated_at_ms < _YEAR_10000_MS:
        raise CacheError("what is cached is no list of recommendations: its fields do not fit")
    return found


def _write_user(key: UserKey, history: bytes, ttl_s: int, listed: Command) -> Command:
    names = history_key(key), recommendation_key(key)
    return "EVALSHA", _WRITE_DIGEST, 2, *names, history, ttl_s, *listed


def _item_field(item: str) -> bytes:
    return b"i:" + item.encode("utf-8", "surrogatepass")


def _pairs(reply: Any) -> dict[bytes, bytes]:
    """A hash: RESP 3 gives a map, RESP 2 its fields and values in turn."""
    if isinstance(reply, dict):
        return cast(dict[bytes, bytes], reply)
    return dict(zip(reply[::2], reply[1::2], strict=True))


def _scored(reply: Any) -> list[tuple[bytes, float]]:
    """Members with scores: RESP 3 gives pairs, RESP 2 both in turn."""
    if reply and isinstance(reply[0], list):
        return [(member, float(score)) for member, score in reply]
    return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]
