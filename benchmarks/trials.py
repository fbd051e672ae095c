"""Canaries on the MovieLens 100K replay: good ones and spoiled ones, judged by the live stream."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from benchmarks.errors import BenchmarkError
from benchmarks.spoil import Change, copied, off_by_one, permuted, slowed
from worker.demo import Worker
from worker.events import UserEvent
from worker.local.ml100k import load_ml100k
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.local.topics import read_topic
from worker.manifest import MODEL_FILE
from worker.ranking import Recommendations
from worker.registry import LocalRegistry
from worker.release_channel import push_release
from worker.releases import Release, with_canary
from worker.replay import ml100k_events, send_events
from worker.settings import Settings, load_settings

NAME = "posts"
SHARE = 0.5
#: Of the events, before the canary starts.
BEFORE = 0.1
#: Steps of useless work that make a batch of 64 take about ten times as long.
WASTE = 1500
SHIPPED = Path(__file__).parent.parent / "models" / "shipped" / NAME
_GATE_INTERVAL_S, _LOOK_S, _TIMEOUT_S = 0.5, 0.2, 180.0

#: Estimate and bounds by figure, by role.
Quality = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Case:
    """A canary beside the shipped float32 version."""

    title: str
    #: How the source is changed; None: not at all.
    change: Change | None
    #: End of the name of the shipped version that it is made from.
    source: str = "-fp32"
    #: Whether a file is damaged after it was published.
    damaged: bool = False
    #: Whether it is as good: then each `max_loss` is tried, not the first alone.
    good: bool = False
    workers: int = 1


CASES = {
    "good": Case("int8 of the same model", None, source="-int8", good=True),
    "same": Case("A/A: the float32 version again", None, good=True),
    "permuted": Case("rows of the item table in another order", permuted),
    "two-workers": Case("the same, two workers", permuted, workers=2),
    "off-by-one": Case("item map off by one", off_by_one),
    "slow": Case("ten times as slow", slowed(WASTE)),
    "damaged": Case("a file damaged after it was published", None, damaged=True),
}


@dataclass(slots=True)
class Outcome:
    """What became of a canary."""

    case: str
    title: str
    max_loss: float
    action: str = "wait"
    reason: str = ""
    #: From the start of the canary to the decision.
    seconds: float | None = None
    #: Events that were processed meanwhile.
    events: int | None = None
    #: Users who got at least one list of the canary, and all users who got a list meanwhile.
    users: int = 0
    users_in_all: int = 0
    sent: int = 0
    applied: int = 0
    dead_letters: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    #: Estimate and bounds by figure, by `stable` and `canary`: as exported last in the trial.
    quality: Quality = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Events sent that were neither applied nor made dead letters."""
        return self.sent - self.applied - self.dead_letters


