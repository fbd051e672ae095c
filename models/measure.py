"""What a bundle costs: memory and load time in fresh processes, latency side by side.

Bundles are opened as the worker does, by `worker.bundle.open_bundle` with one thread.

`python -m models.measure BUNDLE HISTORIES.npy` is the fresh process that `footprints` starts.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.dataset import padded
from worker.bundle import Bundle, open_bundle
from worker.errors import StreamrecError

#: Items asked for, to show ten after filtering.
K = 60
BATCHES = (1, 16, 64, 256)
#: Batch that memory is measured with.
MEMORY_BATCH = 64
ROUNDS = 7
#: Runs below which a 99th percentile is none: it would be the maximum.
P99_RUNS = 100
#: Sets of histories that a batch size cycles through.
_POOL = 8
_CHILD_TIMEOUT_S = 600

Progress = Callable[[str], None]
#: float64 `[runs, 2]`: elapsed and processor time of each run, in milliseconds.
Times = NDArray[np.float64]


class MeasureError(StreamrecError):
    """A fresh process could not measure a bundle."""

    exit_code = 70  # EX_SOFTWARE


class Sample(msgspec.Struct, frozen=True):
    """One fresh process, and by how much it grew over what it was before it opened the bundle."""

    load_s: float
    #: Resident memory, by opening and one run of `MEMORY_BATCH`; what the allocator holds free is
    #: given back first. Some 12 MB are ONNX Runtime's code, whatever the model.
    resident_bytes: int
    #: The part of it that no file backs: weights and buffers.
    private_bytes: int
    #: Resident memory at the worst moment of opening, checksums and golden outputs included.
    peak_loading_bytes: int


@dataclass(frozen=True)
class Ratio:
    """How many times the reference's; median, least and most over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, own: Sequence[float], reference: Sequence[float]) -> Ratio:
        """Round by round."""
        found = [mine / theirs for mine, theirs in zip(own, reference, strict=True)]
        return cls(float(np.median(found)), min(found), max(found))


@dataclass(frozen=True)
class Footprint:
    """Medians over fresh processes; `samples` are all of them."""

    load_s: float
    resident_bytes: int
    private_bytes: int
    peak_loading_bytes: int
    #: Of load times, turn by turn.
    load_ratio: Ratio
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Latency:
    """Of one bundle at one batch size, in milliseconds per batch."""

    #: Median of processor time: what the batch takes where nothing else wants the core.
    cpu_ms: float
    #: Percentiles of elapsed time, with whatever else the machine did.
    p50_ms: float
    #: None below `P99_RUNS` runs.
    p99_ms: float | None
    runs: int
    #: Of the medians of processor time of each round.
    ratio: Ratio


def footprints(
    bundles: Sequence[Bundle],
    histories: Sequence[Sequence[NDArray[np.int64]]],
    *,
    repeats: int = 3,
    progress: Progress = lambda _: None,
) -> list[Footprint]:
    """Memory and load time of each bundle, in processes of their own, turn by turn.

    The first bundle is the reference.

    Args:
        histories: for each bundle, histories in its own numbering.

    Raises:
        MeasureError: a process failed.
    """
    samples: list[list[Sample]] = [[] for _ in bundles]
    with tempfile.TemporaryDirectory(prefix="streamrec-measure-") as folder:
        for number, (bundle, own) in enumerate(zip(bundles, histories, strict=True)):
            tensor = padded(_cycled(own, MEMORY_BATCH), bundle.manifest.max_length)
            np.save(Path(folder) / f"{number}.npy", tensor)
        for _ in range(repeats):
            for number, bundle in enumerate(bundles):
                samples[number].append(_fresh(bundle.path, Path(folder) / f"{number}.npy"))
                progress(f"memory of {bundle.manifest.version}")
    return [_footprint(own, samples[0]) for own in samples]


