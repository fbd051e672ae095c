"""What comes of a trial's figures: a release that is promoted or rolled back, once."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.conftest import tiny_bundle
from tests.unit.serving import BROKEN, POSTS, STRANGE, V1, V2, models, samples, total
from tests.unit.serving import registry as registry_at
from worker.cache import PartitionKey
from worker.decider import Decider
from worker.errors import StoreError
from worker.events import Surface
from worker.metrics import Metrics
from worker.models import Models
from worker.outbox import Outgoing
from worker.quality import Tally, UserRecord
from worker.registry import LocalRegistry
from worker.releases import (
    Release,
    canary_promoted,
    decode_release,
    with_canary,
    with_quarantined,
    with_shadow,
)
from worker.settings import ModelChoice, load_settings
from worker.trials import PartitionTally

PARTITIONS = 2


class LostKafkaError(Exception):
    """What the outbox raises while Kafka is away."""


class Kafka:
    """Keeps what is sent; fails as often as it is told."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.failures = 0

    async def send(self, records: Sequence[Outgoing]) -> None:
        if self.failures:
            self.failures -= 1
            raise LostKafkaError
        self.sent += records

    async def partitions(self, topic: str) -> set[int]:
        return set(range(PARTITIONS))

    def decisions(self) -> list[dict[str, Any]]:
        return [json.loads(one.value or b"") for one in self.sent if one.topic == "model-decisions"]

    def releases(self) -> list[Release]:
        return [
            decode_release(one.value or b"", "it")
            for one in self.sent
            if one.topic == "model-releases"
        ]


class Redis:
    """Tallies by partition; away where it is told so."""

    def __init__(self) -> None:
        self.tallies: dict[PartitionKey, bytes] = {}
        self.away = False

    def read_tallies(self, places: list[PartitionKey]) -> list[bytes | None]:
        if self.away:
            raise RedisConnectionError("away")
        return [self.tallies.get(place) for place in places]


class ReadOnly(LocalRegistry):
    """May be read alone."""

    def _locked(self, name: str) -> AbstractContextManager[None]:
        raise StoreError("read-only file system")


def users(count: int, gain: float, other: float) -> Tally:
    """`count` users with four events each, all looked up in both lists."""
    tally = Tally()
    for _ in range(count):
        hits, others = 4 * (gain > 0), 4 * (other > 0)
        record = UserRecord(1, 4, 4, hits, 4 * gain, others, 4 * other)
        tally.replace(UserRecord(1), record)
    return tally


def trial(period: int, canary: float, *, count: int = 200, ratio: float = 0.0) -> PartitionTally:
    """A trial in which the stable version's MRR is .5 and the canary's is `canary`."""
    tally = PartitionTally(
        period=period, canary=users(count, canary, 0.5), stable=users(count, 0.5, canary)
    )
    for number in range(400):
        tally.scorings += 1
        tally.latency.add(ratio + 0.01 * (number % 3 - 1))
    return tally


class Stage:
    """A deciding worker and everything that it reaches."""

    def __init__(self, registry: LocalRegistry, own: Models | None = None, **flags: Any) -> None:
        self.registry, self.kafka, self.redis = registry, Kafka(), Redis()
        self.metrics = Metrics()
        self.models = own or models(registry, self.metrics)
        self.models.load_all()
        self.decider = Decider(
            load_settings(**flags),
            models=self.models,
            registry=registry,
            cache=cast(Any, self.redis),
            outbox=cast(Any, self.kafka),
            metrics=self.metrics,
            kafka_failures=(LostKafkaError,),
        )

    def show(self, canary: float, surface: Surface = POSTS, **changes: Any) -> None:
        """Redis holds a trial like `trial`, in two partitions."""
        serving = self.models.serving(surface)
        assert serving is not None
        for partition in range(PARTITIONS):
            place = PartitionKey(surface, "user-events", partition)
            tally = trial(serving.period, canary, **changes)
            self.redis.tallies[place] = msgspec.msgpack.encode(tally)

    def look(self) -> None:
        asyncio.run(self.decider.look())

    def refresh(self) -> None:
        asyncio.run(self.models.refresh())

    @property
    def release(self) -> Release:
        """What the registry has."""
        found = self.registry.release("posts")
        assert found is not None
        return found

    @property
    def decided(self) -> float:
        return total(self.metrics, "streamrec_decisions_total")


def now() -> datetime:
    return datetime.now(UTC)


def canary(registry: LocalRegistry, version: str = V2, **changes: Any) -> Release:
    return registry.change("posts", lambda old: with_canary(old, version, 0.5, at=now(), **changes))


