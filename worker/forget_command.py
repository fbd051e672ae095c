"""`streamrec forget`: ask the workers to erase a user, and look whether they have."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from aiokafka.errors import KafkaError

from worker.cache import REDIS_FAILURES, Cache
from worker.errors import BrokerError, CacheError, NotForgottenYetError, SettingsError
from worker.events import MAX_ID_LENGTH
from worker.forget import keys_of
from worker.history import History
from worker.replay import event_producer
from worker.settings import Settings

#: Seconds between two looks at Redis.
LOOK_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tombstone lies in the log."""

    topic: str
    partition: int
    offset: int


async def send_tombstone(settings: Settings, user_id: str) -> Place:
    """Write a tombstone for `user_id` to the events topic; returns once all in-sync replicas have
    it.

    Raises:
        SettingsError: `user_id` is no user id.
        BrokerError: Kafka does not take it.
    """
    if not 0 < len(user_id) <= MAX_ID_LENGTH:
        raise SettingsError(
            f"a user id has 1 to {MAX_ID_LENGTH} characters, this one {len(user_id)}"
        )
    # As the records of the user's events, so that it goes to their partition, after them.
    key = user_id.encode("utf-8", "surrogatepass")
    async with event_producer(settings) as producer:
        try:
            sent = await producer.send_and_wait(settings.events_topic, value=None, key=key)
        except KafkaError as error:
            raise BrokerError(
                f"the tombstone was not written to {settings.events_topic} at {settings.kafka}"
                f" ({error!r}): nothing is erased; try again"
            ) from None
    return Place(sent.topic, sent.partition, sent.offset)


def wait_until_forgotten(
    settings: Settings, user_id: str, place: Place, *, timeout_s: float
) -> None:
    """Return once Redis holds nothing of `user_id` from before the tombstone at `place`.

    Raises:
        NotForgottenYetError: not within `timeout_s`.
        CacheError: Redis does not answer.
    """
    cache = Cache.from_settings(settings)
    deadline = time.monotonic() + timeout_s
    try:
        while not is_forgotten(cache.read_users(keys_of(user_id)), place):
            if time.monotonic() >= deadline:
                raise NotForgottenYetError(
                    f"the tombstone is at {place.topic}, partition {place.partition}, offset"
                    f" {place.offset}, and was not carried out within {timeout_s:.0f} s: it is as"
                    " soon as a worker reads it; is one running, and how large is its lag?"
                )
            time.sleep(LOOK_AGAIN_S)
    except REDIS_FAILURES as error:
        raise CacheError(
            f"the tombstone is written, but Redis does not answer ({error}): start it, or set"
            " STREAMREC_REDIS to where it is"
        ) from None
    finally:
        cache.close()


def is_forgotten(stored: Iterable[tuple[bytes | None, bytes | None]], place: Place) -> bool:
    """Whether a tombstone at `place` was carried out, from the stored history and list of the user
    on each surface."""
    for data, recommendations in stored:
        if data is None:
            return False
        try:
            history = History.from_bytes(data, sys.maxsize)
        except ValueError:
            return False  # damaged; the worker throws it away
        last = history.last_applied(place.topic, place.partition)
        if last is None or last[0] < place.offset:
            return False
        if last[0] == place.offset and (history.items or recommendations is not None):
            return False
    return True


def forget(settings: Settings, user_id: str, *, wait_s: float | None) -> Place:
    """Ask for `user_id` to be erased; with `wait_s`, wait so many seconds until it is.

    Raises:
        SettingsError: `user_id` is no user id.
        BrokerError: Kafka does not take the tombstone.
        NotForgottenYetError: it was not carried out within `wait_s`.
        CacheError: Redis does not answer while that is looked at.
    """
    place = asyncio.run(send_tombstone(settings, user_id))
    if wait_s is not None:
        wait_until_forgotten(settings, user_id, place, timeout_s=wait_s)
    return place
