"""Before Faust starts: are Kafka, the topics and Redis there? Waits for them with backoff.

Without this Faust retries a missing broker for ever with a traceback an attempt, and waits in
silence for a topic that nobody has made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code
from aiokafka.structs import TopicPartition

from worker.cache import REDIS_FAILURES, Cache
from worker.errors import BrokerError, CacheError, StreamrecError
from worker.kafka_security import kafka_client
from worker.redis_security import shown_url
from worker.refusals import kafka_refusal, redis_refusal
from worker.release_channel import read_releases
from worker.releases import Release
from worker.security import cleartext
from worker.settings import Settings

log = logging.getLogger(__name__)

#: Longest wait for an answer about the group.
RIGHTS_TIMEOUT_S = 10.0
# aiokafka logs each failed connection itself; the waiting here says it once, with what to do.
_NOISY = ("aiokafka", "aiokafka.conn", "aiokafka.client")


async def prepare(settings: Settings) -> list[tuple[str, Release]]:
    """Wait for Kafka and Redis, at most `startup_timeout_s`; make or find the topics.

    Returns:
        Releases that were pushed, each with its model's name.

    Raises:
        BrokerError: Kafka does not answer, or refuses, or a topic is missing.
        CacheError: Redis does not answer, or refuses.
        SettingsError: a file of certificates is missing or broken.
    """
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for sentence in cleartext(settings):
        log.warning("cleartext_login %s", sentence)
    try:
        await _wait(settings, "Kafka", settings.kafka, lambda: ensure_topics(settings))
        if settings.kafka_security != "plaintext":
            await _wait(settings, "Kafka", settings.kafka, lambda: check_rights(settings))
        await _wait(settings, "Redis", shown_url(settings), lambda: check_redis(settings))
        releases: list[tuple[str, Release]] = []
        if settings.releases_topic:
            await _wait(settings, "Kafka", settings.kafka, lambda: _pushed(settings, releases))
        return releases
    finally:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.NOTSET)


async def ensure_topics(settings: Settings) -> None:
    """Find the topics that are read and written, or make them where `create_topics` is set.

    Raises:
        BrokerError: a topic is missing and may not be made.
        KafkaError: Kafka does not answer.
    """
    admin = AIOKafkaAdminClient(
        **kafka_client(settings), request_timeout_ms=5000, client_id="streamrec-startup"
    )
    try:
        await admin.start()
        wanted = [
            settings.events_topic,
            settings.recommendations_topic,
            settings.dead_letter_topic,
            *filter(None, (settings.releases_topic, settings.decisions_topic)),
        ]
        missing = sorted(set(wanted) - set(await admin.list_topics()))
        if not missing:
            return
        if not settings.create_topics:
            # Kafka does not tell a topic that is not there from one that a login may not see.
            seen = "" if settings.kafka_security == "plaintext" else " that this login may see"
            raise BrokerError(
                f"Kafka at {settings.kafka} has no topic {', '.join(missing)}{seen}: make"
                f" {'it' if len(missing) == 1 else 'them'}, or set STREAMREC_CREATE_TOPICS=true"
                f"{', or grant what docs/security.md lists' if seen else ''}"
            )
        answer = await admin.create_topics([_new_topic(settings, name) for name in missing])
        for name, code, *message in answer.topic_errors:
            error = for_code(code)
            if code and error is not TopicAlreadyExistsError:
                raise BrokerError(f"topic {name} cannot be made: {error.__name__} {message}")
            log.info("topic_created topic=%s", name)
    finally:
        await admin.close()


async def check_rights(settings: Settings) -> None:
    """Ask for the group's offsets and for events, as the worker will: it would wait for an
    assignment for ever, and say nothing, where it may not read the group.

    Raises:
        KafkaError: the login lacks a right, or Kafka does not answer.
    """
    consumer = AIOKafkaConsumer(
        **kafka_client(settings),
        group_id=settings.group,
        enable_auto_commit=False,
        auto_offset_reset="latest",
        client_id="streamrec-startup",
    )
    first = TopicPartition(settings.events_topic, 0)
    try:
        await asyncio.wait_for(consumer.start(), RIGHTS_TIMEOUT_S)
        consumer.assign([first])
        await asyncio.wait_for(consumer.committed(first), RIGHTS_TIMEOUT_S)
        await consumer.getmany(first, timeout_ms=200)
    finally:
        await consumer.stop()


async def _pushed(settings: Settings, releases: list[tuple[str, Release]]) -> None:
    """Read all releases into `releases`: which hold is for `Models.note` to say."""
    await read_releases(settings, lambda name, release: releases.append((name, release)))


def _new_topic(settings: Settings, name: str) -> NewTopic:
    if name == settings.releases_topic:
        # The last release of each model is all that anybody wants to know.
        compacted = {"cleanup.policy": "compact"}
        return NewTopic(name, 1, settings.topic_replication, topic_configs=compacted)
    if name == settings.decisions_topic:
        return NewTopic(name, 1, settings.topic_replication)
    return NewTopic(name, settings.topic_partitions, settings.topic_replication)


async def check_redis(settings: Settings) -> None:
    """Ask whether Redis answers, and lets the worker work.

    Raises:
        RedisError, OSError: it does not.
    """
    cache = Cache.from_settings(settings)
    try:
        await asyncio.to_thread(cache.check)
    finally:
        cache.close()


async def _wait(
    settings: Settings, name: str, address: str, operation: Callable[[], Awaitable[None]]
) -> None:
    deadline = time.monotonic() + settings.startup_timeout_s
    wait_s = 0.5
    while True:
        try:
            return await operation()
        except StreamrecError:
            raise
        except (KafkaError, *REDIS_FAILURES) as error:
            kind = BrokerError if name == "Kafka" else CacheError
            if name == "Kafka":
                refusal = await kafka_refusal(settings, error)
            else:
                refusal = redis_refusal(address, error)
            if refusal is not None:
                # Waiting does not cure it; who restarts the worker tries again.
                raise kind(refusal) from None
            if time.monotonic() + wait_s > deadline:
                raise kind(
                    f"{name} at {address} does not answer ({_short(error)}) after"
                    f" {settings.startup_timeout_s:.0f} s: start it, or set"
                    f" STREAMREC_{name.upper()} to where it is (TLS and logins: docs/security.md)"
                ) from None
            log.warning(
                "waiting_for service=%s address=%s retry_in_s=%.1f error=%s",
                name, address, wait_s, _short(error),
            )  # fmt: skip
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, 5.0)


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
