"""One system, measured once: full speed on a backlog, then latency at steady rates.

Full speed: the system is up, has its partitions and has already served some thousand events. It is
stopped (SIGSTOP), the backlog is put into the topic with a probe as the last event of each
partition, and it is let go. The time ends when the last probe's list appears in Redis; where
nothing is written to Redis, when the system has counted the last event.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases.common import CaseConfig
from benchmarks.errors import BenchmarkError
from benchmarks.load import Backlog, Paced
from benchmarks.peers import CASES, OURS, Case
from benchmarks.schedule import Latency, Pace, latency
from benchmarks.stage import HISTORY_LENGTH, Stage, Topics
from benchmarks.subject import CaseSubject, Subject, WorkerSubject
from benchmarks.system import Meter, Usage
from benchmarks.workloads import WorkloadSpec
from worker.local.redis_server import RedisServer

#: The least of processor time that the system counts, usually.
_TICK_S = 0.01
#: Events before the first timing; also what shows that the system is up.
_FIRST = 500
_START_S = 120.0
#: A steady rate's last lists may take this long beyond the last event.
_GRACE_S = 20.0
#: The broker is warm when a window takes it more than this share of the one before.
_WARM, _WARM_S, _WARM_WINDOWS, _WARM_RATE = 0.95, 5.0, 12, 4000.0
#: A process that is stopped while the topic is filled must keep its partitions. A lone member waits
#: about half of it on the embedded broker, before it may start.
_SESSION_S = {"kafka": 30, "tansu": 10}
#: How near to the wanted time a backlog must come, and how fast it may grow towards it.
_ENOUGH, _GROWTH = 0.7, 20.0


@dataclass(frozen=True)
class Effort:
    """How long to measure. Seconds, events a second."""

    seconds: float = 4.0
    #: Of cases that read or score only.
    raw_seconds: float = 2.0
    max_backlog: int = 1_000_000
    latency_seconds: float = 4.0
    #: Shares of the system's own full speed.
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    #: A rate for all; None for none.
    common_rate: float | None = 1000.0
    probes_per_s: float = 250.0


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Args:
        bundle: absolute path, `<registry>/<name>/<version>`.
        known_users: only so many users have a history beforehand; all where None.
        flags: of `streamrec worker`.
    """

    spec: WorkloadSpec
    bundle: Path
    partitions: int = 4
    workers: int = 1
    known_users: int | None = None
    flags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FullSpeed:
    """A backlog served, in seconds. `usage.cpu_s` is of `sut`, `broker`, `redis` and `harness`."""

    events: int
    seconds: float
    usage: Usage

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds

    def cpu_s_per_million(self, part: str = "sut") -> float:
        """Processor seconds of a part per million events, as fine as the system counts."""
        return 1e6 * max(self.usage.cpu_s[part], _TICK_S) / self.events


@dataclass(frozen=True)
class Steady:
    """Latency at a steady rate; `share` is of full speed, None at the common rate."""

    share: float | None
    rate: float
    events: int
    latency: Latency
    usage: Usage
    #: How late the generator itself was: 99th percentile and most.
    sender_late_ms: tuple[float, float]


@dataclass(frozen=True)
class Run:
    """All of one system in one round. Bytes. `sent` and `done` are events, and should be equal."""

    case: str
    full: FullSpeed
    steady: tuple[Steady, ...]
    peak_pss: int
    peak_rss: int
    sent: int
    done: int


Progress = Callable[[str], None]


def measure(
    case: Case, setup: Setup, stage: Stage, effort: Effort, progress: Progress = lambda _: None
) -> Run:
    """Start `case` on the stage, measure it, stop it.

    Raises:
        NotInstallableError: it cannot run here.
        BenchmarkError: it ended, or did not serve what it was sent.
    """
    with ExitStack() as parts:
        session = Session(case, setup, stage, parts)
        if case.level == "scoring":
            full = session.scoring(effort.raw_seconds)
            return session.run(full, ())
        session.start()
        whole = case.level == "whole"
        full = session.full_speed(
            effort.seconds if whole else effort.raw_seconds, effort.max_backlog
        )
        progress(f"{case.name}: {full.rate:,.0f} events/s")
        steady: list[Steady] = []
        if whole:
            rates: list[tuple[float | None, float]] = [(s, s * full.rate) for s in effort.shares]
            if effort.common_rate is not None:
                rates.append((None, effort.common_rate))
            for share, rate in rates:
                steady.append(
                    session.steady(share, rate, effort.latency_seconds, effort.probes_per_s)
                )
                progress(f"{case.name}: {described(steady[-1])}")
        return session.run(full, tuple(steady))


