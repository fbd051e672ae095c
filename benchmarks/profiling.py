"""`make profile`: where a loaded worker spends its time, as a flame graph (py-spy)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.measure import Session, Setup, warm_up
from benchmarks.peers import CASES, OURS
from benchmarks.stage import Stage

#: Samples a second.
_RATE = 200
_SPARE = 1.5
#: Innermost frames of threads that wait.
_WAITING = (
    "EpollSelector.select", "_PollLikeSelector.select", "Condition.wait", "_worker (concurrent",
)  # fmt: skip


def profile(
    setup: Setup,
    stage: Stage,
    out: Path,
    *,
    seconds: float,
    native: bool,
    progress: Callable[[str], None],
) -> list[tuple[str, float]]:
    """Record a worker at full speed; writes `worker.svg` and `worker.folded` to `out`.

    Returns:
        Functions by their own share of all samples, the largest first.

    Raises:
        BenchmarkError: py-spy is missing or may not look into the process.
    """
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        raise BenchmarkError("py-spy is missing: install the extra `bench`")
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as parts:
        warm_up(setup, stage, progress)
        session = Session(CASES[OURS], setup, stage, parts)
        session.start()
        rate = session.full_speed(2.0, 1_000_000).rate
        for form, file in (("flamegraph", "worker.svg"), ("raw", "worker.folded")):
            progress(f"recording {seconds:g} s at {rate:,.0f} events/s: {out / file}")
            session.subject.pause()
            last = session.fill(int(_SPARE * seconds * rate))
            session.subject.resume()
            _record(
                [
                    spy, "record", "--pid", str(session.subject.pids[0]), "--duration",
                    str(max(1, round(seconds))), "--rate", str(_RATE), "--format", form,
                    "--output", str(out / file), *(["--native"] if native else []),
                ]
            )  # fmt: skip
            session.wait(last, 300.0)
    return own_shares((out / "worker.folded").read_text(encoding="utf-8").splitlines())


def _record(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(
            f"py-spy failed: {done.stderr.strip()[-300:]} (may this user trace processes?)"
        )


def own_shares(folded: Iterable[str]) -> list[tuple[str, float]]:
    """Share of the samples whose innermost frame a function is, from folded stacks.

    Samples of threads that wait are left out: not on every kernel can py-spy tell them.
    """
    counted: Counter[str] = Counter()
    for line in folded:
        stack, _, count = line.rpartition(" ")
        innermost = stack.rpartition(";")[2]
        if stack and not innermost.startswith(_WAITING):
            counted[innermost] += int(count)
    total = sum(counted.values())
    return [(name, count / total) for name, count in counted.most_common()]
