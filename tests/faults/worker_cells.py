"""Cells about the worker's own process: killed, stopped, joined by others, its clock and disk."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.conftest import ITEMS, tiny_bundle, tiny_model
from tests.faults.harness import SETTINGS, Cell, Scene
from tests.faults.injected import CLOCK_SHIFT, INJECT
from tests.faults.plan import Plan
from tests.integration.support import PARTITIONS, WorkerProcess, eventually

HOUR_S = 3600
#: Seconds that a batch stands at the boundary before the kill: two intervals of commits.
STANDS_S = 1.0
#: So that the batch in hand of a zombie holds some dozens of users.
MANY_AT_ONCE = {"batch_interval_ms": "200"}


def _killed_inside(scene: Scene) -> None:
    """The worker kills itself at its point; its supervisor starts another at once."""
    scene.gone(scene.workers[0])
    scene.ended()
    scene.worker()
    scene.wait_for_commits(500)


def _kill(point: str, where: str, nth: int, mutation: str, *, short: bool = False) -> Cell:
    return Cell(
        f"kill-{point.replace('_', '-')}",
        f"SIGKILL {where}; started again",
        _killed_inside,
        mutation,
        short=short,
        inject={INJECT: f"{point}:{nth}:kill:{STANDS_S}"},
        # Otherwise histories are read from Redis at the very start only.
        settings={"history_cache_mb": "0.01"} if point == "read" else {},
    )


KILLS = (
    _kill("fetched", "after a fetch", 150, "commit_position"),
    _kill("decoded", "after decoding", 300, "commit_at_start"),
    _kill("read", "after reading histories", 150, "commit_at_start"),
    _kill("scored", "after scoring", 300, "commit_at_start"),
    _kill("sent", "after some users of a write were sent", 150, "commit_at_start", short=True),
    _kill("half_written", "with half of a write in Redis", 150, "commit_at_start"),
    _kill("written", "after a write to Redis", 150, "forget_offsets", short=True),
    _kill("half_published", "with half of a publish on the topic", 300, "forget_offsets"),
    _kill("published", "after a publish", 150, "forget_offsets"),
    _kill("committing", "before a commit", 5, "forget_offsets"),
    _kill("committed", "after a commit", 5, "forget_offsets"),
)


def _drain(scene: Scene) -> None:
    """SIGTERM while every publish takes a while: there is something in hand at any time."""
    (worker,) = scene.workers
    began = time.monotonic()
    code = worker.process.stop()
    took_s = time.monotonic() - began
    grace_s = float(SETTINGS["shutdown_timeout_s"])
    scene.require(code == 0, f"exit code {code} after SIGTERM")
    scene.require(took_s < grace_s, f"the stop took {took_s:.1f} s, longer than {grace_s:.0f} s")
    scene.ended()
    scene.worker()


def _paused(worker: WorkerProcess) -> bool:
    """Whether a process is stopped by SIGSTOP."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return "State:\tT" in status


def _assigned(worker: WorkerProcess) -> float:
    return worker.metric("streamrec_assigned_partitions")


def _zombie(scene: Scene) -> None:
    """Stopped with a batch in hand; another takes over; the first wakes, and is left alone."""
    sleeper, heir = scene.workers
    eventually(lambda: _paused(sleeper), "one stopped itself")
    scene.began()
    eventually(lambda: _assigned(heir) == PARTITIONS, "the other has all partitions")
    scene.wait_for_commits(500)
    sleeper.process.signal(signal.SIGCONT)
    scene.ended()
    eventually(lambda: 0 < _assigned(heir) < PARTITIONS, "it has joined again")
    scene.wait_for_commits(400)
    # Whatever the sleeper remembers of before is of use to nobody now.
    scene.require(heir.process.stop() == 0, "the other did not stop in order")
    scene.wait_for_commits(600)


def _join_and_leave(scene: Scene) -> None:
    """A second and a third worker join; one leaves in order, one is killed."""
    second = scene.worker()
    scene.wait_for_commits(400)
    third = scene.worker()
    scene.wait_for_commits(400)
    scene.require(second.process.stop() == 0, "the second did not stop in order")
    scene.wait_for_commits(400)
    third.process.kill()
    scene.ended()
    scene.wait_for_commits(800)


def _jump(scene: Scene, *, shift_s: int) -> None:
    """The wall clock jumps under a running worker."""
    (worker,) = scene.workers
    worker.process.signal(signal.SIGRTMIN)
    scene.ended()
    scene.wait_for_commits(1200)
    lists = [scene.world.cached(f"user-{number}") for number in range(50)]
    newest_s = max(one["generated_at_ms"] for one in lists if one) / 1000
    oldest_s = min(one["generated_at_ms"] for one in lists if one) / 1000
    made_s = newest_s if shift_s > 0 else oldest_s
    scene.require(abs(made_s - time.time() - shift_s) < 60, "the clock of the worker did not jump")


