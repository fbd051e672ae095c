"""`make swaps`: what a swap of models costs a worker. Latency, beside the same load without swaps;
memory, over many swaps.

Two versions of one model, float32 and int8 of the same items, are promoted in turn in a registry of
their own. When a worker switched it says in its log, so that nothing asks it under load.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.bundles import (
    default_bundle,
    shipped_float_bundle,
    synthetic_bundle,
    synthetic_float_bundle,
)
from benchmarks.errors import BenchmarkError
from benchmarks.load import Paced
from benchmarks.measure import Session, Setup, warm_up
from benchmarks.peers import CASES, OURS
from benchmarks.results import FOREIGN_LIMIT, Spread, as_text
from benchmarks.schedule import Latency, Pace, latency
from benchmarks.soak import Accounts, account, sampled_users
from benchmarks.stage import Stage
from benchmarks.subject import WorkerSubject
from benchmarks.system import describe
from worker.bundle import open_bundle
from worker.manifest import MODEL_FILE
from worker.memory import keep_large_blocks_apart
from worker.registry import LocalRegistry
from worker.session import MAX_RUN_ROWS

#: Goals: most that swaps may raise the p99 by; most memory over the old model, in new ones.
LATENCY_GOAL, MEMORY_GOAL = 1.2, 1.2
#: Resident memory creeps where it grows by more than this share over the second half.
CREEP = 0.05
#: Events due so shortly before a release may still wait when it is followed.
_GAP_S = 0.5
#: A window of a swap ends so long after the switch: the old model is let go of in that time.
_SETTLE_S = 1.0
_PROBES_PER_S = 250.0
_GRACE_S = 30.0
_LONGEST_SWAP_S = 60.0
_POLL_S = 0.2
#: Where memory is looked at: some events are served by each model before the next comes.
_LIGHT_RATE, _LIGHT_S = 200.0, 0.25
_MARKS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
#: As the worker warms up a bundle.
_WARMED = (1, MAX_RUN_ROWS)
#: The cache of histories is full from the first events on, so that it does not grow.
_SMALL_CACHE = {"history-cache-mb": "4"}

#: From and to, in seconds since the load began.
Window = tuple[float, float]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Swap:
    """One swap: from the release to the switch, in seconds since the load began."""

    version: str
    promoted_s: float
    served_s: float


@dataclass(frozen=True)
class Loaded:
    """Swaps at one load. Latencies are of the probes that were due within the windows.

    Args:
        share: of full speed.
        quiet: of windows as long as those of the swaps, before the first swap.
        before: of the windows just before each swap, each as long as that swap's.
        during: of each swap's window, from the release until `_SETTLE_S` after the switch.
        all_quiet: of all of `quiet` together.
        all_before: of all of `before` together.
        all_during: of all of `during` together.
        load_s: mean time that the worker spent on opening a version.
        switch_ms: mean time that it spent on switching.
    """

    share: float
    rate: float
    swaps: list[Swap]
    quiet: list[Latency]
    before: list[Latency]
    during: list[Latency]
    all_quiet: Latency
    all_before: Latency
    all_during: Latency
    load_s: float
    switch_ms: float
    sut_busy: float
    foreign_cpus: float

    @property
    def ratio(self) -> float:
        """p99 during swaps over p99 before them."""
        return self.all_during.p99 / self.all_before.p99

    @property
    def ratio_to_quiet(self) -> float:
        """p99 during swaps over p99 before the first; what a swap leaves behind is in it too, and
        whatever else has changed since."""
        return self.all_during.p99 / self.all_quiet.p99


@dataclass
class SwapResults:
    """One invocation."""

    started_at: str
    machine: dict[str, Any]
    broker: str
    versions: list[str]
    catalogue: int
    full_rate: float
    loads: list[Loaded] = field(default_factory=list)
    accounts: Accounts | None = None


@dataclass(frozen=True)
class MemoryMark:
    """Resident memory of the worker after so many swaps, bytes."""

    swaps: int
    rss: int
    pss: int


@dataclass(frozen=True)
class Peak:
    """One swap: resident memory before it, and the most until its model had served. Bytes."""

    version: str
    before: int
    most: int


@dataclass(frozen=True)
class SwapMemory:
    """Many swaps of one pair.

    Args:
        file_bytes: of the graph, by version.
        new_bytes: that the version takes, opened in a process of its own.
    """

    catalogue: int
    file_bytes: dict[str, int]
    new_bytes: dict[str, int]
    marks: list[MemoryMark]
    peaks: list[Peak]

    def in_new_models(self, version: str) -> Spread:
        """Most memory over what there was before, in new models, over the swaps to `version`."""
        found = [peak for peak in self.peaks if peak.version == version]
        return Spread.of((peak.most - peak.before) / self.new_bytes[version] for peak in found)

    @property
    def creep(self) -> float:
        """Growth of resident memory over the second half of the swaps, as a share.

        The same version serves at both ends where the number of swaps is a multiple of 4.
        """
        half = next(m for m in self.marks if m.swaps >= self.marks[-1].swaps / 2)
        return self.marks[-1].rss / half.rss - 1.0


@dataclass
class SwapMemoryResults:
    """One invocation."""

    started_at: str
    machine: dict[str, Any]
    pairs: list[SwapMemory] = field(default_factory=list)


# -- windows


def swap_windows(swaps: Sequence[Swap]) -> list[tuple[Window, Window]]:
    """For each swap the window just before it, `_GAP_S` apart, and its own, equally long.

    The one before starts later where the window of the swap before it ends later.

    Raises:
        BenchmarkError: a release came too soon after the swap before.
    """
    own = [(swap.promoted_s, swap.served_s + _SETTLE_S) for swap in swaps]
    for (_, end), (start, _) in pairwise(own):
        if start - _GAP_S <= end:
            raise BenchmarkError(
                f"a swap ended {start - end:.1f} s before the next: leave more time (--every)"
            )
    free_from = [-math.inf, *(end for _, end in own)]
    return [
        ((max(free, start - _GAP_S - (end - start)), start - _GAP_S), (start, end))
        for free, (start, end) in zip(free_from, own, strict=False)
    ]


def quiet_windows(length: float, until: float) -> list[Window]:
    """As many windows of `length` as there is room for up to `until`, one after another."""
    count = int(until / length)
    return [(number * length, (number + 1) * length) for number in range(count)]


def within(due: Mapping[int, float], windows: Iterable[Window]) -> dict[int, float]:
    """Those of the probes that are due in one of `windows`; its end is not part of it."""
    known = list(windows)
    return {
        probe: at for probe, at in due.items() if any(start <= at < end for start, end in known)
    }


def switch_times(log: Iterable[str]) -> dict[int, float]:
    """When (`time.time()`) a worker switched, by revision of the release, from its log."""
    found: dict[int, float] = {}
    for line in log:
        try:
            entry = json.loads(line)
            words = entry["message"].split()
        except (ValueError, TypeError, KeyError):
            continue  # other libraries print what they like
        if words[:1] == ["serving"]:
            revision = next(word for word in words if word.startswith("revision="))
            at = datetime.fromisoformat(entry["time"]).timestamp()
            found.setdefault(int(revision.removeprefix("revision=")), at)
    return found


# -- measuring


@dataclass(frozen=True)
class Pair:
    """Two versions of one model in a registry."""

    registry: LocalRegistry
    name: str
    versions: tuple[str, str]

    def promote(self, number: int) -> tuple[str, int]:
        """Promote one of them, in turn; its version and the release's revision."""
        version = self.versions[number % 2]
        return version, self.registry.promote(self.name, version).revision

    def directory(self, version: str) -> Path:
        """Where it lies."""
        return self.registry.root / self.name / version


