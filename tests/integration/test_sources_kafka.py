"""A range of a topic is read once, as it was when reading began, on real brokers."""

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from models.sources import SourceError, read_events
from tests.integration.support import event
from worker.local.kafka import KafkaBroker
from worker.local.process import free_port
from worker.local.tansu import TansuBroker

Broker = TansuBroker | KafkaBroker

#: Partition, record time in ms, and the record, in sending order. Event times interleave.
T0 = 1_764_000_000_000
RECORDS: Sequence[tuple[int, int, tuple[bytes | None, bytes | None]]] = (
    (0, T0, event("u", "a", 0, text="about a")),
    (1, T0 + 10, event("v", "b", 1)),
    (0, T0 + 20, event("u", "c", 2, surface="ads")),
    (1, T0 + 30, event("v", "d", 3, event_type="like")),
    (0, T0 + 40, event("u", "e", 4)),
    (1, T0 + 50, (b"v", b"not json")),
    (0, T0 + 60, event("u", "f", 6)),
    (1, T0 + 70, (b"someone else", event("v", "g", 7)[1])),
)


@pytest.fixture(scope="module")
def topics() -> dict[str, str]:
    """Topic by broker."""
    return {}


@pytest.fixture
def address(broker: Broker, topics: dict[str, str]) -> str:
    """A topic of two partitions that holds RECORDS; without the range."""
    return filled(broker, topics)


def filled(broker: Broker, topics: dict[str, str]) -> str:
    """The same on a given broker; made when first asked for."""
    if broker.bootstrap not in topics:
        topics[broker.bootstrap] = f"events-{uuid.uuid4().hex[:8]}"
        asyncio.run(_fill(broker.bootstrap, topics[broker.bootstrap]))
    return f"kafka://{broker.bootstrap}/{topics[broker.bootstrap]}"


async def _fill(bootstrap: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 2, 1)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    await producer.start()
    for partition, at_ms, (key, value) in RECORDS:
        await producer.send_and_wait(topic, value, key, partition, timestamp_ms=at_ms)
    await producer.stop()


def items(source: str) -> list[str]:
    return read_events(source, skip_bad=True).items.tolist()


def test_partitions_are_merged_by_event_time(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "models"):
        found = read_events(address, skip_bad=True)
    assert found.items.tolist() == ["a", "b", "d", "e", "f"]
    assert found.users.tolist() == ["u", "v", "v", "u", "u"]
    assert found.types.tolist() == ["view", "view", "like", "view", "view"]
    assert found.texts == {"a": "about a"}
    assert found.name == address
    by_partition = sorted(RECORDS, key=lambda one: one[0])
    values = b"".join(value or b"" for _, _, (_, value) in by_partition)
    assert found.sha256 == hashlib.sha256(values).hexdigest()
    assert "skipped 2 bad records" in caplog.text
    assert "not_json 1, wrong_key 1" in caplog.text


def test_a_bad_record_is_an_error_with_its_offset(address: str) -> None:
    with pytest.raises(SourceError, match=r"partition 1, offset 2: not_json: .*--skip-bad"):
        read_events(address)


def test_offsets_bound_each_partition(address: str) -> None:
    assert items(f"{address}?from=1&to=3") == ["d", "e"]
    assert items(f"{address}?from=2") == ["e", "f"]
    assert items(f"{address}?to=1") == ["a", "b"]


@pytest.mark.kafka
def test_times_bound_the_records(kafka: KafkaBroker, topics: dict[str, str]) -> None:
    # Tansu dates records by their arrival, so only a real Kafka can tell.
    source = filled(kafka, topics)
    start = datetime.fromtimestamp((T0 + 15) / 1000, UTC).isoformat()
    end = datetime.fromtimestamp((T0 + 45) / 1000, UTC).isoformat()
    assert items(f"{source}?from={start}&to={end}") == ["d", "e"]
    assert items(f"{source}?from={start}") == ["d", "e", "f"]


def test_a_time_after_all_records_is_the_end(address: str) -> None:
    assert items(f"{address}?from=1970-01-02&to=2100-01-01") == ["a", "b", "d", "e", "f"]


def test_reading_again_gives_the_same_since_nothing_is_committed(address: str) -> None:
    assert items(address) == items(address)


@pytest.mark.parametrize("bounds", ["from=99", "to=99"])
def test_an_offset_that_is_not_there_is_an_error(address: str, bounds: str) -> None:
    with pytest.raises(SourceError, match=r"offset 99 is out of range \(partition 0: 0 up to 4"):
        read_events(f"{address}?{bounds}")


@pytest.mark.parametrize("bounds", ["from=3&to=2", "from=2100-01-01"])
def test_a_range_without_records_is_an_error(address: str, bounds: str) -> None:
    with pytest.raises(SourceError, match="holds no records in that range"):
        read_events(f"{address}?{bounds}")


def test_a_missing_topic_is_an_error_and_is_not_made(broker: Broker, address: str) -> None:
    missing = f"kafka://{broker.bootstrap}/no-such-topic"
    for _ in range(2):
        with pytest.raises(SourceError, match="has no topic no-such-topic"):
            read_events(missing)


def test_a_kafka_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(SourceError, match="does not answer"):
        read_events(f"kafka://127.0.0.1:{free_port()}/events")
