"""Events from a range of a Kafka topic, read once; no consumer group, nothing committed."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlsplit

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, OffsetOutOfRangeError
from aiokafka.structs import TopicPartition

from models.events import BadRecords, EventLog, SourceError
from models.sources_records import RecordIntake
from worker.events import Record, Records
from worker.kafka_security import kafka_client
from worker.refusals import kafka_refusal
from worker.settings import Settings, load_settings

SCHEME = "kafka://"
_FORM = "kafka://host:port[,host:port]/topic?from=OFFSET|earliest|TIME&to=OFFSET|latest|TIME"
#: A silent broker is given up after this many seconds.
SILENCE_S = 30.0

#: An offset, a time, or None for as far as there are records.
Bound = int | datetime | None


@dataclass(frozen=True)
class TopicRange:
    """What to read: records from `start` up to and without `end`.

    An offset bounds each partition (as far as that reaches). A time stands for the first record of
    that time or later, as the broker dates records (Tansu by arrival, whatever the producer says).
    """

    bootstrap: str
    topic: str
    start: Bound = None
    end: Bound = None


def parse_range(address: str) -> TopicRange:
    """The range at `kafka://host:port[,host:port]/topic?from=...&to=...`.

    Raises:
        SourceError: the address does not have that form.
    """
    parts = urlsplit(address)
    topic = parts.path.strip("/")
    # A plus would be read as a space, and belongs into times such as 10:00+01:00.
    pairs = parse_qsl(parts.query.replace("+", "%2B"), keep_blank_values=True)
    asked = dict(pairs)
    if not parts.netloc or not topic or "/" in topic or set(asked) - {"from", "to"}:
        raise SourceError(f"{address} is no range of a topic: write {_FORM}")
    return TopicRange(
        parts.netloc,
        topic,
        _bound(asked.get("from", "earliest"), "earliest"),
        _bound(asked.get("to", "latest"), "latest"),
    )


def _bound(text: str, extreme: str) -> Bound:
    if text == extreme:
        return None
    # Not isdigit(): that takes digits which int() does not.
    if text.isdecimal():
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SourceError(
            f"{text!r} is no offset, no ISO 8601 time and not {extreme!r}: write {_FORM}"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def read_kafka(address: str, log: EventLog, bad: BadRecords, surface: str) -> str:
    """Gather the events of a topic range; returns the sha256 of its values, and of the keys of
    tombstones, in order.

    Reads one partition after the other, each up to where it ends at the start.

    Raises:
        SourceError: the address is malformed, Kafka does not answer, there is no such topic, no
            such offset, or a record breaks the contract.
        SettingsError: a STREAMREC_ variable is out of range, or a file of certificates broken.
    """
    wanted = parse_range(address)
    settings = load_settings(kafka=wanted.bootstrap)
    intake = RecordIntake(log, bad, surface, keyed=True)
    try:
        return asyncio.run(_read(wanted, settings, intake))
    except OffsetOutOfRangeError:
        raise SourceError(
            f"records of topic {wanted.topic} were deleted while they were read: begin later, or"
            " lengthen the topic's retention"
        ) from None
    except (KafkaError, TimeoutError) as error:
        raise SourceError(
            asyncio.run(kafka_refusal(settings, error))
            or f"Kafka at {wanted.bootstrap} does not answer"
            f" ({str(error) or type(error).__name__}): start it, or correct the address"
        ) from None


async def _read(wanted: TopicRange, settings: Settings, intake: RecordIntake) -> str:
    consumer = AIOKafkaConsumer(
        **kafka_client(settings),
        client_id="streamrec-models",
        enable_auto_commit=False,
        auto_offset_reset="none",
    )
    digest = hashlib.sha256()
    try:
        async with asyncio.timeout(SILENCE_S):
            await consumer.start()
            ranges = await _ranges(consumer, wanted, settings)
        for place, (start, end) in ranges.items():
            await _read_partition(consumer, place, start, end, intake, digest)
    finally:
        await consumer.stop()
    return digest.hexdigest()


async def _ranges(
    consumer: AIOKafkaConsumer, wanted: TopicRange, settings: Settings
) -> dict[TopicPartition, tuple[int, int]]:
    """First offset, and the one after the last, by partition."""
    places = await _partitions(wanted, settings)
    first = await consumer.beginning_offsets(places)
    last = await consumer.end_offsets(places)
    start = await _resolve(consumer, wanted.start, first, last, first)
    end = await _resolve(consumer, wanted.end, first, last, last)
    if all(start[place] >= end[place] for place in places):
        raise SourceError(
            f"topic {wanted.topic} holds no records in that range"
            f" ({_shown(first, last)}): widen from and to"
        )
    return {place: (start[place], end[place]) for place in places}


async def _partitions(wanted: TopicRange, settings: Settings) -> list[TopicPartition]:
    admin = AIOKafkaAdminClient(**kafka_client(settings), client_id="streamrec-models")
    try:
        await admin.start()
        # All topics first: asking for one may make it.
        topics = await admin.list_topics()
        if wanted.topic not in topics:
            raise SourceError(
                f"Kafka at {wanted.bootstrap} has no topic {wanted.topic}"
                f" (topics: {', '.join(sorted(topics)) or 'none'}): correct the name"
            )
        (described,) = await admin.describe_topics([wanted.topic])
    finally:
        await admin.close()
    numbers = sorted(partition["partition"] for partition in described["partitions"])
    return [TopicPartition(wanted.topic, number) for number in numbers]


async def _resolve(
    consumer: AIOKafkaConsumer,
    bound: Bound,
    first: dict[TopicPartition, int],
    last: dict[TopicPartition, int],
    default: dict[TopicPartition, int],
) -> dict[TopicPartition, int]:
    if bound is None:
        return default
    if isinstance(bound, datetime):
        moment_ms = max(0, int(bound.timestamp() * 1000))
        found = await consumer.offsets_for_times(dict.fromkeys(first, moment_ms))
        # Kafka gives None where there is no later record; Tansu, a record of time -1.
        later = {p for p in first if found.get(p) is not None and found[p].timestamp >= 0}
        return {p: found[p].offset if p in later else last[p] for p in first}
    if any(bound < offset for offset in first.values()) or bound > max(last.values()):
        raise SourceError(
            f"offset {bound} is out of range ({_shown(first, last)}): give one that is there"
        )
    return {p: min(bound, last[p]) for p in first}


async def _read_partition(
    consumer: AIOKafkaConsumer,
    place: TopicPartition,
    start: int,
    end: int,
    intake: RecordIntake,
    digest: hashlib._Hash,
) -> None:
    def where(record: Record) -> str:
        return f"topic {record.topic}, partition {record.partition}, offset {record.offset}"

    consumer.assign([place])
    consumer.seek(place, start)
    heard = time.monotonic()
    position = start
    # By position, not by the last record: compaction and transactions leave gaps.
    while position < end:
        fetched = await consumer.getmany(place, timeout_ms=1000)
        records = Records.of(
            place.topic, place.partition, [m for m in fetched.get(place, ()) if m.offset < end]
        )
        for key, value in zip(records.keys, records.values, strict=True):
            digest.update(value if value is not None else b"\0" + (key or b""))
        intake.take(records, where)
        now = time.monotonic()
        reached = await consumer.position(place)
        if reached > position:
            position, heard = reached, now
        elif now - heard > SILENCE_S:
            raise TimeoutError(
                f"nothing of partition {place.partition} after offset {position} in"
                f" {SILENCE_S:.0f} s"
            )


def _shown(first: dict[TopicPartition, int], last: dict[TopicPartition, int]) -> str:
    return "; ".join(f"partition {p.partition}: {first[p]} up to {last[p]}" for p in sorted(first))
