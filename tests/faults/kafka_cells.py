"""Cells about Kafka: a broker that goes and comes back, and a cluster that loses one of three."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiokafka.admin import AIOKafkaAdminClient

from tests.faults.harness import Cell, Scene
from tests.faults.injected import INJECT
from tests.faults.plan import Plan
from worker.local.kafka import KafkaBroker

T = TypeVar("T")

#: Seconds that a broker is away.
AWAY_S = 5.0
#: Many dead letters: one that is not published shows, while a user's next list hides the last.
PLAN = Plan(poison=0.2)
#: Something is in hand at any time.
SLOW = {INJECT: "publishing:1:sleep:0.2:1000000"}


def _restart(scene: Scene) -> None:
    scene.broker.stop()
    time.sleep(AWAY_S)
    scene.broker.start()
    scene.ended()
    scene.wait_for_commits(800)


def _crash(scene: Scene) -> None:
    scene.broker.kill()
    time.sleep(AWAY_S)
    scene.broker.start()
    scene.ended()
    scene.wait_for_commits(800)


def _asked(scene: Scene, ask: Callable[[AIOKafkaAdminClient], Awaitable[T]]) -> T:
    async def run() -> T:
        admin = AIOKafkaAdminClient(bootstrap_servers=scene.world.broker.bootstrap)
        await admin.start()
        try:
            return await ask(admin)
        finally:
            await admin.close()

    return asyncio.run(run())


def _leader(scene: Scene) -> int:
    """Node that leads partition 0 of the events."""

    async def ask(admin: AIOKafkaAdminClient) -> int:
        (topic,) = await admin.describe_topics([scene.world.events])
        return next(int(one["leader"]) for one in topic["partitions"] if one["partition"] == 0)

    return _asked(scene, ask)


def _coordinator(scene: Scene) -> int:
    """Node that coordinates the group."""
    return _asked(scene, lambda admin: admin.find_coordinator(scene.world.name))


def _lose(scene: Scene, node: int) -> None:
    """A node is killed; two are left. It comes back after everything went on without it."""
    (lost,) = [one for one in _brokers(scene) if one.node == node]
    try:
        lost.kill()
        scene.began()
        scene.ended()
        scene.wait_for_commits(1500)
    finally:
        lost.start()


def _brokers(scene: Scene) -> list[KafkaBroker]:
    assert scene.parts.cluster is not None
    return scene.parts.cluster.brokers


CELLS = (
    Cell(
        "broker-restart",
        f"the only broker stops in order, and starts after {AWAY_S:.0f} s",
        _restart,
        "give_up_publishing",
        plan=PLAN,
        inject=SLOW,
    ),
    Cell(
        "broker-crash",
        f"the only broker gets SIGKILL, and starts after {AWAY_S:.0f} s",
        _crash,
        "drop_when_behind",
        short=True,
        plan=PLAN,
        inject=SLOW,
    ),
    Cell(
        "leader-lost",
        "of three brokers, the leader of a partition gets SIGKILL",
        lambda scene: _lose(scene, _leader(scene)),
        "give_up_publishing",
        plan=PLAN,
        inject=SLOW,
        cluster=True,
    ),
    Cell(
        "coordinator-lost",
        "of three brokers, the group's coordinator gets SIGKILL",
        lambda scene: _lose(scene, _coordinator(scene)),
        "give_up_publishing",
        plan=PLAN,
        inject=SLOW,
        cluster=True,
    ),
)
