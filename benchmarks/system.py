"""The machine: which CPUs are whose, and what a process tree costs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.errors import BenchmarkError
from worker.local.redis_server import redis_binary

_PACKAGES = (
    "faust-streaming", "aiokafka", "confluent-kafka", "redis", "hiredis", "msgspec", "bytewax",
)  # fmt: skip


@dataclass(frozen=True)
class Cpus:
    """CPUs of the system under test, and those of everything else."""

    sut: tuple[int, ...]
    rest: tuple[int, ...]


def split_cpus(available: Iterable[int], sut: Sequence[int] | None = None) -> Cpus:
    """Share out CPUs: the first half is the system under test's, unless `sut` says otherwise.

    A machine of one CPU has everything on it.

    Raises:
        BenchmarkError: `sut` names CPUs that this process may not use, or all of them.
    """
    cpus = sorted(available)
    if sut is None:
        if len(cpus) == 1:
            return Cpus((cpus[0],), (cpus[0],))
        chosen = tuple(cpus[: len(cpus) // 2])
    else:
        chosen = tuple(sorted(set(sut)))
        if not chosen or not set(chosen) <= set(cpus):
            raise BenchmarkError(
                f"--sut-cpus {','.join(map(str, chosen))}: this process may use"
                f" {','.join(map(str, cpus))}"
            )
    rest = tuple(cpu for cpu in cpus if cpu not in chosen)
    if not rest:
        raise BenchmarkError(
            "--sut-cpus takes every CPU; leave one for broker, Redis and load generator"
        )
    return Cpus(chosen, rest)


def pinned(cpus: Sequence[int], directory: Path, command: Sequence[str]) -> list[str]:
    """`command`, to run on `cpus` in `directory`."""
    where = ",".join(map(str, cpus))
    return [sys.executable, "-m", "benchmarks.pin", where, str(directory), *command]


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes and all that they started and that live."""
    total = 0.0
    for process in _trees(pids):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


@dataclass(frozen=True)
class Usage:
    """What processors did over some time.

    Args:
        seconds: of wall clock.
        cpu_s: seconds of processor time by name of what used it.
        sut_busy: share of the system's CPUs that was in use, by whatever; 1 is all.
        rest_busy: the same of the other CPUs. Near 1, broker or generator may have been the limit.
        foreign: CPUs used by processes that are no part of the benchmark.
    """

    seconds: float
    cpu_s: dict[str, float]
    sut_busy: float
    rest_busy: float
    foreign: float


class Meter:
    """Measures from when it is made until it is read.

    Args:
        parts: process ids by name; processes that they started count as theirs.
    """

    def __init__(self, cpus: Cpus, parts: Mapping[str, Sequence[int]]) -> None:
        self._cpus, self._parts = cpus, parts
        self._before = self._now()

    def read(self) -> Usage:
        """What was used since."""
        at, busy, used = self._now()
        at_before, busy_before, used_before = self._before
        seconds = max(at - at_before, 1e-9)
        by_cpu = {cpu: busy[cpu] - busy_before[cpu] for cpu in busy}
        cpu_s = {name: used[name] - used_before[name] for name in used}
        ours = {*self._cpus.sut, *self._cpus.rest}
        foreign = sum(by_cpu[cpu] for cpu in ours) - sum(cpu_s.values())
        return Usage(
            seconds=seconds,
            cpu_s=cpu_s,
            sut_busy=sum(by_cpu[cpu] for cpu in self._cpus.sut) / seconds / len(self._cpus.sut),
            rest_busy=sum(by_cpu[cpu] for cpu in self._cpus.rest) / seconds / len(self._cpus.rest),
            foreign=max(0.0, foreign / seconds),
        )

    def _now(self) -> tuple[float, dict[int, float], dict[str, float]]:
        busy = {
            cpu: times.user + times.nice + times.system + times.irq + times.softirq + times.steal
            for cpu, times in enumerate(psutil.cpu_times(percpu=True))
        }
        used = {name: cpu_seconds(pids) for name, pids in self._parts.items()}
        return time.monotonic(), busy, used


def memory_bytes(pids: Iterable[int]) -> tuple[int, int]:
    """Resident memory of process trees: proportional share (PSS), and plain (RSS)."""
    pss = rss = 0
    for process in _trees(pids):
        with suppress(OSError, psutil.NoSuchProcess):
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
            found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
            pss += int(found.group(1)) * 1024 if found else 0
            rss += process.memory_info().rss
    return pss, rss


def _trees(pids: Iterable[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            found += [root, *root.children(recursive=True)]
    return found


def describe(cpus: Cpus, broker: str) -> dict[str, Any]:
    """Hardware, kernel and versions, for the record."""
    from models.report.machine import machine  # noqa: PLC0415 - brings all of the reports

    about = machine()
    # This process is on those of the rest by now.
    about["cores"] = len({*cpus.sut, *cpus.rest})
    about["cpus"] = {"sut": list(cpus.sut), "rest": list(cpus.rest)}
    about["kernel"] = platform.release()
    versions = about["versions"]
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    versions["redis-server"] = _first_match(r"v=(\S+)", [str(redis_binary()), "--version"])
    if broker == "kafka" and shutil.which("java"):
        versions["java"] = _first_match(r'version "([^"]+)"', ["java", "-version"])
    return about


def _first_match(pattern: str, command: Sequence[str]) -> str:
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(pattern, shown.stdout + shown.stderr)
    return found.group(1) if found else "unknown"


def own_cpus() -> set[int]:
    """CPUs that this process may use."""
    return os.sched_getaffinity(0)
