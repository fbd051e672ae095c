"""Canaries and shadows, judged by what users do: real broker, real Redis, worker processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ITEMS, tiny_bundle
from tests.integration.support import WorkerProcess, World, event, eventually
from worker.bundle import Bundle, open_bundle
from worker.errors import StreamrecError
from worker.local.kafka import KafkaBroker
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.registry import LocalRegistry
from worker.release_channel import push_release
from worker.releases import Release, with_canary, with_shadow

USERS = 120


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def registry(tmp_path: Path) -> LocalRegistry:
    """`v1`, promoted; `v2-same`, the same model; `v3-other`, whose lists are others."""
    root = tmp_path / "registry"
    tiny_bundle(root / "posts" / "v1", seed=1)
    tiny_bundle(root / "posts" / "v2-same", seed=1)
    # An item map that is off by one: the model means other items than the map says.
    tiny_bundle(root / "posts" / "v3-shifted", seed=1, items=(*ITEMS[1:], ITEMS[0]))
    made = LocalRegistry(root)
    made.promote("posts", "v1")
    return made


@pytest.fixture
def world(
    tmp_path: Path,
    broker: TansuBroker | KafkaBroker,
    redis_server: RedisServer,
    registry: LocalRegistry,
) -> World:
    return World(
        tmp_path, broker, redis_server, registry.root,
        gate_interval_s="0.3", gate_min_events="40", shadow_share="1.0",
        history_length="20", batch_max_events="16",
    )  # fmt: skip


class Crowd:
    """Users who like what the model of `v1` would recommend them, whichever version serves them."""

    def __init__(self, world: World, taste: Bundle) -> None:
        self._world = world
        self._taste = taste
        self._histories: dict[str, list[str]] = {f"u{number}": [] for number in range(USERS)}
        self._number = 0
        self.sent = 0

    def act(self, worker: WorkerProcess, *others: WorkerProcess) -> None:
        """Each views an item; once lists are made from that, each likes one."""
        self._send(
            {user: ITEMS[(7 * at + 11 * self._number) % len(ITEMS)] for at, user in self._users()},
            "view",
        )
        done = [worker, *others]
        eventually(
            lambda: sum(one.metric("streamrec_event_seconds_count") for one in done) >= self.sent,
            "all views are served",
        )
        self._send({user: self._wanted(user) for _, user in self._users()}, "like")

    def _users(self) -> Iterator[tuple[int, str]]:
        return iter(enumerate(self._histories))

    def _wanted(self, user: str) -> str:
        index = {item: at for at, item in enumerate(ITEMS, start=1)}
        seen = self._histories[user]
        history = np.zeros((1, 8), dtype=np.int64)
        last = seen[-8:]
        history[0, -len(last) :] = [index[item] for item in last]
        best, _ = self._taste.score(history, len(ITEMS))
        return next(ITEMS[at - 1] for at in best[0] if ITEMS[at - 1] not in seen)

    def _send(self, items: dict[str, str], kind: str) -> None:
        self._number += 1
        self._world.send(
            event(user, item, self._number, event_type=kind) for user, item in items.items()
        )
        for user, item in items.items():
            self._histories[user] = [*self._histories[user], item][-20:]
        self.sent += len(items)


@pytest.fixture
def crowd(world: World, registry: LocalRegistry) -> Crowd:
    return Crowd(world, open_bundle(registry.path("posts", "v1")))


def start_canary(registry: LocalRegistry, version: str) -> Release:
    return registry.change("posts", lambda old: with_canary(old, version, 0.5, at=now()))


def served(worker: WorkerProcess) -> dict[str, Any]:
    return dict(json.loads(worker.get("/model")[1])["posts"])


def decisions(world: World) -> list[dict[str, Any]]:
    return [
        json.loads(record.value) for record in world.read(f"{world.name}.decisions", partitions=1)
    ]


def act_until(crowd: Crowd, worker: WorkerProcess, *others: WorkerProcess, done: Any) -> None:
    for _ in range(12):
        if done():
            return
        crowd.act(worker, *others)
    eventually(done, "the gate has decided")


def test_a_canary_that_does_as_well_is_promoted(
    world: World, registry: LocalRegistry, crowd: Crowd
) -> None:
    with world.worker() as worker:
        crowd.act(worker)
        start_canary(registry, "v2-same")
        eventually(lambda: "canary" in served(worker), "the canary serves")
        act_until(crowd, worker, done=lambda: served(worker)["stable"]["version"] == "v2-same")
        assert "canary" not in served(worker)
        release = registry.release("posts")
        assert release is not None
        assert (release.stable, release.canary, release.quarantined) == ("v2-same", None, {})
        eventually(lambda: len(decisions(world)) == 1, "the decision is published")
        (decision,) = decisions(world)
        assert (decision["action"], decision["canary"]) == ("promote", "v2-same")
        assert decision["revision"] == release.revision
        # Both versions had users, and each event was looked up in what its user was served.
        for version in ("v1", "v2-same"):
            assert worker.metric(f'streamrec_hits_total{{model_version="posts@{version}"') > 50
        assert worker.metric('streamrec_decisions_total{action="promote"') == 1


def test_a_spoiled_canary_is_rolled_back_in_all_workers_and_not_tried_again(
    world: World, registry: LocalRegistry, crowd: Crowd
) -> None:
    # The second never looks at the registry: it learns by the topic what people and gate decide.
    with world.worker() as first, world.worker(registry_poll_s="1e6") as second:
        workers = first, second
        release = start_canary(registry, "v3-shifted")
        asyncio.run(push_release(world.settings(), "posts", release))
        for worker in workers:
            eventually(lambda worker=worker: "canary" in served(worker), "the canary serves")
        crowd.act(*workers)
        act_until(crowd, *workers, done=lambda: bool(decisions(world)))
        (decision,) = decisions(world)
        assert (decision["action"], decision["reason"]) == ("rollback", "gate: quality")
        assert decision["figures"]["canary_mrr"] < decision["figures"]["stable_mrr"] / 2
        for worker in workers:
            eventually(
                lambda worker=worker: served(worker)["revision"] == decision["revision"],
                "all follow",
            )
            assert served(worker)["stable"]["version"] == "v1"
            assert "canary" not in served(worker)
        found = registry.release("posts")
        assert found is not None and "v3-shifted" in found.quarantined
        with pytest.raises(StreamrecError, match="quarantined"):
            start_canary(registry, "v3-shifted")


def test_a_canary_that_cannot_be_loaded_harms_nobody(
    world: World, registry: LocalRegistry, crowd: Crowd
) -> None:
    with (registry.root / "posts" / "v2-same" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with world.worker() as worker:
        crowd.act(worker)
        start_canary(registry, "v2-same")
        eventually(lambda: bool(decisions(world)), "it is refused")
        (decision,) = decisions(world)
        assert decision["action"] == "rollback"
        assert "refused" in decision["reason"] and "model.onnx" in decision["reason"]
        assert worker.metric("streamrec_refused_bundles_total{") == 1
        crowd.act(worker)
        assert served(worker)["stable"]["version"] == "v1"


def test_a_shadow_is_judged_and_served_to_nobody(
    world: World, registry: LocalRegistry, crowd: Crowd
) -> None:
    registry.change("posts", lambda old: with_shadow(old, "v3-shifted", at=now()))
    with world.worker() as worker:
        assert served(worker)["shadow"]["version"] == "v3-shifted"
        for _ in range(3):
            crowd.act(worker)
        stable = 'streamrec_live_quality{bound="estimate",figure="mrr",model_version="posts@v1"'
        shadow = stable.replace("posts@v1", "posts@v3-shifted")
        eventually(lambda: worker.metric(stable) > 0.5, "what is served is judged")
        assert 0.0 < worker.metric(shadow) < 0.5
        published = [json.loads(record.value) for record in world.read(world.recommendations)]
        assert {one["model_version"] for one in published} <= {"posts@v1", "popularity"}
        assert decisions(world) == []


def test_a_restart_in_the_middle_of_a_trial_goes_on_with_it(
    world: World, registry: LocalRegistry, crowd: Crowd
) -> None:
    start_canary(registry, "v3-shifted")
    with world.worker(gate_min_events="100000") as worker:
        for _ in range(2):
            crowd.act(worker)
        evidence = 'streamrec_trial_evidence{figure="events"'
        eventually(lambda: worker.metric(evidence) > USERS, "there is evidence")
        before = worker.metric(evidence)
        worker.process.kill()
    crowd.sent = 0
    with world.worker(gate_min_events="100000") as worker:
        eventually(lambda: worker.metric(evidence) >= before, "it is known again")
        crowd.act(worker)
        eventually(lambda: worker.metric(evidence) > before, "and grows")
        assert served(worker)["canary"]["version"] == "v3-shifted"
