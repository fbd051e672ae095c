"""Hours in minutes: a worker at a share of its full speed, watched; at the end every event is
accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from benchmarks.errors import BenchmarkError
from benchmarks.load import Paced
from benchmarks.measure import Session, Setup, warm_up
from benchmarks.peers import CASES, OURS
from benchmarks.schedule import Latency, latency
from benchmarks.stage import HISTORY_LENGTH, Stage
from benchmarks.subject import WorkerSubject
from benchmarks.system import describe
from benchmarks.workloads import WorkloadSpec, expected_items, known_items, workload
from worker.cache import UserKey, history_key
from worker.events import Surface
from worker.history import History

_INTERVAL_S = 10.0
_SAMPLED_USERS = 50
_PROBES_PER_S = 50.0
_GRACE_S = 30.0
#: What still counts as flat: memory that grows less than this share of itself an hour.
_FLAT_SHARE = 0.05
#: A lag that grows by less than this many seconds of the load an hour does not grow.
_FLAT_LAG_S = 1.0


@dataclass(frozen=True)
class Sample:
    """The worker at one time. Seconds since the load began, bytes, events."""

    at_s: float
    rss: int
    pss: int
    lag: int
    events: int
    gc_collections: float
    #: Of the probes due since the sample before, in milliseconds; None where there was none.
    p99_ms: float | None = None


@dataclass(frozen=True)
class Accounts:
    """What became of the events that were sent."""

    produced: int
    applied: int
    duplicate: int
    late: int
    failed: int
    dead_letters: int
    #: Sum over partitions of what is not committed.
    uncommitted: int
    unanswered_probes: int
    #: Users whose stored history was compared with what they were sent, and how many differ.
    histories: int
    histories_wrong: int

    @property
    def lost(self) -> int:
        """Events sent that the worker never counted; negative where it counted some twice."""
        return self.produced - self.applied - self.duplicate - self.late - self.dead_letters

    @property
    def balanced(self) -> bool:
        """Whether everything is where it should be."""
        return not (
            self.lost
            or self.failed
            or self.uncommitted
            or self.unanswered_probes
            or self.histories_wrong
        )

    @property
    def words(self) -> str:
        """In one line."""
        return (
            f"{self.produced:,} events sent: {self.applied:,} applied, {self.duplicate:,}"
            f" duplicate, {self.late:,} late, {self.failed:,} failed, {self.dead_letters:,} dead"
            f" letters; lost {self.lost:,}, uncommitted {self.uncommitted:,},"
            f" {self.unanswered_probes:,} probes unanswered,"
            f" {self.histories_wrong} of {self.histories} sampled histories wrong"
        )


@dataclass
class SoakResults:
    """One invocation."""

    started_at: str
    machine: dict[str, Any]
    broker: str
    model: str
    full_rate: float
    load: float
    rate: float
    minutes: float
    samples: list[Sample] = field(default_factory=list)
    latency: Latency | None = None
    accounts: Accounts | None = None
    foreign_cpus: float = 0.0


def soak(
    setup: Setup,
    stage: Stage,
    *,
    minutes: float,
    load: float,
    rate: float | None,
    progress: Callable[[str], None],
) -> SoakResults:
    """Run one.

    Args:
        load: share of the full speed that is measured first.
        rate: events a second instead; None for that share.
    """
    users = sampled_users(setup.spec)
    with ExitStack() as parts:
        warm_up(setup, stage, progress)
        session = Session(CASES[OURS], setup, stage, parts)
        subject = session.subject
        assert isinstance(subject, WorkerSubject)
        session.start(frozenset(users))
        full = session.full_speed(5.0, 1_000_000)
        chosen = load * full.rate if rate is None else rate
        progress(f"full speed {full.rate:,.0f} events/s; {chosen:,.0f}/s for {minutes:g} minutes")
        results = SoakResults(
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=describe(stage.cpus, stage.broker_name),
            broker=stage.broker_name,
            model=f"{setup.bundle.parent.name}@{setup.bundle.name}",
            full_rate=full.rate,
            load=chosen / full.rate,
            rate=chosen,
            minutes=minutes,
        )
        pace = session.new_pace(chosen, 60.0 * minutes, _PROBES_PER_S)
        watch = _Watch(subject, results.samples, progress)
        meter = session.meter()
        sent = stage.generator.paced(Paced(session.topics.events, pace), watch.look)
        results.foreign_cpus = meter.read().foreign
        session.sent += sent.events
        due = {probe: sent.started_at + at for probe, at in pace.probe_due_s().items()}
        seen = stage.observer.wait(due, _GRACE_S)
        results.latency = latency(due, seen)
        results.samples[:] = _with_latency(results.samples, watch.started, due, seen)
        results.accounts = account(session, subject, results.latency.unanswered, users)
    return results


class _Watch:
    """Takes a sample every so often."""

    def __init__(
        self, subject: WorkerSubject, samples: list[Sample], progress: Callable[[str], None]
    ) -> None:
        self._subject, self._samples, self._progress = subject, samples, progress
        self.started = time.monotonic()

    def look(self) -> None:
        at = time.monotonic() - self.started
        if at < _INTERVAL_S * (len(self._samples) + 1):
            return
        self._subject.check()
        pss, rss = self._subject.look_at_memory()
        found = self._subject.samples()
        sample = Sample(
            at_s=at,
            rss=rss,
            pss=pss,
            lag=int(sum(v for name, _, v in found if name == "streamrec_consumer_lag_events")),
            events=int(sum(v for name, _, v in found if name == "streamrec_events_total")),
            gc_collections=sum(v for name, _, v in found if name == "python_gc_collections_total"),
        )
        self._samples.append(sample)
        self._progress(
            f"[{at:5.0f} s] {sample.events:,} events, PSS {pss / 1e6:.1f} MB, lag {sample.lag:,}"
        )


def _with_latency(
    samples: Sequence[Sample], started: float, due: dict[int, float], seen: dict[int, float]
) -> list[Sample]:
    """`samples` with the latency of the probes that were due before each."""
    found, since = [], 0.0
    for sample in samples:
        within = {p: at for p, at in due.items() if since <= at - started < sample.at_s}
        since = sample.at_s
        made = latency(within, seen) if within else None
        found.append(
            Sample(
                sample.at_s,
                sample.rss,
                sample.pss,
                sample.lag,
                sample.events,
                sample.gc_collections,
                None if made is None or made.unanswered == made.probes else made.p99,
            )
        )
    return found


def sampled_users(spec: WorkloadSpec) -> list[str]:
    """Users, busy ones and others, whose histories are looked at in the end."""
    step = max(1, spec.users // _SAMPLED_USERS)
    return [f"user-{number}" for number in range(0, spec.users, step)][:_SAMPLED_USERS]


def account(
    session: Session, subject: WorkerSubject, unanswered: int, users: Sequence[str]
) -> Accounts:
    """What became of all that was sent; `unanswered` probes, histories of `users` compared."""
    deadline = time.monotonic() + _GRACE_S
    while (uncommitted := session.uncommitted()) and time.monotonic() < deadline:
        time.sleep(1.0)

    def outcome(name: str) -> int:
        return int(subject.total("streamrec_events_total", outcome=name))

    wrong = histories_wrong(session, users)
    return Accounts(
        produced=session.sent,
        applied=outcome("applied"),
        duplicate=outcome("duplicate"),
        late=outcome("late"),
        failed=outcome("failed"),
        dead_letters=int(subject.total("streamrec_dead_letters_total")),
        uncommitted=uncommitted,
        unanswered_probes=unanswered,
        histories=len(users),
        histories_wrong=len(wrong),
    )


def histories_wrong(session: Session, users: Sequence[str]) -> list[str]:
    """Those of `users` whose history in Redis is not what they were sent."""
    spec = session.spec
    before = {
        user: known_items(spec.items, indexes)
        for user, indexes in workload(spec).histories()
        if user in set(users)
    }
    sent = session.tracked()
    wrong = []
    with Redis.from_url(session.redis.url) as client:
        for user in users:
            data = client.get(history_key(UserKey(user, Surface.POSTS)))
            stored = [] if data is None else History.from_bytes(bytes(data), HISTORY_LENGTH).items
            if list(stored) != expected_items(
                before.get(user, []), sent.get(user, []), HISTORY_LENGTH
            ):
                wrong.append(user)
    return wrong


def slope_per_hour(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    """Theil-Sen slope over the second half: the median of all pairs' slopes, so that single
    outliers change nothing.

    Raises:
        BenchmarkError: there are too few samples.
    """
    from scipy.stats import theilslopes  # noqa: PLC0415 - slow to import

    half = [sample for sample in samples if sample.at_s >= samples[-1].at_s / 2]
    if len(half) < 3:
        raise BenchmarkError("too few samples for a slope; soak for longer (--minutes)")
    slope = theilslopes([value(s) for s in half], [s.at_s for s in half]).slope
    return float(slope) * 3600.0


def verdicts(results: SoakResults) -> list[tuple[bool, str]]:
    """Whether memory and lag stayed flat and nothing was lost, in words."""
    assert results.accounts is not None and results.latency is not None
    found = []
    for name, value in (("RSS", lambda s: s.rss / 1e6), ("PSS", lambda s: s.pss / 1e6)):
        slope = slope_per_hour(results.samples, value)
        last = value(results.samples[-1])
        found.append(
            (
                slope <= _FLAT_SHARE * last,
                f"{name} {last:.1f} MB, changing by {slope:+.2f} MB an hour (second half)",
            )
        )
    lag = slope_per_hour(results.samples, lambda s: float(s.lag))
    found.append(
        (
            lag <= _FLAT_LAG_S * results.rate,
            f"lag {results.samples[-1].lag:,} events, changing by {lag:+,.0f} an hour",
        )
    )
    found.append((results.accounts.balanced, results.accounts.words))
    return found


def soak_report(results: SoakResults) -> str:
    """Everything, for a terminal."""
    made = results.latency
    assert made is not None
    lines = [
        f"{results.minutes:g} minutes at {results.rate:,.0f} events/s, {results.load:.0%} of"
        f" {results.full_rate:,.0f}; broker {results.broker}",
        f"latency p50 {made.p50:.1f} ms, p99 {made.p99:.1f} ms, p99.9 {made.p999:.1f} ms,"
        f" most {made.max:.1f} ms ({made.probes:,} probes)",
        *(f"{'ok  ' if good else 'NOT '} {words}" for good, words in verdicts(results)),
    ]
    if results.foreign_cpus > 0.05:
        lines.append(f"mind: other processes used {results.foreign_cpus:.2f} CPUs meanwhile")
    return "\n".join(lines)
