"""A worker process under test, and what one sends to it and reads back."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition
from redis import Redis

from worker.local.kafka import KafkaBroker, KafkaCluster
from worker.local.process import ManagedProcess, free_port
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.local.topics import read_topic
from worker.settings import Settings, load_settings

PARTITIONS = 4


class World:
    """Topics of their own on a broker, a Redis, and workers."""

    def __init__(
        self,
        directory: Path,
        broker: TansuBroker | KafkaBroker | KafkaCluster,
        redis: RedisServer,
        registry: Path | str,
        **settings: str,
    ) -> None:
        self.directory = directory
        self.broker = broker
        self.redis = redis
        self.name = f"test-{uuid.uuid4().hex[:8]}"
        self.events = f"{self.name}.events"
        self.recommendations = f"{self.name}.recommendations"
        self.dead_letters = f"{self.name}.dead"
        self.environment = {
            "STREAMREC_KAFKA": broker.bootstrap,
            "STREAMREC_REDIS": redis.url,
            "STREAMREC_GROUP": self.name,
            "STREAMREC_EVENTS_TOPIC": self.events,
            "STREAMREC_RECOMMENDATIONS_TOPIC": self.recommendations,
            "STREAMREC_DEAD_LETTER_TOPIC": self.dead_letters,
            "STREAMREC_RELEASES_TOPIC": f"{self.name}.releases",
            "STREAMREC_DECISIONS_TOPIC": f"{self.name}.decisions",
            "STREAMREC_CREATE_TOPICS": "true",
            "STREAMREC_TOPIC_PARTITIONS": str(PARTITIONS),
            "STREAMREC_REGISTRY": str(registry),
            "STREAMREC_SESSION_TIMEOUT_S": "6",
            "STREAMREC_FETCH_WAIT_MS": "10",
            "STREAMREC_REBALANCE_TIMEOUT_S": "6",
            "STREAMREC_REGISTRY_POLL_S": "0.2",
            **{f"STREAMREC_{name.upper()}": value for name, value in settings.items()},
        }

    def worker(
        self, *, module: str = "worker.cli", env: Mapping[str, str] | None = None, **settings: str
    ) -> WorkerProcess:
        """A worker, not yet started.

        Args:
            module: what runs it: the command line, or something around it.
            env: environment beside the settings.
        """
        return WorkerProcess(self, settings, module, env)

    def settings(self) -> Settings:
        """Where the broker and the topics are, for what is called in the test's own process."""
        return load_settings(kafka=self.broker.bootstrap, releases_topic=f"{self.name}.releases")

    def send(self, records: Iterable[tuple[bytes | None, bytes | None]]) -> None:
        """Write key and value of each record, in order, and wait for all."""

        async def run() -> None:
            producer = AIOKafkaProducer(bootstrap_servers=self.broker.bootstrap, acks="all")
            await producer.start()
            try:
                pending = [await producer.send(self.events, value, key) for key, value in records]
                await asyncio.gather(*pending)
            finally:
                await producer.stop()

        asyncio.run(run())

    def read(self, topic: str, partitions: int = PARTITIONS) -> list[Any]:
        """Every record now in `topic`."""
        return asyncio.run(read_topic(self.broker.bootstrap, topic, partitions=partitions))

    def cached(self, user: str, surface: str = "posts") -> dict[str, Any] | None:
        """What Redis holds for a user."""
        with Redis.from_url(self.redis.url) as client:
            data = client.get(f"rec:{{{user}}}:{surface}")
        return None if data is None else dict(json.loads(data))  # type: ignore[arg-type]

    def committed(self) -> dict[int, int]:
        """Committed offset of the group by partition."""

        async def run() -> dict[int, int]:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self.broker.bootstrap,
                group_id=self.name,
                enable_auto_commit=False,
            )
            await consumer.start()
            try:
                partitions = [TopicPartition(self.events, n) for n in range(PARTITIONS)]
                consumer.assign(partitions)
                return {tp.partition: await consumer.committed(tp) or 0 for tp in partitions}
            finally:
                await consumer.stop()

        return asyncio.run(run())


class WorkerProcess:
    """`streamrec worker` as a process."""

    def __init__(
        self,
        world: World,
        settings: Mapping[str, str],
        module: str = "worker.cli",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        number = uuid.uuid4().hex[:6]
        self.process = ManagedProcess(
            "the worker under test",
            [sys.executable, "-m", module, "worker"],
            log_path=world.directory / f"worker-{number}.log",
            ready=lambda: self.get("/readyz")[0] == 200,
            stop_s=30.0,
            env={
                **world.environment,
                "STREAMREC_HTTP_PORT": str(self.port),
                **{f"STREAMREC_{name.upper()}": value for name, value in settings.items()},
                **(env or {}),
            },
        )

    def __enter__(self) -> WorkerProcess:
        self.process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an HTTP path."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, prefix: str) -> float:
        """Sum of all samples whose line starts with `prefix`."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(prefix))

    @property
    def log(self) -> str:
        """What it has logged."""
        return self.process.log_path.read_text()


def event(user: str, item: str, number: int = 0, **changes: object) -> tuple[bytes, bytes]:
    """Key and value of a good event."""
    body = {
        "user_id": user,
        "item_id": item,
        "event_type": "view",
        "timestamp": 1_764_000_000_000 + number,
        "surface": "posts",
        **changes,
    }
    return user.encode(), json.dumps(body).encode()


def eventually(check: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Wait until `check` holds."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)