def make_pair(catalogue: int, length: int, directory: Path) -> Pair:
    """Float32 and int8 of the same items, in a registry of their own; float32 is promoted.

    Args:
        catalogue: items of a synthetic model; 0 for the shipped model.
        length: of the histories that a synthetic model reads.
    """
    bundles = (
        (synthetic_float_bundle(catalogue, length), synthetic_bundle(catalogue, length))
        if catalogue
        else (shipped_float_bundle(), default_bundle())
    )
    root, name = directory / f"registry-{catalogue}", bundles[0].parent.name
    for bundle in bundles:
        shutil.copytree(bundle, root / name / bundle.name)
    pair = Pair(LocalRegistry(root), name, (bundles[0].name, bundles[1].name))
    pair.promote(0)
    return pair


def swapping(setup: Setup, pair: Pair) -> Setup:
    """`setup` with a worker that follows the releases of `pair`, and says so in its log."""
    flags = {
        "models": f"posts={pair.name}",
        "registry-poll-s": str(_POLL_S),
        "log-level": "info",
        **setup.flags,
    }
    return replace(setup, bundle=pair.directory(pair.versions[0]), flags=flags)


def swaps_under_load(
    setup: Setup,
    pair: Pair,
    stage: Stage,
    *,
    shares: Sequence[float],
    quiet_s: float,
    seconds: float,
    every_s: float,
    progress: Progress,
) -> SwapResults:
    """At each share of full speed: no swaps for `quiet_s`, then one every `every_s` for `seconds`.

    Raises:
        BenchmarkError: the worker did not follow a release.
    """
    setup = swapping(setup, pair)
    users = sampled_users(setup.spec)
    with ExitStack() as parts:
        warm_up(setup, stage, progress)
        session = Session(CASES[OURS], setup, stage, parts)
        session.start(frozenset(users))
        full = session.full_speed(4.0, 1_000_000)
        progress(f"full speed {full.rate:,.0f} events/s")
        results = SwapResults(
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=describe(stage.cpus, stage.broker_name),
            broker=stage.broker_name,
            versions=list(pair.versions),
            catalogue=len(setup.spec.items),
            full_rate=full.rate,
        )
        unanswered = made = 0
        times = [quiet_s + every_s * n for n in range(max(1, int(seconds / every_s)))]
        for share in shares:
            pace = session.new_pace(share * full.rate, times[-1] + every_s, _PROBES_PER_S)
            found, lost = _at_load(session, stage, share, pace, _Releases(pair, made + 1, times))
            unanswered, made = unanswered + lost, made + len(times)
            results.loads.append(found)
            progress(f"{share:.0%}: {'; '.join(_cells(found)[1:])}")
        results.accounts = account(session, worker_of(session), unanswered, users)
    return results