@pytest.fixture
def registry(tmp_path: Path) -> LocalRegistry:
    made = registry_at(tmp_path)
    made.promote("posts", V1)
    return made


@pytest.fixture
def stage(registry: LocalRegistry) -> Stage:
    canary(registry)
    return Stage(registry)


def test_a_canary_that_is_not_worse_is_promoted(stage: Stage) -> None:
    began = stage.release
    stage.show(canary=0.5)
    stage.look()
    assert (stage.release.stable, stage.release.canary) == (V2, None)
    assert stage.release.by == f"gate@{socket.gethostname()}"
    (decision,) = stage.kafka.decisions()
    assert (decision["action"], decision["reason"]) == ("promote", "gate: not_worse")
    assert (decision["stable"], decision["canary"]) == (V1, V2)
    assert decision["revision"] == stage.release.revision > began.revision
    # Both partitions were looked at.
    assert decision["figures"]["events"] == PARTITIONS * 2 * 200 * 4
    assert stage.kafka.releases() == [stage.release]


def test_a_canary_that_is_worse_is_rolled_back_and_quarantined(stage: Stage) -> None:
    stage.show(canary=0.1)
    stage.look()
    assert (stage.release.stable, stage.release.canary) == (V1, None)
    assert stage.release.quarantined == {V2: "gate: quality"}
    assert stage.kafka.decisions()[0]["action"] == "rollback"


def test_a_decision_is_made_counted_and_published_once(stage: Stage) -> None:
    stage.show(canary=0.5)
    # Before its own worker has swapped, and after.
    stage.look()
    stage.look()
    stage.refresh()
    stage.look()
    assert stage.decided == len(stage.kafka.decisions()) == len(stage.kafka.releases()) == 1


def test_a_decision_is_published_though_kafka_was_away(stage: Stage) -> None:
    stage.kafka.failures = 2
    stage.show(canary=0.5)
    stage.look()
    assert len(stage.kafka.decisions()) == len(stage.kafka.releases()) == stage.decided == 1
    assert total(stage.metrics, "streamrec_produce_errors_total") == 2


def test_a_decision_that_a_crash_kept_from_being_published_is_by_who_decides_next(
    registry: LocalRegistry,
) -> None:
    canary(registry)
    crashed = Stage(registry)
    crashed.show(canary=0.5)

    class Crash(BaseException):
        pass

    async def crash(_: Sequence[Outgoing]) -> None:
        raise Crash

    crashed.kafka.send = crash  # type: ignore[method-assign]
    with pytest.raises(Crash):
        crashed.look()
    assert (crashed.release.stable, crashed.kafka.sent) == (V2, [])
    after = Stage(registry)
    after.look()
    after.look()
    (decision,) = after.kafka.decisions()
    assert (decision["action"], decision["canary"]) == ("promote", V2)
    assert decision["revision"] == after.release.revision
    assert after.kafka.releases() == [after.release]
    assert after.decided == 0, "it is counted where it was made"