def warm_up(setup: Setup, stage: Stage, progress: Progress = lambda _: None) -> None:
    """Let the worker serve for a while: a JVM compiles what is used, and takes half a minute to.

    Without it the first systems on the stage have the latency of a cold broker, whose compiler
    takes most of a core. It ends when the broker's processor time at a steady rate falls no more.
    """
    if stage.broker_name != "kafka":
        return
    with ExitStack() as parts:
        session = Session(CASES[OURS], setup, stage, parts)
        session.start()
        rate = min(_WARM_RATE, 0.5 * session.full_speed(1.0, 100_000).rate)
        before = float("inf")
        for number in range(1, _WARM_WINDOWS + 1):
            now = session.steady(None, rate, _WARM_S, 1.0).usage.cpu_s["broker"]
            progress(f"broker, {_WARM_S:.0f} s at {rate:,.0f} events/s: {now:.2f} s of processor")
            if number > 3 and now > _WARM * before:
                return
            before = now


def described(steady: Steady) -> str:
    """In one line."""
    share = "" if steady.share is None else f" ({steady.share:.0%})"
    made = steady.latency
    lost = f", {made.unanswered} unanswered" if made.unanswered else ""
    return f"at {steady.rate:,.0f}/s{share} p50 {made.p50:.1f} ms, p99 {made.p99:.1f} ms{lost}"


