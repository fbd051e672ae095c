"""Runs one cell of the fault matrix: steady load, a fault, recovery, then the checker.

A cell says what is special about it; all of them have in common:

1. topics of their own on a real Kafka, a Redis of their own that syncs every write, a tiny model;
2. workers as ordinary processes, and a load of about 200 users that goes on all the while;
3. once some hundred events are committed, `act` brings the fault about, and returns when it is over
   (a kill is over at once);
4. the load goes on for `after_s`, then ends; all that was sent must be committed within
   `recover_within_s`; the workers are stopped in order and must exit with 0;
5. the checker compares what was sent with all that came of it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import tiny_bundle
from tests.faults import injected
from tests.faults.checker import Verdict, check
from tests.faults.gathering import gather
from tests.faults.load import Load
from tests.faults.plan import MAX_BYTES, Plan
from tests.faults.sampler import Sampler, longest_gap_s, recovered_at
from tests.integration.support import PARTITIONS, WorkerProcess, World, eventually
from worker.errors import LocalPartError
from worker.local.kafka import KafkaBroker, KafkaCluster
from worker.local.redis_server import RedisServer

#: Events a second of a steady load.
RATE = 400.0
#: Events that are committed before a fault.
UNDER_WAY = 400
SETTINGS = {
    "batch_max_events": "64",
    "commit_interval_s": "0.5",
    "event_max_bytes": str(MAX_BYTES),
    "max_in_flight_events": "512",
    "stall_timeout_s": "20",
    "shutdown_timeout_s": "10",
}


@dataclass(frozen=True)
class Cell:
    """A row of the matrix.

    `act` does the fault to a scene; what it finds wrong it notes with `scene.require`.
    """

    name: str
    #: For the table: what is done.
    fault: str
    act: Callable[[Scene], None]
    #: Name of the mutation (`mutations.py`) that turns this cell red.
    mutation: str
    #: Part of the short form in `make test`.
    short: bool = False
    plan: Plan = field(default_factory=Plan)
    rate: float = RATE
    settings: Mapping[str, str] = field(default_factory=dict)
    #: Workers that run before the fault; `act` may start others.
    workers: int = 1
    #: Environment of the first worker: a fault inside, see `injected.py`.
    inject: Mapping[str, str] = field(default_factory=dict)
    #: Seconds that the load goes on after the fault.
    after_s: float = 2.0
    recover_within_s: float = 60.0
    #: Largest number of lists and dead letters that may be published twice.
    most_repeats: int | None = None
    #: Whether it needs three brokers.
    cluster: bool = False
    #: Whether the registry is a store, of which workers keep a copy in `mirror`.
    mirrored: bool = False
    #: Arguments of redis-server.
    redis: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """What outlives a cell: one broker, or a cluster for those that need it."""

    broker: KafkaBroker | None = None
    cluster: KafkaCluster | None = None

    def kafka(self, cell: Cell) -> KafkaBroker | KafkaCluster:
        """What a cell runs on."""
        found = self.cluster if cell.cluster else self.broker
        assert found is not None
        return found


class Scene:
    """One cell under way: what `act` may touch."""

    def __init__(
        self, cell: Cell, world: World, load: Load, mutation: str | None, parts: Parts
    ) -> None:
        self.cell = cell
        self.world = world
        self.load = load
        self.parts = parts
        self.redis: RedisServer = world.redis
        self.sampler = Sampler(world.broker.bootstrap, world.name, world.events, PARTITIONS)
        self.workers: list[WorkerProcess] = []
        self.problems: list[str] = []
        #: When the fault began and was over, in `time.monotonic()`.
        self.began_at = self.ended_at = 0.0
        self._mutation = mutation

    @property
    def broker(self) -> KafkaBroker:
        """The only broker."""
        assert self.parts.broker is not None
        return self.parts.broker

    def worker(self, env: Mapping[str, str] | None = None, **settings: str) -> WorkerProcess:
        """Start one more worker and wait until it is ready.

        Args:
            env: a fault inside, see `injected.py`.
            settings: beside those of the cell.
        """
        started = self.prepared(env, **settings)
        started.process.start()
        return started

    def prepared(self, env: Mapping[str, str] | None = None, **settings: str) -> WorkerProcess:
        """One more worker, not yet started."""
        own = dict(env or {})
        if self._mutation is not None:
            own[injected.MUTATION] = self._mutation
        made = self.world.worker(
            env=own, module="tests.faults.injected" if own else "worker.cli", **settings
        )
        self.workers.append(made)
        return made

    def gone(self, worker: WorkerProcess, timeout_s: float = 60.0) -> None:
        """Wait until a worker is dead by SIGKILL, as it is meant to be: the fault begins then."""
        eventually(lambda: not worker.process.running, "the worker is dead", timeout_s)
        self.began()
        code = worker.process.stop()
        self.require(code == signal.SIGKILL, f"it ended by itself, with {code}, and was not killed")

    def began(self) -> None:
        """The fault begins now; by default it did when `act` was called."""
        self.began_at = time.monotonic()

    def ended(self) -> None:
        """The fault is over now; by default it is when `act` returns."""
        self.ended_at = time.monotonic()

    def require(self, holds: bool, what: str) -> None:
        """Note a problem of this cell where something does not hold."""
        if not holds:
            self.problems.append(what)

    def committed(self) -> int:
        """Events committed, as last seen."""
        last = self.sampler.last
        return 0 if last is None else sum(last.committed.values())

    def wait_for_commits(self, count: int, timeout_s: float = 60.0) -> None:
        """Until `count` more events are committed."""
        goal = self.committed() + count
        eventually(lambda: self.committed() >= goal, f"{count} events are committed", timeout_s)

    def keeps_up(self) -> bool:
        """Whether no more waits than comes in between commits, and a little."""
        last = self.sampler.last
        return last is not None and last.lag < 2 * self.load.rate

    def caught_up(self, since: float) -> bool:
        """Whether all that was sent by then (`time.monotonic()`) is committed."""
        last = self.sampler.last
        return last is not None and last.at > since and last.lag == 0


@dataclass(frozen=True)
class Result:
    """A filled row."""

    cell: str
    fault: str
    mutation: str | None
    verdict: Verdict | None
    problems: list[str]
    #: Seconds that the fault lasted.
    fault_s: float | None
    #: Seconds from the fault's end until all that had been sent by then was committed.
    recovery_s: float | None
    #: Longest time without a commit while events waited, in seconds.
    commit_gap_s: float | None
    #: Seconds that the whole cell took.
    took_s: float

    @property
    def green(self) -> bool:
        """Whether everything held."""
        return self.verdict is not None and not self.problems and not self.verdict.violations

    def failures(self) -> list[str]:
        """What did not hold."""
        return [
            *self.problems,
            *(str(one) for one in (self.verdict.violations if self.verdict else ())),
        ]


def run_cell(cell: Cell, parts: Parts, directory: Path, *, mutation: str | None = None) -> Result:
    """Run a cell, with the worker as it is or with a mutation."""
    began = time.monotonic()
    tiny_bundle(directory / "registry" / "posts" / "v1")
    with RedisServer(directory / "redis", persistent=True, arguments=cell.redis) as redis:
        assert isinstance(redis, RedisServer)
        kafka = parts.kafka(cell)
        settings = {**SETTINGS, **cell.settings}
        if cell.cluster:
            settings["topic_replication"] = "3"
        registry = str(directory / "registry")
        if cell.mirrored:
            registry = f"simplecache::file://{registry}"
            settings["registry_mirror_dir"] = str(directory / "mirror")
        world = World(directory, kafka, redis, registry, **settings)
        load = Load(kafka.bootstrap, world.events, cell.plan, cell.rate)
        scene = Scene(cell, world, load, mutation, parts)
        try:
            _play(scene)
        except (AssertionError, LocalPartError) as error:
            scene.problems.append(f"{type(error).__name__}: {error}"[:2000])
        finally:
            _end(scene)
        verdict = None
        try:
            verdict = check(gather(world, load))
        except Exception as error:
            # A broken run leaves what cannot be read: the cell is red, and the others go on.
            scene.problems.append(f"no evidence: {error!r}")
        if verdict is not None:
            _bound_repeats(scene, verdict)
    samples, over_at = scene.sampler.samples, scene.ended_at
    recovered = recovered_at(samples, over_at) if over_at else None
    return Result(
        cell.name,
        cell.fault,
        mutation,
        verdict,
        scene.problems,
        fault_s=over_at - scene.began_at if over_at else None,
        recovery_s=None if recovered is None else recovered - over_at,
        commit_gap_s=longest_gap_s([one for one in samples if one.at >= scene.began_at]),
        took_s=time.monotonic() - began,
    )


def _play(scene: Scene) -> None:
    cell = scene.cell
    for number in range(cell.workers):
        scene.worker(cell.inject if number == 0 else None)
    scene.load.start()
    scene.sampler.start()
    # A worker with a fault inside may be gone before.
    eventually(
        lambda: scene.committed() >= UNDER_WAY or not scene.workers[0].process.running,
        "under way",
    )
    scene.began()
    cell.act(scene)
    if not scene.ended_at:
        scene.ended()
    time.sleep(cell.after_s)
    scene.load.finish()
    sent_at = time.monotonic()
    eventually(
        lambda: scene.caught_up(sent_at), "all that was sent is committed", cell.recover_within_s
    )


def _end(scene: Scene) -> None:
    """End whatever is left running; workers that run must stop in order."""
    if scene.load.is_alive():
        scene.load.finish()
    for worker in scene.workers:
        died = not worker.process.running
        code = worker.process.stop()
        if code not in (None, 0):
            how = "died" if died else "did not stop in order"
            scene.problems.append(f"a worker {how}: exit code {code}\n{worker.log[-2000:]}")
    scene.sampler.stop()


def _bound_repeats(scene: Scene, verdict: Verdict) -> None:
    most = scene.cell.most_repeats
    if most is not None and verdict.repeats > most:
        scene.problems.append(f"{verdict.repeats} repeats were published; at most {most} may be")