def latencies(
    bundles: Sequence[Bundle],
    histories: Sequence[Sequence[NDArray[np.int64]]],
    *,
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    runs: int = 15,
    seconds: float = 12.0,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> list[dict[int, Latency]]:
    """Latency of each bundle at each batch size; the first bundle is the reference.

    In each round every bundle runs, in random order, on the same users' histories, so that what
    else the machine does hits all alike. Ratios are of processor time: a run has one thread and
    waits for nothing, so that it is the latency of an idle machine, and a busy one changes it
    little.

    Args:
        histories: for each bundle, histories in its own numbering, those of the same users.
        runs: of one batch size, in each round; small batches run more often.
        seconds: at most, for one bundle and batch size, over all rounds.
    """
    rng = np.random.default_rng(seed)
    times: list[dict[int, list[Times]]] = [{size: [] for size in batches} for _ in bundles]
    chosen = {size: rng.integers(0, len(histories[0]), (_POOL, size)) for size in batches}
    for _ in range(rounds):
        for size in batches:
            for number in rng.permutation(len(bundles)):
                length = bundles[number].manifest.max_length
                tensors = [
                    padded([histories[number][place] for place in users], length)
                    for users in chosen[size]
                ]
                run = partial(bundles[number].score, k=candidates(bundles[number]))
                times[number][size].append(timed(run, tensors, runs, seconds / rounds))
        progress("latency")
    return [{size: _latency(own[size], times[0][size]) for size in batches} for own in times]


def candidates(bundle: Bundle) -> int:
    """How many items a run is asked for: `K`, or as many as the bundle gives."""
    return min(K, bundle.manifest.most)


def timed(
    run: Callable[[NDArray[np.int64]], object],
    tensors: Sequence[NDArray[np.int64]],
    runs: int,
    seconds: float,
) -> Times:
    """Time `run` on each tensor in turn: at least three times, `runs` times if time allows, 10
    `runs` if they are done within 50 ms."""
    for tensor in tensors[:2]:
        run(tensor)
    found: list[tuple[float, float]] = []
    elapsed = cpu = 0.0
    while len(found) < 10 * runs and (len(found) < runs or cpu < 0.05):
        if len(found) >= 3 and elapsed > seconds:
            break
        tensor = tensors[len(found) % len(tensors)]
        before, before_cpu = time.perf_counter(), time.thread_time()
        run(tensor)
        found.append((time.perf_counter() - before, time.thread_time() - before_cpu))
        elapsed += found[-1][0]
        cpu += found[-1][1]
    return np.array(found) * 1e3


def _latency(own: Sequence[Times], reference: Sequence[Times]) -> Latency:
    elapsed, cpu = np.concatenate(own).T
    return Latency(
        cpu_ms=float(np.median(cpu)),
        p50_ms=float(np.median(elapsed)),
        p99_ms=float(np.percentile(elapsed, 99)) if len(elapsed) >= P99_RUNS else None,
        runs=len(elapsed),
        ratio=Ratio.of(
            [float(np.median(part[:, 1])) for part in own],
            [float(np.median(part[:, 1])) for part in reference],
        ),
    )


def _footprint(samples: Sequence[Sample], reference: Sequence[Sample]) -> Footprint:
    return Footprint(
        load_s=float(np.median([sample.load_s for sample in samples])),
        resident_bytes=int(np.median([sample.resident_bytes for sample in samples])),
        private_bytes=int(np.median([sample.private_bytes for sample in samples])),
        peak_loading_bytes=int(np.median([sample.peak_loading_bytes for sample in samples])),
        load_ratio=Ratio.of(
            [sample.load_s for sample in samples], [sample.load_s for sample in reference]
        ),
        samples=tuple(samples),
    )


def _cycled(histories: Sequence[NDArray[np.int64]], count: int) -> list[NDArray[np.int64]]:
    return [histories[place % len(histories)] for place in range(count)]


def _fresh(bundle: Path, histories: Path) -> Sample:
    command = [sys.executable, "-m", "models.measure", str(bundle.resolve()), str(histories)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=_CHILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise MeasureError(
            f"{bundle} was not open after {_CHILD_TIMEOUT_S} s: measure on a quieter machine"
        ) from None
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        killed = "; was it out of memory?" if done.returncode < 0 else ""
        raise MeasureError(f"the process that measures {bundle} failed: {last}{killed}")
    return msgspec.json.decode(done.stdout, type=Sample)


def _measure_here(path: Path, histories: NDArray[np.int64]) -> Sample:
    _settle()
    before, before_private = _status("VmRSS"), _status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    started = time.perf_counter()
    bundle = open_bundle(path)
    load_s = time.perf_counter() - started
    peak = _status("VmHWM")
    bundle.score(histories, candidates(bundle))
    _settle()
    return Sample(
        load_s=load_s,
        resident_bytes=_status("VmRSS") - before,
        private_bytes=_status("RssAnon") - before_private,
        peak_loading_bytes=peak - before,
    )


def _settle() -> None:
    """Give back what was freed: it is nobody's, and comes and goes by chance."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status, such as `VmRSS:   1234 kB`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure the bundle named on the command line; print the sample as JSON."""
    sample = _measure_here(Path(sys.argv[1]), np.load(sys.argv[2]))
    sys.stdout.buffer.write(msgspec.json.encode(sample))


if __name__ == "__main__":
    main()
