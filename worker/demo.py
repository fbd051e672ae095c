"""`streamrec demo`: everything on this machine, on real events, with a summary at the end."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from worker.bundle import open_bundle
from worker.bundle_files import read_manifest
from worker.errors import LocalPartError
from worker.events import Surface, UserEvent
from worker.local.kafka import KafkaBroker
from worker.local.ml100k import Ml100k, load_ml100k
from worker.local.plain_loop import run_plain_loop
from worker.local.process import ManagedProcess, free_port
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.local.topics import read_topic
from worker.lookup import cached_recommendations
from worker.ranking import Recommendations
from worker.registry import LocalRegistry
from worker.releases import with_canary
from worker.replay import ml100k_events, send_events
from worker.samples import Samples
from worker.settings import Settings, load_settings

NAME = "posts"
#: Events a second of the paced replay: about what one worker on half of two cores takes with ease.
PACED_RATE = 2500.0
#: Events that the plain loop is timed on; it is slow, and its rate does not change with more.
PLAIN_LOOP_EVENTS = 10_000


#: A canary starts after this share of the events, for this share of the users.
CANARY_FROM, CANARY_SHARE = 0.1, 0.5
#: Fewer users than a gate is meant for: let it decide by a larger loss, and look often.
CANARY_FLAGS = {"gate-max-loss": "0.2", "gate-interval-s": "0.5"}


def run_demo(
    *,
    events: int | None,
    keep: bool,
    canary: bool,
    real_kafka: bool,
    compare: bool,
    show_user: str | None,
) -> int:
    """Run the demo; returns the exit code.

    Args:
        canary: let users' behaviour decide about the small version, instead of promoting it.

    Raises:
        StreamrecError: a part did not come up, or the data set cannot be fetched.
    """
    directory = Path(tempfile.mkdtemp(prefix="streamrec-demo-"))
    # As Ctrl-C: what was started ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as parts:
        parts.push(_removes(directory))
        click.echo("fetching MovieLens 100K (once) and starting broker, Redis and worker ...")
        data = load_ml100k()
        broker = (KafkaBroker if real_kafka else TansuBroker)(directory / "broker")
        redis = RedisServer(directory / "redis")
        for part in (broker, redis):
            parts.enter_context(part)
        registry = _copy_registry(directory / "registry")
        fp32, small = _fp32_and_smallest(registry)
        LocalRegistry(registry).promote(NAME, fp32)
        settings = load_settings(
            kafka=broker.bootstrap, redis=redis.url, registry=str(registry), create_topics=True
        )
        worker = Worker(directory, settings, group="streamrec-demo", flags=CANARY_FLAGS)
        parts.callback(worker.stop)
        worker.start()
        click.echo(f"the worker says what it does at {worker.base}/")
        replay = list(ml100k_events(data))[:events]
        swap = asyncio.run(_replay_and_swap(settings, worker, replay, registry, small, canary))
        served = asyncio.run(_read_served(settings))
        rows = [
            ("events", f"{len(replay):,}"),
            ("dead letters", f"{worker.total('streamrec_dead_letters'):.0f}"),
            ("paced replay", f"{swap.rate:,.0f} events/s"),
            ("event read -> Redis", _latency(worker.samples())),
            *_swap_rows(swap, fp32, small, canary),
            ("model on disk", f"{_mb(swap.disk_before)} -> {_mb(swap.disk_after)}"),
            ("model in memory", f"{_mb(swap.memory_before)} -> {_mb(swap.memory_after)}"
             " (growth of resident memory by loading and warming up)"),
            *_hit_rates(replay, served),
        ]  # fmt: skip
        if compare:
            # Stopped, so as not to share the processors with what is timed.
            worker.stop()
            rows += _compare(directory, settings, len(replay), small)
            if keep:
                worker.start()
        click.echo("\n" + "\n".join(f"  {name:<22} {value}" for name, value in rows))
        user = show_user or replay[-1].user_id
        _show_user(settings, replay, data, user)
        if keep:
            _wait_until_stopped(broker.bootstrap, redis.url, worker)
    return 0


def _removes(directory: Path) -> Callable[..., None]:
    """An exit callback; after an error it leaves the directory: the error names logs in it."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, Exception):
            shutil.rmtree(directory, ignore_errors=True)

    return leave


