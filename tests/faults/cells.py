"""Every cell of the matrix, in the order of the table; and those about the worker's own process."""

from __future__ import annotations

import signal

from tests.faults import injected
from tests.faults.harness import Cell, Scene
from tests.integration.support import eventually


def _killed_inside(scene: Scene) -> None:
    """The worker kills itself at its point; its supervisor starts another at once."""
    scene.gone(scene.workers[0])
    scene.ended()
    scene.worker()
    scene.wait_for_commits(500)


def _kill(point: str, where: str, nth: int, mutation: str, *, short: bool = False) -> Cell:
    return Cell(
        f"kill-{point.replace('_', '-')}",
        f"SIGKILL {where}; restarted",
        _killed_inside,
        mutation,
        short=short,
        inject={injected.INJECT: f"{point}:{nth}:kill"},
        # Otherwise histories are read from Redis at the very start only.
        settings={"history_cache_mb": "0.01"} if point == "read" else {},
    )


KILLS = (
    _kill("fetched", "after a fetch", 150, "commit_at_start"),
    _kill("decoded", "after decoding", 300, "commit_at_start"),
    _kill("read", "after reading histories", 150, "commit_at_start"),
    _kill("scored", "after scoring", 300, "commit_at_start"),
    _kill("half_written", "with half of a write in Redis", 150, "commit_at_start"),
    _kill("written", "after the write to Redis", 150, "forget_offsets", short=True),
    _kill("half_published", "with half of a publish on the topic", 300, "commit_at_start"),
    _kill("published", "after the publish", 150, "forget_offsets"),
    _kill("committing", "before a commit", 5, "forget_offsets"),
    _kill("committed", "after a commit", 5, "commit_at_start"),
)


def _zombie(scene: Scene) -> None:
    """Stopped with a batch in hand; another takes over; then the stopped one wakes."""
    sleeper, heir = scene.workers
    scene.began()
    before = heir.metric("streamrec_assigned_partitions")
    eventually(lambda: heir.metric("streamrec_assigned_partitions") > before, "it took over")
    scene.wait_for_commits(500)
    sleeper.process.signal(signal.SIGCONT)
    scene.ended()
    scene.wait_for_commits(1000)


ZOMBIES = (
    Cell(
        "zombie-writes",
        "SIGSTOP before a write to Redis, until another worker has its partitions; SIGCONT",
        _zombie,
        "commit_at_start",
        workers=2,
        inject={injected.INJECT: "scored:200:stop"},
    ),
)

CELLS = (*KILLS, *ZOMBIES)
