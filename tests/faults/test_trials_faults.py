"""Trials while workers die, join and start late, Redis is away, and anybody writes to the topic of
releases: the group ends with one decision, and no event is lost."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from click.testing import CliRunner
from redis import Redis

from models.cli import models
from tests.conftest import ITEMS, tiny_bundle
from tests.integration.support import PARTITIONS, WorkerProcess, World, event, eventually
from tests.integration.test_trials import USERS, Crowd, decisions, served, start_canary
from worker.bundle import open_bundle
from worker.cache import PartitionKey, tally_key
from worker.events import Surface
from worker.local.kafka import KafkaBroker
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.registry import LocalRegistry
from worker.release_channel import push_release
from worker.releases import Release, canary_ended
from worker.trials import PartitionTally, decode_tally, merged

EVIDENCE = 'streamrec_trial_evidence{figure="events"'
SPOILED = "v3-shifted"


@pytest.fixture
def registry(tmp_path: Path) -> LocalRegistry:
    """`v1`, promoted; `v2`, the same model; `v3-shifted`, whose item map is off by one."""
    root = tmp_path / "registry"
    tiny_bundle(root / "posts" / "v1", seed=1)
    tiny_bundle(root / "posts" / "v2", seed=1)
    tiny_bundle(root / "posts" / SPOILED, seed=1, items=(*ITEMS[1:], ITEMS[0]))
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
    # Three rounds of the crowd are needed for a decision.
    return World(
        tmp_path, broker, redis_server, registry.root,
        gate_interval_s="0.2", gate_min_events=str(2 * USERS + 1), history_length="20",
        batch_max_events="16", commit_interval_s="0.2",
    )  # fmt: skip


class PatientCrowd(Crowd):
    """Waits for commits, so that it does not matter which worker did the work."""

    likes = 0

    def round(self) -> None:
        """Each views an item and, once all have lists from that, likes one."""
        users = list(self._users())
        self._send(
            {user: ITEMS[(7 * at + 11 * self._number) % len(ITEMS)] for at, user in users}, "view"
        )
        self.wait()
        self._send({user: self._wanted(user) for _, user in users}, "like")
        self.likes += len(users)
        self.wait()

    def wait(self) -> None:
        """Until all that was sent is committed."""
        eventually(lambda: sum(self._world.committed().values()) == self.sent, "all is committed")


@pytest.fixture
def crowd(world: World, registry: LocalRegistry) -> PatientCrowd:
    return PatientCrowd(world, open_bundle(registry.path("posts", "v1")))


def released(registry: LocalRegistry) -> Release:
    found = registry.release("posts")
    assert found is not None
    return found


def tally(world: World, period: int) -> PartitionTally:
    """What Redis holds of a trial."""
    places = [PartitionKey(Surface.POSTS, world.events, number) for number in range(PARTITIONS)]
    with Redis.from_url(world.redis.url) as client:
        stored = [client.get(tally_key(place)) for place in places]
    return merged((decode_tally(data, period) for data in stored), period)


def deciding(*workers: WorkerProcess) -> WorkerProcess:
    """The one that exports the figures of the trial."""
    eventually(lambda: any(one.metric(EVIDENCE) > 0 for one in workers), "one of them decides")
    return max(workers, key=lambda one: one.metric(EVIDENCE))


@contextmanager
def killed_once_decided(worker: WorkerProcess, registry: LocalRegistry) -> Iterator[None]:
    """SIGKILL within milliseconds of the release being replaced."""

    def run() -> None:
        ends = time.monotonic() + 60.0
        while released(registry).canary is not None and time.monotonic() < ends:
            time.sleep(0.001)
        worker.process.kill()

    killer = threading.Thread(target=run)
    killer.start()
    yield
    killer.join()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_deciding_worker_may_be_killed_and_the_group_ends_with_one_decision(
    world: World, registry: LocalRegistry, crowd: PatientCrowd, moment: str
) -> None:
    with world.worker() as one, world.worker() as other:
        start_canary(registry, SPOILED)
        for worker in (one, other):
            eventually(lambda worker=worker: "canary" in served(worker), "the canary serves")
        crowd.round()
        decides = deciding(one, other)
        survivor = other if decides is one else one
        if moment == "before":
            decides.process.kill()
            while released(registry).canary is not None:
                assert crowd.likes < 20 * USERS
                crowd.round()
            eventually(lambda: len(decisions(world)) == 1, "the survivor publishes it")
        else:
            with killed_once_decided(decides, registry):
                while released(registry).canary is not None:
                    assert crowd.likes < 20 * USERS
                    crowd.round()
        decided = released(registry)
        assert (decided.stable, list(decided.quarantined)) == ("v1", [SPOILED])
        eventually(lambda: served(survivor)["revision"] == decided.revision, "the group follows")
        crowd.round()
        # Neither the one that took over nor anybody else decided again.
        assert released(registry) == decided
        assert len(decisions(world)) <= 1
        assert served(survivor)["stable"]["version"] == "v1"
        assert "canary" not in served(survivor)


def test_redis_may_be_away_in_a_trial_and_the_trial_goes_on(
    world: World, registry: LocalRegistry, crowd: PatientCrowd, redis_server: RedisServer
) -> None:
    start_canary(registry, SPOILED)
    period = released(registry).period
    with world.worker() as worker:
        crowd.round()
        before = tally(world, period)
        redis_server.stop()
        crowd._send({"u0": ITEMS[3]}, "view")
        failed = 'streamrec_redis_errors_total{operation="read_tallies"'
        eventually(lambda: worker.metric(failed) > 0, "the gate notices")
        assert worker.get("/livez")[0] == 200
        assert released(registry).canary is not None
        redis_server.start()
        crowd.wait()
        after = tally(world, period)
        assert after.evidence().events >= before.evidence().events > 0
        while released(registry).canary is not None:
            assert crowd.likes < 20 * USERS
            crowd.round()
        eventually(lambda: len(decisions(world)) == 1, "it is decided")
        assert decisions(world)[0]["figures"]["events"] <= crowd.likes


def test_workers_may_join_and_leave_in_a_trial_and_no_event_counts_twice(
    world: World, registry: LocalRegistry, crowd: PatientCrowd
) -> None:
    world.environment["STREAMREC_GATE_MIN_EVENTS"] = "100000"
    start_canary(registry, "v2")
    period = released(registry).period
    with world.worker() as stays:
        crowd.round()
        with world.worker() as comes:
            eventually(lambda: "canary" in served(comes), "it serves the canary too")
            crowd.round()
            crowd.round()
            assert comes.metric('streamrec_scored_lists_total{model_version="posts@v2"') > 0
            eventually(
                lambda: max(one.metric(EVIDENCE) for one in (stays, comes)) > USERS,
                "one of them decides by what both counted",
            )
        crowd.round()
        found = tally(world, period)
        eventually(
            lambda: stays.metric(EVIDENCE) == found.evidence().events, "it decides by all of it"
        )
    for side in (found.stable, found.canary):
        assert side.events == side.pairs >= side.hits
    users = found.stable.users + found.canary.users
    assert 0.9 * USERS <= users <= USERS
    # Lists that were made before a rebalance are not judged after it: nothing else is missing.
    assert 0.5 * crowd.likes < found.evidence().events <= crowd.likes
    assert found.errors == 0


def test_a_worker_that_starts_late_never_serves_what_was_rolled_back(
    world: World, registry: LocalRegistry, crowd: PatientCrowd
) -> None:
    with world.worker():
        crowd.round()
    # The workers cannot write the registry: that a gate rolled it back is in the topic alone.
    running = start_canary(registry, SPOILED)
    ended = canary_ended(running, quarantine="gate: quality", at=datetime.now(UTC))
    asyncio.run(push_release(world.settings(), "posts", ended))
    with world.worker() as late:
        crowd.round()
        assert served(late)["revision"] == ended.revision
        assert late.metric(f'streamrec_scored_lists_total{{model_version="posts@{SPOILED}"') == 0
    versions = {
        json.loads(record.value)["model_version"] for record in world.read(world.recommendations)
    }
    assert versions == {"posts@v1"}
    # Nor does the next change bring it back, though the registry still has it as canary.
    done = CliRunner().invoke(
        models,
        [
            *("shadow", "posts", "v2", "--registry", str(registry.root)),
            *("--kafka", world.broker.bootstrap, "--releases-topic", f"{world.name}.releases"),
        ],
    )
    assert done.exit_code == 0, done.output
    after = released(registry)
    assert (after.canary, after.shadow) == (None, "v2")
    assert SPOILED in after.quarantined
    assert after.revision > ended.revision


def garbage(revision: int) -> list[tuple[bytes | None, bytes | None]]:
    """What somebody may write to the topic of releases."""

    def release(**fields: object) -> bytes:
        return json.dumps({"stable": "v1", "revision": revision, **fields}).encode()

    values = [
        b"not JSON",
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b"null",
        release(stable=7),
        release(stable="../../v2"),
        release(revision=2**63),
        release(revision=2**80),
        release(revision=-1),
        release(revision=2**52),
        release(period=2**64, shadow="v2"),
        release(canary={"version": "v2", "share": 2.0, "since": "2026-11-24T10:00:00Z"}),
        release(canary={"version": "v2", "share": 0.5, "since": "yesterday"}),
        # The last one of the model's name, so that it outlives the others in the topic.
        release(stable="v99", revision=revision + 1),
    ]
    good = release(stable=SPOILED)
    records: list[tuple[bytes | None, bytes | None]] = [(b"posts", value) for value in values]
    return [(None, good), (b"\xff", good), (b"friends", good), (b"posts", None), *records]


def test_garbage_in_the_topic_of_releases_stops_no_worker_running_or_starting(
    world: World, registry: LocalRegistry
) -> None:
    topic = f"{world.name}.releases"

    async def write(records: list[tuple[bytes | None, bytes | None]]) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=world.broker.bootstrap, acks="all")
        await producer.start()
        try:
            for key, value in records:
                await producer.send_and_wait(topic, value, key)
        finally:
            await producer.stop()

    with world.worker() as worker:
        # Keyless records are refused by a broker that compacts; both are right.
        records = garbage(released(registry).revision)
        asyncio.run(write([pair for pair in records if pair[0] is not None]))
        eventually(lambda: "version 'v99'" in worker.log, "all of it is read")
        assert "release_damaged" in worker.log and "release_from_the_future" in worker.log
        world.send([event("ann", ITEMS[0])])
        eventually(lambda: sum(world.committed().values()) == 1, "the stream goes on")
        assert served(worker)["stable"]["version"] == "v1"
    with world.worker() as worker:
        assert served(worker)["stable"]["version"] == "v1"
        world.send([event("ann", ITEMS[1])])
        eventually(lambda: sum(world.committed().values()) == 2, "a new one starts")
        # And people are heard.
        release = registry.promote("posts", "v2")
        eventually(lambda: served(worker)["revision"] == release.revision, "it follows people")
        assert served(worker)["stable"]["version"] == "v2"