def worker_of(session: Session) -> WorkerSubject:
    """The worker of a session that has no other system."""
    assert isinstance(session.subject, WorkerSubject)
    return session.subject


def _at_load(
    session: Session, stage: Stage, share: float, pace: Pace, releases: _Releases
) -> tuple[Loaded, int]:
    """What was found, and the probes that were never served."""
    subject = worker_of(session)
    before, meter = _phase_seconds(subject), session.meter()
    with releases:
        sent = stage.generator.paced(Paced(session.topics.events, pace), subject.check)
    session.sent += sent.events
    usage, after = meter.read(), _phase_seconds(subject)
    due = {probe: sent.started_at + at for probe, at in pace.probe_due_s().items()}
    seen = stage.observer.wait(due, _GRACE_S)
    swaps = _swaps(releases.made, subject, sent.started_at)
    pairs = swap_windows(swaps)
    length = statistics.mean(end - start for _, (start, end) in pairs)

    def of(*windows: Window) -> Latency:
        chosen = within(pace.probe_due_s(), windows)
        return latency({probe: due[probe] for probe in chosen}, seen)

    quiet = quiet_windows(length, swaps[0].promoted_s - _GAP_S)
    found = Loaded(
        share=share,
        rate=pace.rate,
        swaps=swaps,
        quiet=[of(window) for window in quiet],
        before=[of(window) for window, _ in pairs],
        during=[of(window) for _, window in pairs],
        all_quiet=of(*quiet),
        all_before=of(*(window for window, _ in pairs)),
        all_during=of(*(window for _, window in pairs)),
        load_s=(after["load"] - before["load"]) / len(swaps),
        switch_ms=1000.0 * (after["switch"] - before["switch"]) / len(swaps),
        sut_busy=usage.sut_busy,
        foreign_cpus=usage.foreign,
    )
    return found, len(due) - len(seen)


def _phase_seconds(subject: WorkerSubject) -> dict[str, float]:
    return {
        phase: subject.total("streamrec_model_swap_seconds_sum", phase=phase)
        for phase in ("load", "switch")
    }


def _swaps(
    made: Sequence[tuple[str, int, float]], subject: WorkerSubject, start: float
) -> list[Swap]:
    """The releases that were made, with when the worker followed."""
    log = subject.log_directory / "log-0.txt"
    switched = switch_times(log.read_text(encoding="utf-8", errors="replace").splitlines())
    to_monotonic = time.monotonic() - time.time()
    found = []
    for version, revision, at in made:
        if revision not in switched:
            raise BenchmarkError(f"the worker never served {version}; its log is {log}")
        found.append(Swap(version, at - start, switched[revision] + to_monotonic - start))
    return found


