"""A system under test, running: started on its CPUs, stopped and let go, counted."""

from __future__ import annotations

import signal
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.cases.common import CaseConfig, Progress
from benchmarks.errors import BenchmarkError
from benchmarks.peers import Case, python_of
from benchmarks.stage import HISTORY_LENGTH, Topics
from benchmarks.system import cpu_seconds, memory_bytes, pinned
from worker.local.process import ManagedProcess, free_port

_ROOT = Path(__file__).parent.parent
#: One thread each: what is measured is one process on its CPUs, as a pod would run it.
_ENVIRONMENT = {
    "PYTHONPATH": str(_ROOT),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Subject:
    """One or more processes that do the same work."""

    def __init__(self, processes: Sequence[ManagedProcess]) -> None:
        self._processes = processes
        self.peak_pss = self.peak_rss = 0

    def __enter__(self) -> Subject:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.signal(signal.SIGCONT)
            process.stop()

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def log_directory(self) -> Path:
        """Where their logs are."""
        return self._processes[0].log_path.parent

    def pause(self) -> None:
        """Stop them in their tracks (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> float:
        """Let them go on; says when, in `time.monotonic()`."""
        at = time.monotonic()
        self._signal(signal.SIGCONT)
        return at

    def _signal(self, number: signal.Signals) -> None:
        self.check()
        for process in self._processes:
            process.signal(number)

    def check(self) -> None:
        """Raise unless all are running."""
        for process in self._processes:
            if not process.running:
                log = process.log_path.read_text(errors="replace").splitlines()[-5:]
                raise BenchmarkError(
                    f"{process.name} ended ({process.exit_note()}); its log is"
                    f" {process.log_path} and ends: {' | '.join(log)}"
                )

    def cpu_seconds(self) -> float:
        """Processor time so far."""
        return cpu_seconds(self.pids)

    def look_at_memory(self) -> tuple[int, int]:
        """Resident memory now (PSS, RSS), remembered where it is the most yet."""
        pss, rss = memory_bytes(self.pids)
        self.peak_pss, self.peak_rss = max(self.peak_pss, pss), max(self.peak_rss, rss)
        return pss, rss

    def wait_for_partitions(self, seconds: float) -> None:
        """Wait until each process has a share of the work, where there are several."""

    def done(self) -> int:
        """Events done, as the system itself counts."""
        raise NotImplementedError

    def last_done_at(self) -> float:
        """When the last of them was, in `time.monotonic()`."""
        raise NotImplementedError


class CaseSubject(Subject):
    """A module of `benchmarks.cases`.

    Raises:
        NotInstallableError: it cannot run here.
    """

    def __init__(self, case: Case, config: CaseConfig, cpus: Sequence[int], place: Path) -> None:
        file = place / "config.json"
        file.write_bytes(msgspec.json.encode(config))
        self._progress = Progress(Path(config.progress))
        command = [python_of(case), "-m", f"benchmarks.cases.{case.module}", str(file)]
        super().__init__([_process(case.name, command, cpus, place / "log.txt", stop_s=5.0)])

    def done(self) -> int:
        """Events done."""
        return self._progress.read()[0]

    def last_done_at(self) -> float:
        """When the last of them was."""
        return self._progress.read()[1]


class WorkerSubject(Subject):
    """`streamrec worker`, one or several in a group."""

    def __init__(
        self,
        config: CaseConfig,
        topics: Topics,
        cpus: Sequence[int],
        place: Path,
        *,
        flags: Mapping[str, str],
        workers: int = 1,
    ) -> None:
        bundle = Path(config.bundle)
        self._ports = [free_port() for _ in range(workers)]
        own = {
            "kafka": config.bootstrap,
            "redis": config.redis,
            "group": config.group,
            "registry": str(bundle.parent.parent),
            "models": f"posts={bundle.parent.name}@{bundle.name}",
            "events-topic": topics.events,
            "recommendations-topic": topics.recommendations,
            "dead-letter-topic": topics.dead_letters,
            "releases-topic": "",
            "decisions-topic": "",
            "history-length": str(HISTORY_LENGTH),
            "top-k": str(config.top_k),
            "session-timeout-s": str(config.session_s),
            # A lone worker waits about half of this on the embedded broker before it may start.
            "rebalance-timeout-s": "6",
            "log-level": "warning",
            **flags,
        }
        processes = []
        for number, port in enumerate(self._ports):
            arguments = [
                part
                for name, value in {**own, "http-port": str(port)}.items()
                for part in (f"--{name}", value)
            ]
            command = [sys.executable, "-m", "worker.cli", "worker", *arguments]
            processes.append(
                _process("the worker", command, cpus, place / f"log-{number}.txt", stop_s=30.0)
            )
        super().__init__(processes)

    def wait_for_partitions(self, seconds: float) -> None:
        """Wait until each worker has partitions: the last to come moves those of the others."""
        deadline = time.monotonic() + seconds
        while not all(
            value for name, _, value in self.samples() if name == "streamrec_assigned_partitions"
        ):
            self.check()
            if time.monotonic() > deadline:
                raise BenchmarkError(
                    f"a worker has no partition after {seconds:.0f} s; are there enough of them?"
                )
            time.sleep(0.5)

    def done(self) -> int:
        """Events applied, or known before, or too late."""
        return int(self.total("streamrec_events_total"))

    def total(self, metric: str, **labels: str) -> float:
        """Sum of a metric over all workers and series that have `labels`."""
        wanted = labels.items()
        return sum(
            value
            for name, found, value in self.samples()
            if name == metric and wanted <= found.items()
        )

    def samples(self) -> list[tuple[str, Mapping[str, str], float]]:
        """All that `/metrics` of all workers say."""
        found: list[tuple[str, Mapping[str, str], float]] = []
        for port in self._ports:
            url = f"http://127.0.0.1:{port}/metrics"
            with urllib.request.urlopen(url, timeout=30) as answer:
                text = answer.read().decode()
            found += [
                (sample.name, sample.labels, float(sample.value))
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            ]
        return found


def _process(
    name: str, command: Sequence[str], cpus: Sequence[int], log: Path, *, stop_s: float
) -> ManagedProcess:
    return ManagedProcess(
        name,
        # Faust puts its data where it starts.
        pinned(cpus, log.parent, command),
        log_path=log,
        ready=lambda: True,
        stop_s=stop_s,
        env=_ENVIRONMENT,
    )