def trials_table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Rows of the canaries; the first is the head."""
    rows = [
        [
            "canary", "loss accepted", "decision", "seconds", "events", "judged",
            "users who saw it", "MRR stable", "MRR canary", "hit rate stable", "hit rate canary",
            "latency ratio", "lost", "dead letters",
        ]
    ]  # fmt: skip
    return rows + [_row(outcome) for outcome in outcomes]


def _row(outcome: Outcome) -> list[str]:
    figures = outcome.figures
    reason = outcome.reason.removeprefix("gate: ").partition(":")[0]
    share = outcome.users / outcome.users_in_all if outcome.users_in_all else 0.0
    return [
        outcome.title,
        f"{outcome.max_loss:.0%}",
        f"{outcome.action}: {reason}" if reason else "none",
        "" if outcome.seconds is None else f"{outcome.seconds:.1f}",
        "" if outcome.events is None else f"{outcome.events:,}",
        f"{figures.get('events', 0.0):,.0f}",
        f"{outcome.users:,} of {outcome.users_in_all:,} ({share:.0%})",
        *(
            _bounds(outcome.quality, role, figure)
            for figure in ("mrr", "hit_rate")
            for role in ("stable", "canary")
        ),
        f"{figures['latency_ratio']:.2f}" if figures.get("latencies") else "",
        f"{outcome.lost:,}",
        f"{outcome.dead_letters:,}",
    ]


def _bounds(quality: Quality, role: str, figure: str) -> str:
    found = quality.get(role, {}).get(figure)
    if found is None:
        return ""
    return f"{found['estimate']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def run_cases(
    names: Sequence[str],
    *,
    rate: float,
    max_losses: Sequence[float],
    say: Callable[[str], None] = click.echo,
) -> list[Outcome]:
    """Run cases one after the other, each with broker, Redis and workers of its own.

    Args:
        rate: events/s of the replay.
        max_losses: relative losses that the gate accepts, in turn; spoiled canaries are tried with
            the first alone.
        say: takes lines of progress.

    Raises:
        StreamrecError: a part did not come up, or events stay unprocessed.
    """
    events = list(ml100k_events(load_ml100k()))
    outcomes = []
    for name in names:
        for max_loss in max_losses if CASES[name].good else max_losses[:1]:
            outcome = _run(name, events, rate=rate, max_loss=max_loss)
            say(f"{name}, {max_loss:.0%}: {outcome.action} {outcome.reason[:120]}")
            outcomes.append(outcome)
    return outcomes


def served_between(
    lists: Iterable[Recommendations], begin: datetime, end: datetime | None
) -> list[Recommendations]:
    """Lists made from `begin` on and not after `end` (None: all since)."""
    first = begin.timestamp() * 1000
    last = float("inf") if end is None else end.timestamp() * 1000
    return [made for made in lists if first <= made.generated_at_ms <= last]


def live_quality(samples: Iterable[tuple[str, Mapping[str, str], float]]) -> Quality:
    """What `/metrics` say of both versions of a trial; empty where no canary is judged."""
    found: Quality = {}
    for name, labels, value in samples:
        if name == "streamrec_live_quality":
            figures = found.setdefault(labels["role"], {})
            figures.setdefault(labels["figure"], {})[labels["bound"]] = value
    return found if "canary" in found else {}


class _Workers:
    """All workers of a case, as one."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    def samples(self) -> list[tuple[str, Mapping[str, str], float]]:
        """What `/metrics` of all say."""
        return [sample for worker in self._workers for sample in worker.metrics()]

    def total(self, counter: str, **labels: str) -> float:
        """Sum over all."""
        return sum(worker.total(counter, **labels) for worker in self._workers)

    def done(self) -> int:
        """Events finished, one way or another."""
        return int(self.total("streamrec_events") + self.total("streamrec_dead_letters"))

    def wait_for(self, events: int) -> None:
        """Until so many are finished.

        Raises:
            BenchmarkError: they stay unprocessed.
        """
        deadline = time.monotonic() + _TIMEOUT_S
        while self.done() < events:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self.done():,} of {events:,} events in {_TIMEOUT_S:.0f} s")
            time.sleep(0.1)


def _run(name: str, events: Sequence[UserEvent], *, rate: float, max_loss: float) -> Outcome:
    case = CASES[name]
    directory = Path(tempfile.mkdtemp(prefix="streamrec-trials-"))
    with ExitStack() as parts:
        parts.callback(shutil.rmtree, directory, ignore_errors=True)
        broker, redis = TansuBroker(directory / "broker"), RedisServer(directory / "redis")
        parts.enter_context(broker)
        parts.enter_context(redis)
        registry = LocalRegistry(directory / "registry")
        canary = _publish(case, name, registry)
        settings = load_settings(
            kafka=broker.bootstrap, redis=redis.url, registry=str(registry.root)
        )
        flags = {"gate-interval-s": str(_GATE_INTERVAL_S), "gate-max-loss": str(max_loss)}
        started = []
        for number in range(case.workers):
            place = directory / f"worker-{number}"
            place.mkdir()
            worker = Worker(place, settings, group="trials", flags=flags)
            worker.start()
            parts.callback(worker.stop)
            started.append(worker)
        workers = _Workers(started)
        outcome = Outcome(name, case.title, max_loss, sent=len(events))
        began = asyncio.run(_replay(settings, workers, registry, canary, events, rate, outcome))
        until = asyncio.run(_decided(settings, began, outcome))
        outcome.applied = int(workers.total("streamrec_events", outcome="applied"))
        outcome.dead_letters = int(workers.total("streamrec_dead_letters"))
        served = served_between(asyncio.run(_lists(settings)), began, until)
        reference = f"{NAME}@{canary}"
        outcome.users = len({one.user_id for one in served if one.model_version == reference})
        outcome.users_in_all = len({one.user_id for one in served})
    return outcome