def _clock(name: str, shift_s: int) -> Cell:
    return Cell(
        name,
        f"the worker's wall clock jumps by {shift_s / HOUR_S:+.0f} h; events spread over 2 h",
        partial(_jump, shift_s=shift_s),
        "wall_clock",
        inject={CLOCK_SHIFT: str(shift_s)},
        plan=Plan(spread_ms=HOUR_S * 1000, base_ms=int(time.time() * 1000)),
        settings={"event_max_future_s": str(3 * HOUR_S)},
    )


def _full_mirror(scene: Scene) -> None:
    """A new version does not fit; the old one serves on; then there is room."""
    (worker,) = scene.workers
    mirror = scene.world.directory / "mirror"
    with _no_room(worker, mirror) as make_room:
        # Larger than what is left there.
        items = (*ITEMS, *(f"more-{number}" for number in range(50_000)))
        tiny_bundle(
            scene.world.directory / "registry" / "posts" / "v2",
            items=items,
            model=tiny_model(items=len(items)),
        )
        eventually(lambda: "cannot be copied" in worker.log, "the copy fails")
        scene.wait_for_commits(400)
        scene.require(_serves(worker, "v1"), "the version that served does not serve on")
        make_room()
        scene.ended()
        eventually(lambda: _serves(worker, "v2"), "the new version serves")
        scene.wait_for_commits(400)


def _serves(worker: WorkerProcess, version: str) -> bool:
    lines = worker.get("/metrics")[1].splitlines()
    return any(
        line.startswith("streamrec_model_info{") and f'version="{version}"' in line
        for line in lines
    )


@contextmanager
def _no_room(worker: WorkerProcess, directory: Path) -> Iterator[Callable[[], None]]:
    """Leaves the worker no room in a directory until the function that is given is called: a small
    file system where one may be mounted, or else a bound on the size of its files."""
    assert worker.process.pid is not None
    if os.geteuid() == 0 and shutil.which("mount"):
        mount = ["mount", "-t", "tmpfs", "-o"]
        subprocess.run([*mount, "size=64k", "faults", str(directory)], check=True)
        try:
            yield lambda: _run([*mount, "remount,size=64m", "faults", str(directory)])
        finally:
            # Lazily: the worker may be reading from it still.
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
        return
    # Its log may grow to this as well.
    soft, hard = resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (256 << 10, hard))
    yield lambda: _unlimit(worker.process.pid or 0, soft, hard)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _unlimit(pid: int, soft: int, hard: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def _slow(scene: Scene, *, seconds: float) -> None:
    """What is slow was told to the worker; its memory stays bounded meanwhile."""
    (worker,) = scene.workers
    bound = int(SETTINGS["max_in_flight_events"]) + int(SETTINGS["batch_max_events"])
    ends = time.monotonic() + seconds
    worst = 0.0
    while time.monotonic() < ends:
        worst = max(worst, worker.metric("streamrec_in_flight_events"))
        time.sleep(0.2)
    scene.require(worst <= bound, f"{worst:.0f} events were in flight; at most {bound} may be")
    eventually(scene.keeps_up, "it has caught up")


CELLS = (
    *KILLS,
    Cell(
        "sigterm",
        "SIGTERM under load, publishing slowed to 0.3 s; started again",
        _drain,
        "no_drain",
        inject={INJECT: "publishing:60:sleep:0.3:100000"},
        most_repeats=0,
    ),
    Cell(
        "zombie-writing",
        "SIGSTOP before a write to Redis until another worker has its partitions; SIGCONT",
        _zombie,
        "write_regardless",
        short=True,
        workers=2,
        inject={INJECT: "scored:40:stop"},
        # So many that few have a later event, whose write would heal what the zombie wrote.
        plan=Plan(users=1500),
        settings=MANY_AT_ONCE,
    ),
    Cell(
        "zombie-publishing",
        "the same, before a publish",
        _zombie,
        "keep_cache",
        workers=2,
        inject={INJECT: "publishing:15:stop"},
        settings=MANY_AT_ONCE,
    ),
    Cell(
        "join-and-leave",
        "two workers join; one leaves by SIGTERM, one by SIGKILL",
        _join_and_leave,
        "keep_cache",
    ),
    _clock("clock-forward", HOUR_S),
    _clock("clock-back", -HOUR_S),
    Cell(
        "registry-disk-full",
        "no room for a new version in the registry's mirror; then room",
        _full_mirror,
        "failed_copy_is_fatal",
        settings={"registry_poll_s": "0.5"},
        mirrored=True,
    ),
    Cell(
        "slow-output",
        "publishing takes 1 s for 10 s",
        partial(_slow, seconds=12.0),
        "no_backpressure",
        inject={INJECT: "publishing:100:sleep:1:10"},
    ),
    Cell(
        "slow-scoring",
        "scoring takes 0.3 s for 9 s",
        partial(_slow, seconds=12.0),
        "drop_when_behind",
        inject={INJECT: "scored:150:sleep:0.3:30"},
    ),
)