class _Releases(threading.Thread):
    """Promotes the versions in turn at the times given, in seconds from when it starts."""

    def __init__(self, pair: Pair, first: int, times: Sequence[float]) -> None:
        super().__init__(name="releases", daemon=True)
        self._pair, self._first, self._times = pair, first, times
        self._over = threading.Event()
        #: Version, revision, `time.monotonic()`.
        self.made: list[tuple[str, int, float]] = []

    def __enter__(self) -> _Releases:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Until all are made, or the load is over."""
        started = time.monotonic()
        for number, at in enumerate(self._times, self._first):
            if self._over.wait(max(0.0, started + at - time.monotonic())):
                return
            now = time.monotonic()
            self.made.append((*self._pair.promote(number), now))


def swaps_and_memory(
    setup: Setup, pair: Pair, stage: Stage, *, count: int, progress: Progress
) -> SwapMemory:
    """`count` swaps, with some events served by each model.

    Raises:
        BenchmarkError: the worker did not follow a release, or tells nothing of its memory.
    """
    setup = replace(setup, flags={**_SMALL_CACHE, **setup.flags})
    manifests = {v: pair.registry.manifest(pair.name, v) for v in pair.versions}
    new = {version: opened_bytes(pair.directory(version)) for version in pair.versions}
    marks, peaks = [], []
    with ExitStack() as parts:
        session = Session(CASES[OURS], swapping(setup, pair), stage, parts)
        session.start()
        subject = worker_of(session)
        session.full_speed(1.0, 20_000)
        at = {round(count * mark) for mark in _MARKS}
        for number in range(count + 1):
            if number:
                before = start_peak(subject.pids[0])
                version, _ = pair.promote(number)
                _wait_for(subject, number)
                session.steady(None, _LIGHT_RATE, _LIGHT_S, _LIGHT_RATE / 2)
                peaks.append(Peak(version, before, status_bytes(subject.pids[0], "VmHWM")))
            if number in at:
                time.sleep(_SETTLE_S)
                pss, rss = subject.look_at_memory()
                marks.append(MemoryMark(number, rss, pss))
                progress(f"{number} swaps: RSS {rss / 1e6:.1f} MB, PSS {pss / 1e6:.1f} MB")
    return SwapMemory(
        catalogue=len(setup.spec.items),
        file_bytes={v: made.files[MODEL_FILE].bytes for v, made in manifests.items()},
        new_bytes=new,
        marks=marks,
        peaks=peaks,
    )


def _wait_for(subject: WorkerSubject, swaps: int) -> None:
    deadline = time.monotonic() + _LONGEST_SWAP_S
    while subject.total("streamrec_model_swaps_total") < swaps:
        subject.check()
        if time.monotonic() > deadline:
            raise BenchmarkError(
                f"the worker did not swap in {_LONGEST_SWAP_S:.0f} s; its log is in"
                f" {subject.log_directory}"
            )
        time.sleep(0.05)


def start_peak(pid: int) -> int:
    """Resident bytes of a process now; its `VmHWM` starts anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    return status_bytes(pid, "VmRSS")


def status_bytes(pid: int, name: str) -> int:
    """A line of `/proc/PID/status`, such as `VmHWM`, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def opened_bytes(bundle: Path) -> int:
    """Resident bytes that a bundle takes beside another, once open and warm; in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_opened_bytes, bundle).result()


def _opened_bytes(bundle: Path) -> int:
    keep_large_blocks_apart()
    # What the runtime takes for its first session, whatever that is, is not the model's.
    first = open_bundle(bundle, warmup_batches=_WARMED)
    before = status_bytes(os.getpid(), "VmRSS")
    second = open_bundle(bundle, warmup_batches=_WARMED)
    after = status_bytes(os.getpid(), "VmRSS")
    assert first.items == second.items
    return after - before


# -- telling


def load_table(results: SwapResults) -> list[list[str]]:
    """Rows of latency in milliseconds by load; the first is the head."""
    head = [
        "load, events/s", "p50 quiet / before / during swaps", "p99 quiet / before / during swaps",
        "p99 during swaps over quiet / before",
        "p99 of single windows: without swaps", "with one", "loading, s", "switch, ms",
    ]  # fmt: skip
    return [head, *map(_cells, results.loads)]


