"""A real Apache Kafka (KRaft, one node) on loopback; its jars come from Maven Central, once.

Needs Java 17 or newer and Maven. Maven verifies the checksums of what it fetches.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from worker.errors import LocalPartError
from worker.local.process import LocalServer, ManagedProcess, free_port, kafka_answers

_POM = Path(__file__).with_name("kafka-pom.xml")
_OLDEST_JAVA = 17


def cache_directory() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/streamrec` or `~/.cache/streamrec`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "streamrec"


def kafka_missing() -> str | None:
    """What a real Kafka needs and this machine lacks; None where it can run."""
    java, maven = shutil.which("java"), shutil.which("mvn")
    missing = [name for name, path in (("Java 17+", java), ("Maven", maven)) if path is None]
    if java is not None:
        shown = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
        version = re.search(r'version "(\d+)', shown.stderr)
        if version is None or int(version.group(1)) < _OLDEST_JAVA:
            missing.append(f"Java 17+ (this is {shown.stderr.splitlines()[:1]})")
    return " and ".join(missing) or None


def kafka_jars() -> Path:
    """Directory with Kafka's jars, fetched by Maven on first use.

    Raises:
        LocalPartError: Java or Maven is missing, or Maven could not fetch them.
    """
    missing = kafka_missing()
    if missing is not None:
        raise LocalPartError(f"a real Kafka needs {missing}: install it and try again")
    name = "kafka-" + hashlib.sha256(_POM.read_bytes()).hexdigest()[:12]
    jars = cache_directory() / name
    if jars.is_dir():
        return jars
    building = jars.with_name(f".{name}.{os.getpid()}")
    building.mkdir(parents=True, exist_ok=True)
    shutil.copy(_POM, building / "pom.xml")
    command = [
        "mvn", "--batch-mode", "--quiet", "--strict-checksums", "-f", str(building / "pom.xml"),
        "dependency:copy-dependencies", f"-DoutputDirectory={building}",
    ]  # fmt: skip
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        shutil.rmtree(building, ignore_errors=True)
        raise LocalPartError(
            f"Maven could not fetch Kafka's jars:\n{(fetched.stdout + fetched.stderr)[-2000:]}"
        )
    try:
        building.rename(jars)
    except OSError:
        # Somebody else was faster.
        shutil.rmtree(building, ignore_errors=True)
    return jars


@dataclass(frozen=True)
class ClusterPlan:
    """What every node of a cluster must know before it starts."""

    id: str
    #: Port of each node's controller.
    controllers: Mapping[int, int]


class KafkaBroker(LocalServer):
    """One Kafka node, broker and controller in one. Its data outlives stop, kill and start.

    Args:
        properties: further entries of server.properties.
        listeners: further listeners by name, each with its port; `properties` say how they work.
        java: further arguments of the Java machine.
        format: further arguments of `kafka-storage format`, such as users of SCRAM.
        node: its number, from 1 on.
        cluster: of a `KafkaCluster`, whose controllers are known beforehand.
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        properties: Mapping[str, str] | None = None,
        *,
        listeners: Mapping[str, int] | None = None,
        java: Sequence[str] = (),
        format: Sequence[str] = (),
        node: int = 1,
        cluster: ClusterPlan | None = None,
    ) -> None:
        super().__init__(directory, port)
        self.node = node
        self._cluster = cluster
        self._controller_port = free_port() if cluster is None else cluster.controllers[node]
        self._properties = dict(properties or {})
        self._listeners = dict(listeners or {})
        self._java = list(java)
        self._format = list(format)

    @property
    def bootstrap(self) -> str:
        """Bootstrap servers."""
        return f"127.0.0.1:{self.port}"

    def _quorum(self) -> dict[str, str]:
        if self._cluster is None:
            return {"controller.quorum.bootstrap.servers": f"127.0.0.1:{self._controller_port}"}
        voters = self._cluster.controllers.items()
        return {"controller.quorum.voters": ",".join(f"{n}@127.0.0.1:{port}" for n, port in voters)}

    def _new_process(self) -> ManagedProcess:
        served = ",".join(
            [
                f"PLAINTEXT://{self.bootstrap}",
                *(f"{name}://127.0.0.1:{port}" for name, port in self._listeners.items()),
            ]
        )
        properties = {
            "process.roles": "broker,controller",
            "node.id": str(self.node),
            "listeners": f"{served},CONTROLLER://127.0.0.1:{self._controller_port}",
            "advertised.listeners": served,
            "controller.listener.names": "CONTROLLER",
            **self._quorum(),
            "log.dirs": str(self.directory / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "share.coordinator.state.topic.replication.factor": "1",
            **self._properties,
        }
        file = self.directory / "server.properties"
        file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        java = [
            "java", "-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", *self._java,
            "-cp", f"{kafka_jars()}/*",
        ]  # fmt: skip
        if not (self.directory / "data" / "meta.properties").exists():
            cluster = self._cluster
            made = subprocess.run(
                [
                    *java, "kafka.tools.StorageTool", "format", "--config", str(file),
                    *(["--standalone"] if cluster is None else []),
                    "--cluster-id", _new_id() if cluster is None else cluster.id,
                    *self._format,
                ],
                capture_output=True,
                text=True,
                check=False,
            )  # fmt: skip
            if made.returncode != 0:
                raise LocalPartError(f"Kafka's storage was not formatted:\n{made.stderr[-2000:]}")
        return ManagedProcess(
            "Apache Kafka",
            [*java, "kafka.Kafka", str(file)],
            log_path=self.directory / "kafka.log",
            ready=lambda: kafka_answers(self.port),
        )


class KafkaCluster:
    """Three Kafka nodes on loopback; what is written is on all of them, or on two at least."""

    def __init__(self, directory: Path) -> None:
        plan = ClusterPlan(_new_id(), {node: free_port() for node in (1, 2, 3)})
        self.brokers = [
            KafkaBroker(directory / str(node), None, _REPLICATED, node=node, cluster=plan)
            for node in plan.controllers
        ]

    @property
    def bootstrap(self) -> str:
        """Bootstrap servers."""
        return ",".join(broker.bootstrap for broker in self.brokers)

    def __enter__(self) -> KafkaCluster:
        # Together: a node is ready only once most of them are there to elect a controller.
        with ThreadPoolExecutor(len(self.brokers)) as threads:
            list(threads.map(lambda broker: broker.start(), self.brokers))
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor(len(self.brokers)) as threads:
            list(threads.map(lambda broker: broker.stop(), self.brokers))


_REPLICATED = {
    "min.insync.replicas": "2",
    "default.replication.factor": "3",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
}


def _new_id() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
