"""What stands around a system under test: broker, a Redis for each case, topics, generator,
observer. All of it stays off the system's CPUs."""

from __future__ import annotations

import os
import shutil
import uuid
from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from redis import Redis

from benchmarks.errors import BenchmarkError
from benchmarks.load import Generator
from benchmarks.observer import NOTIFICATIONS, Observer
from benchmarks.system import Cpus
from benchmarks.workloads import WorkloadSpec, first_timestamp_ms, known_items, workload
from worker.cache import UserKey, history_key
from worker.events import Surface
from worker.history import History
from worker.local.kafka import KafkaBroker, kafka_missing
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker

#: As the worker's setting; what Redis is filled with must fit.
HISTORY_LENGTH = 200
_FILL = 2000


def default_broker() -> str:
    """Apache Kafka where it can run, else the embedded broker."""
    return "tansu" if kafka_missing() else "kafka"


@dataclass(frozen=True)
class Topics:
    """Topics of one case."""

    events: str
    recommendations: str
    dead_letters: str
    partitions: int


class Stage:
    """Broker, generator and observer for a whole run.

    Args:
        directory: for everything that is written.
        broker: `kafka` or `tansu`.
    """

    def __init__(self, directory: Path, broker: str, cpus: Cpus) -> None:
        self.directory = directory
        self.cpus = cpus
        self.broker_name = broker
        place = directory / "broker"
        self.broker: KafkaBroker | TansuBroker = (
            KafkaBroker(place, properties={"file.delete.delay.ms": "1000"})
            if broker == "kafka"
            else TansuBroker(place)
        )
        self._parts = ExitStack()
        self._templates: dict[tuple[WorkloadSpec, int | None], Path] = {}

    def __enter__(self) -> Stage:
        # Whatever is started from here on inherits it; systems under test are moved off.
        before = os.sched_getaffinity(0)
        self._parts.callback(os.sched_setaffinity, 0, before)
        os.sched_setaffinity(0, self.cpus.rest)
        self._parts.enter_context(self.broker)
        self.generator = self._parts.enter_context(Generator(self.broker.bootstrap))
        self.observer = self._parts.enter_context(Observer())
        self._admin = AdminClient({"bootstrap.servers": self.broker.bootstrap, "log_level": 0})
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    @property
    def broker_pid(self) -> int:
        """Process id of the broker."""
        assert self.broker.process is not None and self.broker.process.pid is not None
        return self.broker.process.pid

    @property
    def own_pids(self) -> list[int]:
        """Generator and observer."""
        return [self.generator.pid, self.observer.pid]

    @contextmanager
    def topics(self, partitions: int) -> Iterator[Topics]:
        """New topics, gone afterwards."""
        name = f"bench-{uuid.uuid4().hex[:8]}"
        made = Topics(f"{name}.events", f"{name}.recommendations", f"{name}.dead", partitions)
        names = [made.events, made.recommendations, made.dead_letters]
        wait_for(self._admin.create_topics([NewTopic(n, partitions, 1) for n in names]))
        try:
            yield made
        finally:
            # The embedded broker cannot; it forgets everything when it stops.
            if self.broker_name == "kafka":
                wait_for(self._admin.delete_topics(names), quiet=True)

    @contextmanager
    def redis(self, spec: WorkloadSpec, users: int | None = None) -> Iterator[RedisServer]:
        """A new Redis with the histories of `spec`; the observer watches it."""
        template = self._template(spec, users)
        place = self.directory / f"redis-{uuid.uuid4().hex[:8]}"
        place.mkdir()
        shutil.copy(template / "dump.rdb", place)
        with RedisServer(place, arguments=NOTIFICATIONS) as server:
            assert isinstance(server, RedisServer)
            self.observer.watch(server.url)
            yield server
        shutil.rmtree(place, ignore_errors=True)

    def histories_file(self, spec: WorkloadSpec, users: int | None = None) -> Path:
        """Where peers read the same histories."""
        return self._template(spec, users) / "histories.msgpack"

    def _template(self, spec: WorkloadSpec, users: int | None) -> Path:
        known = self._templates.get((spec, users))
        if known is not None:
            return known
        place = self.directory / f"template-{len(self._templates)}"
        place.mkdir()
        histories = dict(workload(spec).histories(users))
        (place / "histories.msgpack").write_bytes(msgspec.msgpack.encode(histories))
        with RedisServer(place) as server:
            assert isinstance(server, RedisServer)
            with Redis.from_url(server.url) as client:
                _fill(client, spec, histories)
                client.save()
        self._templates[spec, users] = place
        return place

    def committed(self, group: str, topics: Topics) -> dict[int, int]:
        """Committed offset by partition."""
        wanted = [TopicPartition(topics.events, n) for n in range(topics.partitions)]
        request = ConsumerGroupTopicPartitions(group, wanted)
        answer = next(iter(self._admin.list_consumer_group_offsets([request]).values())).result(30)
        return {place.partition: max(0, place.offset) for place in answer.topic_partitions}

    def ends(self, topics: Topics) -> dict[int, int]:
        """Offset that the next event would have, by partition."""
        consumer = Consumer({"bootstrap.servers": self.broker.bootstrap, "group.id": "ends"})
        try:
            return {
                n: consumer.get_watermark_offsets(TopicPartition(topics.events, n), 30.0)[1]
                for n in range(topics.partitions)
            }
        finally:
            consumer.close()


def _fill(client: Redis, spec: WorkloadSpec, histories: dict[str, list[int]]) -> None:
    newest_ms = first_timestamp_ms() - 3_600_000
    pairs = list(histories.items())
    for start in range(0, len(pairs), _FILL):
        pipe = client.pipeline(transaction=False)
        for user, indexes in pairs[start : start + _FILL]:
            history = History(HISTORY_LENGTH)
            history.items = known_items(spec.items, indexes)
            history.timestamps.extend(
                array("q", range(newest_ms - 1000 * len(indexes), newest_ms, 1000))
            )
            key = history_key(UserKey(user, Surface.POSTS))
            pipe.set(key, history.to_bytes(), ex=90 * 24 * 3600)
        pipe.execute()


def wait_for(futures: Mapping[str, Future[None]], *, quiet: bool = False) -> None:
    """Wait for what an admin client promised.

    Raises:
        BenchmarkError: the broker refused (unless `quiet`).
    """
    for name, future in futures.items():
        try:
            future.result(30)
        except KafkaException as error:
            if not quiet:
                raise BenchmarkError(f"the broker refused for {name}: {error}") from None