class Worker:
    """A worker process of the demo and what it says of itself.

    Args:
        flags: further settings.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        *,
        group: str,
        flags: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        own = {
            "kafka": settings.kafka,
            "redis": settings.redis.get_secret_value(),
            "registry": str(settings.registry),
            "models": f"posts={NAME}",
            "group": group,
            "create-topics": "true",
            "http-port": str(self.port),
            "registry-poll-s": "0.2",
            # A lone worker waits about half of this on the embedded broker before it may start.
            "rebalance-timeout-s": "6",
            "session-timeout-s": "10",
            # It holds each fetch for so long, whatever comes in meanwhile.
            "fetch-wait-ms": "5",
            **(flags or {}),
        }
        arguments = [part for name, value in own.items() for part in (f"--{name}", value)]
        self._process = ManagedProcess(
            "the worker",
            [sys.executable, "-m", "worker.cli", "worker", *arguments],
            log_path=directory / f"{group}.log",
            ready=self._ready,
            stop_s=30.0,
        )

    def start(self) -> None:
        """Start it and wait until `/readyz` says so."""
        self._process.start()

    def stop(self) -> None:
        """Stop it in order."""
        self._process.stop()

    def metrics(self) -> list[tuple[str, Mapping[str, str], float]]:
        """All samples of `/metrics`: name, labels, value."""
        with urllib.request.urlopen(f"{self.base}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return [
            (sample.name, sample.labels, float(sample.value))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def samples(self) -> Samples:
        """The same, to be asked for sums and quantiles."""
        return Samples(self.metrics())

    def total(self, metric: str, **labels: str) -> float:
        """Sum of a metric over all series that have `labels`."""
        return self.samples().total(metric, **labels)

    def wait_for_events(self, count: int, timeout_s: float = 600.0) -> None:
        """Wait until `count` events were written to Redis and Kafka."""
        deadline = time.monotonic() + timeout_s
        while self.total("streamrec_event_seconds_count") < count:
            if time.monotonic() > deadline:
                raise LocalPartError(
                    f"the worker did not process {count} events in {timeout_s:.0f} s; its log is"
                    f" {self._process.log_path}"
                )
            time.sleep(0.05)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False


@dataclass
class Swap:
    """What the replay and the swap in its middle measured. Sizes in bytes."""

    rate: float = 0.0
    #: Events that were processed when a canary began, and when the small version served all users;
    #: None where it never did.
    canary_after: int = 0
    swapped_after: int | None = None
    #: Of the gate: `promote` or `rollback`, and why.
    decision: str = ""
    disk_before: float = 0.0
    disk_after: float = 0.0
    memory_before: float = 0.0
    memory_after: float = 0.0


async def _replay_and_swap(
    settings: Settings,
    worker: Worker,
    events: list[UserEvent],
    registry: Path,
    small: str,
    canary: bool,
) -> Swap:
    from tqdm import tqdm  # noqa: PLC0415 - of the demo extra

    swap = Swap()
    swap.disk_before = worker.total("streamrec_model_file_bytes")
    swap.memory_before = worker.total("streamrec_model_memory_bytes")

    async def total(metric: str, **labels: str) -> int:
        return int(await asyncio.to_thread(worker.total, metric, **labels))

    async def swap_halfway() -> None:
        # The replay goes on meanwhile: this is a hot swap.
        while await total("streamrec_events") < len(events) // 2:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(LocalRegistry(registry).promote, NAME, small)
        while not await total("streamrec_model_info", version=small):
            await asyncio.sleep(0.05)
        swap.swapped_after = await total("streamrec_events")

    async def try_canary() -> None:
        while await total("streamrec_events") < len(events) * CANARY_FROM:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(
            LocalRegistry(registry).change,
            NAME,
            lambda old: with_canary(old, small, CANARY_SHARE, by="demo", at=datetime.now(UTC)),
        )
        swap.canary_after = await total("streamrec_events")
        # Until it is decided, or there is nothing more to decide by.
        while swap.swapped_after is None and not swap.decision:
            done = await total("streamrec_events")
            samples = await asyncio.to_thread(worker.samples)
            if samples.total("streamrec_model_info", version=small, role="stable"):
                swap.swapped_after = done
            for labels, value in samples.series("streamrec_decisions"):
                if value:
                    swap.decision = f"{labels['action']}: {labels['reason']}"
            if done >= len(events):
                return
            await asyncio.sleep(0.2)

    started = time.monotonic()
    with tqdm(total=len(events), unit=" events", desc="replaying", disable=None) as progress:
        swapping = asyncio.create_task(try_canary() if canary else swap_halfway())
        await send_events(settings, iter(events), rate=PACED_RATE, on_sent=progress.update)
        await asyncio.to_thread(worker.wait_for_events, len(events))
        swap.rate = len(events) / (time.monotonic() - started)
        await swapping
    swap.disk_after = worker.total("streamrec_model_file_bytes")
    swap.memory_after = worker.total("streamrec_model_memory_bytes")
    return swap


async def _read_served(settings: Settings) -> list[Recommendations]:
    """All published recommendations."""
    decode = msgspec.json.Decoder(Recommendations).decode
    records = await read_topic(
        settings.kafka, settings.recommendations_topic, partitions=settings.topic_partitions
    )
    return [decode(record.value) for record in records]


def _hit_rates(replay: list[UserEvent], served: list[Recommendations]) -> Iterator[tuple[str, str]]:
    """How often a served list held the item of the user's next event.

    A user's events are one partition's, in order, so the n-th event of a user and the list made
    from it are matched by counting the user's offsets.
    """
    sequences: dict[str, list[tuple[int, str]]] = {}
    for number, event in enumerate(replay):
        sequences.setdefault(event.user_id, []).append((number, event.item_id))
    # Offsets of a partition in order are the replay's events of its users in order.
    users_of: dict[int, set[str]] = {}
    for made in served:
        users_of.setdefault(made.origin.partition, set()).add(made.user_id)
    place: dict[tuple[int, int], int] = {}
    for partition, users in users_of.items():
        numbers = sorted(number for user in users for number, _ in sequences[user])
        for offset, number in enumerate(numbers):
            place[partition, offset] = number
    counted: dict[str, list[int]] = {"model": [0, 0], "fallback": [0, 0], "unseen": [0, 0]}
    unseen_from = int(100_000 * 0.8)
    for made in served:
        caused_by = place.get((made.origin.partition, made.origin.offset))
        if caused_by is None:
            continue
        following = [item for at, item in sequences[made.user_id] if at > caused_by]
        if not following:
            continue
        hit = following[0] in made.items
        for group in (made.source, *(("unseen",) if caused_by >= unseen_from else ())):
            counted[group][0] += hit
            counted[group][1] += 1
    for group, title in (
        ("model", "hit rate@10, model"),
        ("fallback", "hit rate@10, fallback"),
        ("unseen", "  of these, unseen"),
    ):
        hits, asked = counted[group]
        if asked:
            note = " (events after the model's training data ends)" if group == "unseen" else ""
            yield (
                title,
                f"{hits / asked:.3f} of {asked:,} lists against the user's next event{note}",
            )


def time_backlog(
    directory: Path, settings: Settings, version: str, *, count: int, plain_events: int, tag: str
) -> tuple[float, float]:
    """Time a worker, then the plain loop, on the `count` events that lie in the topic.

    Args:
        version: of the model `NAME`, for the plain loop; the worker's is what the registry says.
        plain_events: the plain loop takes only so many.
        tag: tells this run's consumer groups and files from others'.

    Returns:
        Events a second of the worker and of the plain loop.
    """
    # A Redis of its own: histories of a run before would make every event a repeat.
    redis = RedisServer(directory / f"redis-{tag}")
    with redis:
        own = settings.model_copy(update={"redis": type(settings.redis)(redis.url)})
        worker = Worker(directory, own, group=f"streamrec-{tag}")
        worker.start()
        try:
            worker.wait_for_events(count)
            seconds = worker.total("streamrec_busy_seconds")
        finally:
            worker.stop()
        bundle = open_bundle(LocalRegistry(Path(settings.registry)).path(NAME, version))
        plain = asyncio.run(
            run_plain_loop(own, bundle, limit=min(plain_events, count), group=f"plain-{tag}")
        )
    return count / seconds, plain.rate


def _compare(
    directory: Path, settings: Settings, count: int, version: str
) -> list[tuple[str, str]]:
    """Rows for the summary: full speed, and the plain loop beside it."""
    click.echo("timing the worker on the whole backlog, then a plain aiokafka loop ...")
    ours, plain = time_backlog(
        directory, settings, version, count=count, plain_events=PLAIN_LOOP_EVENTS, tag="compare"
    )
    return [
        ("full speed", f"{ours:,.0f} events/s"),
        (
            "plain aiokafka loop",
            f"{plain:,.0f} events/s, one event at a time: {ours / plain:.1f}x slower",
        ),
    ]


def _swap_rows(swap: Swap, fp32: str, small: str, canary: bool) -> Iterator[tuple[str, str]]:
    """What became of the small version."""
    if canary:
        yield "canary", f"{small}, {CANARY_SHARE:.0%} of users, after {swap.canary_after:,} events"
        yield "the gate", swap.decision or "undecided when the events ended"
    if swap.swapped_after is not None:
        yield "hot swap", f"{fp32} -> {small} after {swap.swapped_after:,} events"


def _latency(samples: Samples) -> str:
    """Quantiles of `streamrec_event_seconds`, interpolated within buckets as Prometheus does."""
    buckets = samples.buckets("streamrec_event_seconds")
    return ", ".join(
        f"p{share * 100:.0f} {(buckets.quantile(share) or 0.0) * 1000:.1f} ms"
        for share in (0.5, 0.95, 0.99)
    )


def _show_user(settings: Settings, replay: list[UserEvent], data: Ml100k, user: str) -> None:
    found = cached_recommendations(settings, user, Surface.POSTS.value)
    history = [event.item_id for event in replay if event.user_id == user]
    click.echo(f"\nuser {user} last rated")
    for item in history[-5:]:
        click.echo(f"  {data.titles.get(item, item)}")
    if found is None:
        click.echo("and has no recommendations: there was no event of theirs")
        return
    click.echo(f"and is recommended, by {found['model_version']}")
    for item, score in zip(found["items"], found["scores"], strict=True):
        click.echo(f"  {score:7.2f}  {data.titles.get(item, item)}")


def _wait_until_stopped(bootstrap: str, redis_url: str, worker: Worker) -> None:
    click.echo(
        f"\nstill running until Ctrl-C:\n  Kafka    {bootstrap}\n  Redis    {redis_url}\n"
        f"  status   {worker.base}/\n"
        f"  metrics  {worker.base}/metrics, /livez, /readyz\n"
        f"  try      {sys.argv[0]} recommend 13 --redis {redis_url}"
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        signal.pause()
    except KeyboardInterrupt:
        click.echo("stopping")


def _copy_registry(target: Path) -> Path:
    source = Path(load_settings().registry)
    if not source.is_dir():
        # Installed from a wheel, or started elsewhere: the bundles lie beside the package.
        source = Path(__file__).parent.parent / "models" / "shipped"
    shutil.copytree(source, target)
    return target


def _fp32_and_smallest(registry: Path) -> tuple[str, str]:
    """The float32 version, and the most compressed one made from it."""
    found = LocalRegistry(registry).versions(NAME)
    fp32 = next(version for version in reversed(found) if version.endswith("fp32"))
    return fp32, min(found, key=lambda version: _size(registry / NAME / version))


def _size(bundle: Path) -> int:
    return sum(file.bytes for file in read_manifest(bundle).files.values())


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f} MB"
