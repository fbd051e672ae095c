"""Releases pushed through a compacted Kafka topic: the key is the model's name, the value what
`release.json` holds. Every worker reads all of it, without a group.

A push is quicker than a look at the registry, and no more: whichever is newer counts
(`releases.newer`), so a lost, late or repeated push does no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError

from worker.errors import BrokerError, BundleError
from worker.kafka_security import kafka_client
from worker.manifest import is_safe
from worker.outbox import Outgoing
from worker.refusals import kafka_refusal
from worker.releases import Release, decode_release, encode_release, newer
from worker.settings import Settings

log = logging.getLogger(__name__)

#: Seconds until a lost broker is asked again.
AGAIN_S = 2.0


def release_record(topic: str, name: str, release: Release) -> Outgoing:
    """A release as a record."""
    return Outgoing(topic, name.encode(), encode_release(release), [])


async def read_releases(settings: Settings, note: Callable[[str, Release], None]) -> None:
    """Hand each release that is in the topic now to `note`; at start, before models are loaded:
    what was rolled back must not serve until the topic happens to be read.

    Raises:
        KafkaError: Kafka does not answer, or does not know the topic yet.
    """
    consumer = _consumer(settings)
    try:
        await consumer.start()
        places = list(consumer.assignment())
        if not places:
            raise UnknownTopicOrPartitionError(settings.releases_topic)  # just made, not known yet
        ends = await consumer.end_offsets(places)
        left = {place for place in places if ends[place] > 0}
        while left:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    _take(record.key, record.value, note)
            # By position: the last offsets may be gone, compacted away.
            left = {place for place in left if await consumer.position(place) < ends[place]}
    finally:
        await consumer.stop()


async def follow_releases(settings: Settings, note: Callable[[str, Release], None]) -> None:
    """Hand each release in the topic to `note`, from the first on; until cancelled."""
    while True:
        consumer = _consumer(settings)
        try:
            await consumer.start()
            async for record in consumer:
                _take(record.key, record.value, note)
        except (KafkaError, OSError) as error:
            log.warning(
                "releases_unread topic=%s error=%r; they are read again",
                settings.releases_topic, error,
            )  # fmt: skip
            await asyncio.sleep(AGAIN_S)
        finally:
            await consumer.stop()


def _consumer(settings: Settings) -> AIOKafkaConsumer:
    """Reads all of the topic from its beginning; without a group it is assigned every partition."""
    return AIOKafkaConsumer(
        settings.releases_topic,
        **kafka_client(settings),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        client_id="streamrec-releases",
    )


def _take(key: bytes | None, value: bytes | None, note: Callable[[str, Release], None]) -> None:
    if not key or not value:
        return
    name = key.decode("utf-8", "replace")
    if not is_safe(name):
        log.error("release_damaged; its key is no model's name and has %d bytes", len(key))
        return
    try:
        release = decode_release(value, f"the release of {name}")
    except BundleError as error:
        # Anybody may write to a topic; the registry still says what serves.
        log.error("release_damaged model=%s error=%s", name, error)
        return
    note(name, release)


async def newest_release(settings: Settings, name: str) -> Release | None:
    """The newest release of model `name` in the topic; for the command line.

    Raises:
        BrokerError: Kafka does not answer, or refuses.
    """
    found: list[Release] = []

    def note(model: str, release: Release) -> None:
        if model == name:
            found.append(release)

    try:
        await read_releases(settings, note)
    except UnknownTopicOrPartitionError:
        return None  # no worker has run yet
    except (KafkaError, OSError) as error:
        reason = await kafka_refusal(settings, error)
        raise BrokerError(
            f"Kafka at {settings.kafka} does not say what was pushed to {settings.releases_topic}"
            f" ({reason or error}), and nothing was changed: correct that or --kafka, or leave it"
            " out to change the registry alone"
        ) from None
    newest: Release | None = None
    for release in found:
        newest = newer(newest, release)
    return newest


async def push_release(settings: Settings, name: str, release: Release) -> None:
    """Write a release to the topic; for the command line.

    Raises:
        BrokerError: Kafka does not take it.
    """
    record = release_record(settings.releases_topic, name, release)
    producer = AIOKafkaProducer(**kafka_client(settings), acks="all", request_timeout_ms=10_000)
    try:
        await producer.start()
        await producer.send_and_wait(record.topic, record.value, record.key)
    except (KafkaError, OSError) as error:
        reason = await kafka_refusal(settings, error)
        raise BrokerError(
            f"the release is in the registry, and was not pushed to {record.topic} at"
            f" {settings.kafka} ({reason or error}): workers find it at their next look at the"
            " registry"
        ) from None
    finally:
        await producer.stop()
