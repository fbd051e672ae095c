"""Gathers what a cell left behind in Kafka and Redis."""

from __future__ import annotations

import json
from typing import Any

from tests.faults.checker import DeadLetter, Evidence, List, StoredUser
from tests.faults.load import NUMBER, Load
from tests.faults.model import LogRecord, Place, User
from tests.integration.support import PARTITIONS, World
from worker.cache import Cache, PartitionKey, UserKey
from worker.events import Surface
from worker.history import History
from worker.popularity import PopularityTable
from worker.settings import Settings


def gather(world: World, load: Load) -> Evidence:
    """All evidence of a cell whose workers have ended."""
    settings = Settings(
        **{  # type: ignore[arg-type]
            name.removeprefix("STREAMREC_").lower(): value
            for name, value in world.environment.items()
        }
    )
    log = [_log_record(record) for record in world.read(world.events)]
    ends = dict.fromkeys(range(PARTITIONS), 0)
    for record in log:
        place = record.place
        ends[place.partition] = max(ends[place.partition], place.offset + 1)
    output = world.read(world.recommendations)
    cache = Cache.from_settings(settings)
    try:
        sent = [*load.accepted.values(), *load.doubtful.values()]
        users = list({user: None for one in sent for user in one.users})
        stored, lists = _of_users(cache, users, settings.history_length)
        popularity = _popularity(cache, world.events)
    finally:
        cache.close()
    return Evidence(
        accepted=dict(load.accepted),
        doubtful=dict(load.doubtful),
        log=log,
        stored=stored,
        lists=lists,
        published=[_list(json.loads(one.value)) for one in output if one.value is not None],
        erasures=[_erasure(one) for one in output if one.value is None],
        dead_letters=[_dead_letter(one) for one in world.read(world.dead_letters)],
        committed=world.committed(),
        ends=ends,
        popularity=popularity,
        history_length=settings.history_length,
        half_life_ms=settings.popularity_half_life_s * 1000.0,
    )


def _log_record(record: Any) -> LogRecord:
    number = int(dict(record.headers)[NUMBER])
    return LogRecord(Place(record.partition, record.offset), number, record.key, record.value)


def _of_users(
    cache: Cache, users: list[User], length: int
) -> tuple[dict[User, StoredUser], dict[User, List]]:
    stored: dict[User, StoredUser] = {}
    lists: dict[User, List] = {}
    keys = [UserKey(user.user_id, Surface(user.surface)) for user in users]
    for user, (history, made) in zip(users, cache.read_users(keys), strict=True):
        if history is not None:
            found = History.from_bytes(history, length)
            stored[user] = StoredUser(
                list(zip(found.items, found.timestamps, strict=True)),
                found.hidden,
                {one[1]: one[2] for one in found.applied},
            )
        if made is not None:
            lists[user] = _list(json.loads(made))
    return stored, lists


def _popularity(cache: Cache, topic: str) -> dict[tuple[str, int], dict[str, float]]:
    found = {}
    for surface in Surface:
        for partition in range(PARTITIONS):
            table = PopularityTable(half_life_ms=1, max_items=1)
            cache.read_popularity(PartitionKey(surface, topic, partition), table)
            found[surface.value, partition] = table.weights
    return found


def _list(body: dict[str, Any]) -> List:
    origin = body["origin"]
    return List(
        User(body["user_id"], body["surface"]),
        Place(origin["partition"], origin["offset"]),
        body["items"],
    )


def _erasure(record: Any) -> tuple[str, Place]:
    return record.key.decode(), _origin(_headers(record))


def _dead_letter(record: Any) -> DeadLetter:
    headers = _headers(record)
    return DeadLetter(_origin(headers), headers["reason"], record.key, record.value)


def _headers(record: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in record.headers}


def _origin(headers: dict[str, str]) -> Place:
    return Place(int(headers["origin_partition"]), int(headers["origin_offset"]))