def test_a_decision_is_not_published_again_after_a_day_nor_after_a_person_changed_the_release(
    registry: LocalRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary(registry)
    first = Stage(registry)
    first.show(canary=0.1)
    first.look()
    with monkeypatch.context() as later:
        later.setattr("worker.decider.PUBLISHED_AGAIN_S", 0.0)
        old = Stage(registry)
        old.look()
        assert old.kafka.sent == []
    registry.promote("posts", V1)
    changed = Stage(registry)
    changed.look()
    assert changed.kafka.sent == []


def test_too_little_evidence_decides_nothing_and_is_exported(stage: Stage) -> None:
    stage.show(canary=0.5, count=5)
    before = stage.release
    stage.look()
    assert stage.release == before and stage.kafka.sent == []
    events = total(stage.metrics, "streamrec_trial_evidence", figure="events")
    assert events == PARTITIONS * 2 * 5 * 4


def test_the_tally_of_another_trial_decides_nothing(stage: Stage) -> None:
    stage.show(canary=0.1)
    registry = stage.registry
    registry.change("posts", lambda old: with_canary(old, V2, 0.2, at=now()))
    stage.refresh()
    stage.look()
    assert stage.release.canary is not None and stage.kafka.sent == []


def test_a_canary_that_people_decide_about_is_left_to_them(registry: LocalRegistry) -> None:
    release = canary(registry, auto=False)
    stage = Stage(registry)
    stage.show(canary=0.1)
    stage.look()
    assert stage.release == release and stage.decided == 0
    # Its figures are shown all the same.
    assert samples(stage.metrics, "streamrec_live_quality", role="canary")


def test_a_refused_canary_is_rolled_back_at_once_with_the_reason(registry: LocalRegistry) -> None:
    canary(registry, BROKEN)
    stage = Stage(registry)
    stage.look()
    assert stage.release.canary is None
    assert "model.onnx" in stage.release.quarantined[BROKEN]
    (decision,) = stage.kafka.decisions()
    assert decision["reason"].startswith("gate: refused: ")
    assert total(stage.metrics, "streamrec_decisions_total", reason="refused") == 1


def test_nothing_is_decided_about_a_release_that_is_not_loaded_yet(stage: Stage) -> None:
    stage.show(canary=0.1)
    stage.models.note("posts", with_quarantined(stage.release, STRANGE, "other", at=now()))
    stage.look()
    assert stage.kafka.sent == []
    stage.refresh()
    stage.look()
    assert stage.decided == 1


# -- others who change the release


def test_who_comes_too_late_changes_and_says_nothing(stage: Stage) -> None:
    stage.show(canary=0.5)
    # A person, whose change this worker has not heard of.
    theirs = stage.registry.promote("posts", STRANGE)
    stage.look()
    assert stage.release == theirs
    assert stage.kafka.sent == [] and stage.decided == 0


def test_of_two_deciding_workers_one_decides(registry: LocalRegistry) -> None:
    canary(registry)
    one, other = Stage(registry), Stage(registry)
    for stage in (one, other):
        stage.show(canary=0.1)
    one.look()
    after = one.release
    other.look()
    assert other.release == after
    assert (one.decided, other.decided, other.kafka.sent) == (1, 0, [])


def test_of_a_pushed_release_that_the_registry_lacks_the_decision_is_pushed(
    registry: LocalRegistry,
) -> None:
    before = registry.release("posts")
    stage = Stage(registry)
    stage.models.note("posts", with_canary(before, V2, 0.5, at=now()))
    stage.refresh()
    stage.show(canary=0.1)
    stage.look()
    assert stage.release == before
    (release,) = stage.kafka.releases()
    assert V2 in release.quarantined
    stage.refresh()
    serving = stage.models.serving(POSTS)
    assert serving is not None and serving.rival is None
    stage.look()
    assert stage.decided == 1


def test_in_a_registry_that_cannot_be_written_the_decision_is_pushed(
    registry: LocalRegistry,
) -> None:
    before = canary(registry)
    stage = Stage(ReadOnly(registry.root))
    stage.show(canary=0.5)
    stage.look()
    assert stage.release == before
    (release,) = stage.kafka.releases()
    assert release.stable == V2
    stage.refresh()
    stage.look()
    serving = stage.models.serving(POSTS)
    assert serving is not None and serving.stable.manifest.version == V2
    assert stage.decided == 1


def test_no_decision_outdoes_what_a_person_did_to_a_registry_that_cannot_be_written(
    registry: LocalRegistry,
) -> None:
    canary(registry)
    stage = Stage(ReadOnly(registry.root))
    stage.show(canary=0.5)
    theirs = registry.promote("posts", STRANGE)
    stage.look()
    assert stage.kafka.sent == [] and stage.decided == 0
    stage.refresh()
    serving = stage.models.serving(POSTS)
    assert serving is not None and serving.revision == theirs.revision


def test_with_neither_registry_nor_topic_nothing_is_decided_and_all_hear_of_it(
    registry: LocalRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    canary(registry)
    stage = Stage(ReadOnly(registry.root), releases_topic="")
    stage.show(canary=0.5)
    stage.look()
    assert stage.kafka.sent == [] and stage.decided == 0
    assert "STREAMREC_RELEASES_TOPIC" in caplog.text


@pytest.mark.parametrize("topic", ["releases_topic", "decisions_topic"])
def test_without_a_topic_the_registry_is_changed_all_the_same(
    registry: LocalRegistry, topic: str
) -> None:
    canary(registry)
    stage = Stage(registry, **{topic: ""})
    stage.show(canary=0.5)
    stage.look()
    assert stage.release.stable == V2
    found = len(stage.kafka.releases()), len(stage.kafka.decisions())
    assert found == ((0, 1) if topic == "releases_topic" else (1, 0))


# -- what is away or damaged


def test_while_redis_is_away_nothing_is_decided(stage: Stage) -> None:
    stage.show(canary=0.1)
    stage.redis.away = True
    stage.look()
    assert stage.kafka.sent == []
    assert total(stage.metrics, "streamrec_redis_errors_total", operation="read_tallies") == 1
    stage.redis.away = False
    stage.look()
    assert stage.decided == 1


def test_a_damaged_tally_costs_its_partition_alone(stage: Stage) -> None:
    stage.show(canary=0.1)
    stage.redis.tallies[PartitionKey(POSTS, "user-events", 0)] = b"garbage"
    stage.look()
    (decision,) = stage.kafka.decisions()
    assert decision["figures"]["events"] == (PARTITIONS - 1) * 2 * 200 * 4


def test_a_damaged_release_of_one_model_does_not_stop_the_gate_of_others(
    registry: LocalRegistry,
) -> None:
    tiny_bundle(registry.root / "friends" / V1, seed=1, name="friends", surface="friends")
    tiny_bundle(registry.root / "friends" / V2, seed=2, name="friends", surface="friends")
    registry.promote("friends", V1)
    canary(registry)
    registry.change("friends", lambda old: with_canary(old, V2, 0.5, at=now()))
    both = {
        Surface.POSTS: ModelChoice("posts", None),
        Surface.FRIENDS: ModelChoice("friends", None),
    }
    stage = Stage(registry, models(registry, choices=both))
    for surface in both:
        stage.show(canary=0.1, surface=surface)
    # Whichever comes first.
    first = next(surface for surface in Surface if surface in both)
    other = {"posts": "friends", "friends": "posts"}[first.value]
    (registry.root / first.value / "release.json").write_bytes(b"damaged")
    stage.look()
    release = registry.release(other)
    assert release is not None and release.canary is None
    assert stage.decided == 1


# -- what is exported


def exported(stage: Stage) -> set[tuple[str, str]]:
    return {(labels[1], labels[2]) for labels in samples(stage.metrics, "streamrec_live_quality")}


def test_figures_are_of_the_versions_of_the_present_trial(stage: Stage) -> None:
    stage.show(canary=0.5, count=5)
    stage.look()
    assert exported(stage) == {("stable", f"posts@{V1}"), ("canary", f"posts@{V2}")}
    stage.registry.change("posts", lambda old: canary_promoted(old, at=now()))
    stage.refresh()
    stage.look()
    assert exported(stage) == {("stable", f"posts@{V2}")}
    assert samples(stage.metrics, "streamrec_trial_evidence") == {}


def test_a_new_trial_on_one_surface_leaves_the_figures_of_others(registry: LocalRegistry) -> None:
    tiny_bundle(registry.root / "friends" / V1, seed=1, name="friends", surface="friends")
    registry.promote("friends", V1)
    canary(registry)
    both = {
        Surface.POSTS: ModelChoice("posts", None),
        Surface.FRIENDS: ModelChoice("friends", None),
    }
    stage = Stage(registry, models(registry, choices=both))
    for surface in both:
        stage.show(canary=0.5, count=5, surface=surface)
    stage.look()
    friends = samples(stage.metrics, "streamrec_live_quality", surface="friends")
    assert friends
    registry.change("posts", lambda old: canary_promoted(old, at=now()))
    stage.refresh()
    # Redis fails before the figures of friends are read again.
    stage.decider._export(stage.models.serving(Surface.POSTS), PartitionTally(period=1))
    assert samples(stage.metrics, "streamrec_live_quality", surface="friends") == friends


def test_a_shadows_figures_are_its_own(registry: LocalRegistry) -> None:
    registry.change("posts", lambda old: with_shadow(old, V2, at=now()))
    stage = Stage(registry)
    serving = stage.models.serving(POSTS)
    assert serving is not None
    tally = PartitionTally(period=serving.period, shadow=users(50, 0.5, 0.25))
    place = PartitionKey(POSTS, "user-events", 1)
    stage.redis.tallies[place] = msgspec.msgpack.encode(tally)
    stage.look()

    def estimate(role: str, figure: str) -> list[float]:
        labels = {"role": role, "figure": figure, "bound": "estimate"}
        return list(samples(stage.metrics, "streamrec_live_quality", **labels).values())

    assert estimate("stable", "mrr") == [0.5]
    assert estimate("shadow", "mrr") == [0.25]
    assert estimate("shadow", "hit_rate") == []
    assert stage.decided == 0


def test_who_does_not_decide_exports_nothing(stage: Stage) -> None:
    stage.show(canary=0.5, count=5)
    stage.look()
    stage.decider.rest()
    assert exported(stage) == set()
    stage.look()
    assert exported(stage)


@pytest.mark.parametrize("promoted", [True, False])
def test_without_a_canary_nothing_is_decided(registry: LocalRegistry, promoted: bool) -> None:
    if not promoted:
        (registry.root / "posts" / "release.json").unlink()
        # The newest serves.
        shutil.rmtree(registry.root / "posts" / BROKEN)
    stage = Stage(registry)
    stage.show(canary=0.1)
    stage.look()
    assert stage.kafka.sent == []