def _cells(found: Loaded) -> list[str]:
    kinds = (found.all_quiet, found.all_before, found.all_during)
    return [
        f"{found.share:.0%}, {found.rate:,.0f}",
        " / ".join(f"{one.p50:.1f}" for one in kinds),
        " / ".join(f"{one.p99:.1f}" for one in kinds),
        f"{found.ratio_to_quiet:.2f} / {found.ratio:.2f}",
        Spread.of(one.p99 for one in [*found.quiet, *found.before]).shown(".1f"),
        Spread.of(one.p99 for one in found.during).shown(".1f"),
        f"{found.load_s:.2f}",
        f"{found.switch_ms:.2f}",
    ]


def load_verdicts(results: SwapResults) -> list[tuple[bool, str]]:
    """Whether swaps were not felt, and nothing was lost, in words."""
    assert results.accounts is not None
    found = [
        (
            max(one.ratio, one.ratio_to_quiet) <= LATENCY_GOAL,
            f"at {one.share:.0%}: p99 during {len(one.swaps)} swaps is {one.ratio:.2f} of that just"
            f" before each, {one.ratio_to_quiet:.2f} of that before the first; goal {LATENCY_GOAL}",
        )
        for one in results.loads
    ]
    return [*found, (results.accounts.balanced, results.accounts.words)]


def load_report(results: SwapResults) -> str:
    """Everything, for a terminal."""
    lines = [
        f"{results.versions[0]} and {results.versions[1]} in turn, {results.catalogue:,} items;"
        f" full speed {results.full_rate:,.0f} events/s; broker {results.broker}",
        as_text(load_table(results)),
        *_judged(load_verdicts(results)),
    ]
    foreign = max((one.foreign_cpus for one in results.loads), default=0.0)
    if foreign > FOREIGN_LIMIT:
        lines.append(f"mind: other processes used up to {foreign:.2f} CPUs meanwhile")
    return "\n".join(lines)


def memory_table(results: SwapMemoryResults) -> list[list[str]]:
    """Rows of resident memory in megabytes by number of swaps; the first is the head."""
    marks = [mark.swaps for mark in results.pairs[0].marks]
    rows = [["items", "", *(f"{swaps} swaps" for swaps in marks)]]
    for pair in results.pairs:
        for name in ("rss", "pss"):
            values = [f"{getattr(mark, name) / 1e6:.1f}" for mark in pair.marks]
            rows.append([f"{pair.catalogue:,}", name.upper(), *values])
    return rows


def peak_table(results: SwapMemoryResults) -> list[list[str]]:
    """Rows of what a swap takes, in megabytes, by new model; the first is the head."""
    rows = [["items", "new model", "graph file", "new", "most over the old one / new"]]
    for pair in results.pairs:
        rows += [
            [
                f"{pair.catalogue:,}",
                version,
                f"{pair.file_bytes[version] / 1e6:.1f}",
                f"{pair.new_bytes[version] / 1e6:.1f}",
                pair.in_new_models(version).shown(".2f"),
            ]
            for version in pair.new_bytes
        ]
    return rows


def memory_verdicts(results: SwapMemoryResults) -> list[tuple[bool, str]]:
    """Whether a swap takes no more than both models, and many no more than one, in words."""
    found = []
    for pair in results.pairs:
        most = max(pair.in_new_models(version).most for version in pair.new_bytes)
        found += [
            (
                most <= MEMORY_GOAL,
                f"{pair.catalogue:,} items: at most old + {most:.2f} new (goal {MEMORY_GOAL})",
            ),
            (
                pair.creep <= CREEP,
                f"{pair.catalogue:,} items: resident memory changed by {pair.creep:+.1%} over the"
                f" second half of {pair.marks[-1].swaps} swaps",
            ),
        ]
    return found


def memory_report(results: SwapMemoryResults) -> str:
    """Everything, for a terminal."""
    tables = [as_text(memory_table(results)), as_text(peak_table(results))]
    return "\n\n".join([*tables, "\n".join(_judged(memory_verdicts(results)))])


def _judged(verdicts: Iterable[tuple[bool, str]]) -> list[str]:
    return [f"{'ok  ' if good else 'NOT '} {words}" for good, words in verdicts]