class Session:
    """One started system and what it was sent."""

    def __init__(self, case: Case, setup: Setup, stage: Stage, parts: ExitStack) -> None:
        self._case, self._stage = case, stage
        self.topics: Topics = parts.enter_context(stage.topics(setup.partitions))
        self.redis: RedisServer = parts.enter_context(stage.redis(setup.spec, setup.known_users))
        place = stage.directory / self.topics.events.removesuffix(".events")
        place.mkdir()
        self.config = CaseConfig(
            bootstrap=stage.broker.bootstrap,
            topic=self.topics.events,
            group=place.name,
            redis=self.redis.url,
            bundle=str(setup.bundle),
            progress=str(place / "progress"),
            histories=str(stage.histories_file(setup.spec, setup.known_users)),
            history_length=HISTORY_LENGTH,
            session_s=_SESSION_S[stage.broker_name],
        )
        self.spec = setup.spec
        cpus = stage.cpus.sut
        self.subject: Subject = (
            CaseSubject(case, self.config, cpus, place)
            if case.module
            else WorkerSubject(
                self.config, self.topics, cpus, place, flags=setup.flags, workers=setup.workers
            )
        )
        self._parts = parts
        self._next_probe = 0
        self.sent = 0

    def start(self, tracked: frozenset[str] = frozenset()) -> None:
        """Start it on a first backlog, and wait until that is served."""
        self._stage.generator.start_stream(self.spec, tracked)
        last = self.fill(_FIRST)
        self._parts.enter_context(self.subject)
        self.wait(last, _START_S)
        self.subject.wait_for_partitions(_START_S)

    def full_speed(self, seconds: float, most: int) -> FullSpeed:
        """Time a backlog of about `seconds`, after smaller ones to find its size."""
        count = _FIRST
        while True:
            found = self._time_backlog(count)
            if found.seconds >= _ENOUGH * seconds or count >= most:
                return found
            growth = min(_GROWTH, max(1.5, 1.1 * seconds / found.seconds))
            count = min(most, int(count * growth))

    def steady(
        self, share: float | None, rate: float, seconds: float, probes_per_s: float
    ) -> Steady:
        """Send at `rate` for `seconds`, and see when probes are served."""
        pace = self.new_pace(rate, seconds, probes_per_s)
        meter = self.meter()
        sent = self._stage.generator.paced(Paced(self.topics.events, pace), self.subject.check)
        self.sent += sent.events
        due = {probe: sent.started_at + at for probe, at in pace.probe_due_s().items()}
        seen = self._stage.observer.wait(due, _GRACE_S)
        usage = meter.read()
        # Not while latency is measured: to be looked at holds a process up for some milliseconds.
        self.subject.look_at_memory()
        return Steady(
            share,
            rate,
            sent.events,
            latency(due, seen),
            usage,
            (sent.late_p99_ms, sent.late_max_ms),
        )

    def new_pace(self, rate: float, seconds: float, probes_per_s: float) -> Pace:
        """A schedule with probes that were not used yet."""
        pace = Pace.of(rate, seconds, probes_per_s=probes_per_s, first_probe=self._next_probe)
        self._next_probe += pace.probes
        return pace

    def tracked(self) -> dict[str, list[str]]:
        """What the users named at the start were sent."""
        return self._stage.generator.tracked()

    def uncommitted(self) -> int:
        """Events in the topic beyond the committed offsets."""
        committed = self._stage.committed(self.config.group, self.topics)
        ends = self._stage.ends(self.topics)
        return sum(end - committed.get(partition, 0) for partition, end in ends.items())

    def scoring(self, seconds: float) -> FullSpeed:
        """Watch a system that needs no events."""
        self._parts.enter_context(self.subject)
        deadline = time.monotonic() + _START_S
        while not self.subject.done():
            self.subject.check()
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self._case.name} did not start in {_START_S:.0f} s")
            time.sleep(0.1)
        time.sleep(0.5)
        meter = self.meter()
        before, at = self.subject.done(), self.subject.last_done_at()
        time.sleep(seconds)
        after, end = self.subject.done(), self.subject.last_done_at()
        usage = meter.read()
        self.subject.look_at_memory()
        self.sent = after
        return FullSpeed(after - before, end - at, usage)

    def run(self, full: FullSpeed, steady: tuple[Steady, ...]) -> Run:
        """The results, with what the system itself counted."""
        done = self.sent if self._case.level == "scoring" else self._settled()
        self.subject.look_at_memory()
        return Run(
            self._case.name,
            full,
            steady,
            self.subject.peak_pss,
            self.subject.peak_rss,
            self.sent,
            done,
        )

    def meter(self) -> Meter:
        """Begin to measure what all parts use."""
        stage = self._stage
        return Meter(
            stage.cpus,
            {
                "sut": self.subject.pids,
                "broker": [stage.broker_pid],
                "redis": [self._redis_pid()],
                "harness": stage.own_pids,
            },
        )

    def _settled(self) -> int:
        """What it counts once it counts no more."""
        deadline = time.monotonic() + 5.0
        while (done := self.subject.done()) < self.sent and time.monotonic() < deadline:
            time.sleep(0.2)
        return done

    def _time_backlog(self, count: int) -> FullSpeed:
        self.subject.pause()
        sent_before = self.sent
        last = self.fill(count)
        meter = self.meter()
        started = self.subject.resume()
        end = self.wait(last, 300.0)
        usage = meter.read()
        self.subject.look_at_memory()
        return FullSpeed(self.sent - sent_before, end - started, usage)

    def fill(self, count: int) -> set[int]:
        """Put a backlog into the topic; says which probes end it."""
        partitions = self.topics.partitions
        last = {n: self._next_probe + n for n in range(partitions)}
        self._next_probe += partitions
        self.sent += self._stage.generator.backlog(Backlog(self.topics.events, count, last)).events
        return set(last.values())

    def wait(self, last: set[int], seconds: float) -> float:
        """Wait until everything sent was served; says when that was."""
        if self._case.level == "whole":
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                seen = self._stage.observer.wait(last, min(2.0, deadline - time.monotonic()))
                if len(seen) == len(last):
                    return max(seen.values())
                self.subject.check()
        else:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if self.subject.done() >= self.sent:
                    return self.subject.last_done_at()
                self.subject.check()
                time.sleep(0.01)
        raise BenchmarkError(
            f"{self._case.name} did not serve {self.sent:,} events in {seconds:.0f} s"
            f" (it counts {self.subject.done():,}); its log is in {self.subject.log_directory}"
        )

    def _redis_pid(self) -> int:
        assert self.redis.process is not None and self.redis.process.pid is not None
        return self.redis.process.pid