def _publish(case: Case, name: str, registry: LocalRegistry) -> str:
    """Publish and promote the stable version, publish the canary; the canary's version."""
    stable = _shipped("-fp32")
    shutil.copytree(stable, registry.root / NAME / stable.name)
    canary = registry.root / NAME / f"20261127T0000Z-{name}"
    copied(_shipped(case.source), canary, case.change)
    registry.promote(NAME, stable.name)
    if case.damaged:
        with (canary / MODEL_FILE).open("r+b") as file:
            file.seek(1000)
            file.write(b"damage")
    return canary.name


def _shipped(ending: str) -> Path:
    return next(path for path in sorted(SHIPPED.iterdir()) if path.name.endswith(ending))


async def _replay(
    settings: Settings,
    workers: _Workers,
    registry: LocalRegistry,
    version: str,
    events: Sequence[UserEvent],
    rate: float,
    outcome: Outcome,
) -> datetime:
    """Send all events and wait for them; start the canary on the way as `streamrec models canary`
    does, and watch it. When it was started."""

    async def try_it() -> datetime:
        await asyncio.to_thread(workers.wait_for, int(BEFORE * len(events)))
        at, before = datetime.now(UTC), await asyncio.to_thread(workers.done)

        def start(old: Release | None) -> Release:
            return with_canary(old, version, SHARE, by="bench", at=at)

        release = await asyncio.to_thread(registry.change, NAME, start)
        await push_release(settings, NAME, release)
        watching.set_result(asyncio.create_task(watch(before)))
        return at

    async def watch(before: int) -> None:
        while not await asyncio.to_thread(workers.total, "streamrec_decisions"):
            samples = await asyncio.to_thread(workers.samples)
            outcome.quality = live_quality(samples) or outcome.quality
            outcome.figures = {
                labels["figure"]: value
                for name, labels, value in samples
                if name == "streamrec_trial_evidence"
            }
            await asyncio.sleep(_LOOK_S)
        outcome.events = await asyncio.to_thread(workers.done) - before

    watching: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()
    trying = asyncio.create_task(try_it())
    await send_events(settings, iter(events), rate=rate)
    await asyncio.to_thread(workers.wait_for, len(events))
    # The gate looks once more at all that there is.
    await asyncio.sleep(4 * _GATE_INTERVAL_S)
    began, task = await trying, await watching
    task.cancel()
    # Raises what went wrong in it.
    with suppress(asyncio.CancelledError):
        await task
    return began


async def _decided(settings: Settings, began: datetime, outcome: Outcome) -> datetime | None:
    """Take in the decision that was published; when it was made, None without one."""
    published = await read_topic(settings.kafka, settings.decisions_topic, partitions=1)
    if not published:
        return None
    decision: dict[str, Any] = msgspec.json.decode(published[0].value)
    until = datetime.fromisoformat(decision["decided_at"])
    outcome.action, outcome.reason = decision["action"], decision["reason"]
    outcome.seconds = (until - began).total_seconds()
    outcome.figures = decision["figures"]
    return until


async def _lists(settings: Settings) -> list[Recommendations]:
    """All that were published."""
    decode = msgspec.json.Decoder(Recommendations).decode
    records = await read_topic(
        settings.kafka, settings.recommendations_topic, partitions=settings.topic_partitions
    )
    return [decode(record.value) for record in records]
