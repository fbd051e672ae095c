"""Memory: how much there is, how much a bundle will need, and giving back what an old one had."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from worker.errors import BundleError, Refusal
from worker.manifest import ITEMS_FILE, MODEL_FILE, TEXT_FILE, Manifest

#: Bytes of a graph while it loads, and once it is loaded, over those of its file: ONNX Runtime
#: holds what it parsed beside the weights, and weights beside what it folds them to.
_LOADING, _LOADED = 3.1, 2.1
#: Bytes of an item beside the text of its id: a string, its places in a tuple and a dict, and what
#: ranking the whole catalogue once, which the checks do, leaves to the arena.
_ITEM = 280
#: Bytes of one item's score of one history while lists are made.
_SCORE = 8
#: Items that approximate retrieval scores, over the most that it gives.
_CANDIDATES = 4
#: What any session has, however small.
_SESSION = 16 << 20
#: From here on a block is one of its own to the allocator; glibc's default, which it would raise.
_LARGE_BLOCK = 128 << 10
_M_MMAP_THRESHOLD = -3  # malloc.h


def expected_bytes(manifest: Manifest, *, rows: int) -> int:
    """Most memory, in bytes, that the bundle takes while it is opened and while it serves.

    An estimate from what the manifest says, made to lie above what was measured (docs/bundle.md).

    Args:
        rows: histories of one run.
    """
    size = {name: file.bytes for name, file in manifest.files.items()}
    graphs = size.get(MODEL_FILE, 0) + size.get(TEXT_FILE, 0)
    items = size.get(ITEMS_FILE, 0) + _ITEM * manifest.item_count
    scored = manifest.item_count
    if manifest.max_k is not None:
        scored = min(scored, _CANDIDATES * manifest.max_k)
    scores = _SCORE * rows * scored
    return _SESSION + round(max(_LOADING * graphs, _LOADED * graphs + items + scores))


def check_budget(manifest: Manifest, budget_bytes: int, *, rows: int) -> None:
    """Whether the bundle can be opened in `budget_bytes`.

    Raises:
        BundleError: it needs more.
    """
    wanted = expected_bytes(manifest, rows=rows)
    if wanted > budget_bytes:
        raise BundleError(
            f"it needs about {wanted / 1e6:.0f} MB and {budget_bytes / 1e6:.0f} MB are free: give"
            " the worker more memory, or make the model smaller (streamrec models compress)",
            Refusal.MEMORY,
        )


class Room(NamedTuple):
    """Memory of whatever bounds this process the closest, in bytes."""

    left: int
    limit: int


def room(root: Path = Path("/")) -> Room | None:
    """What the machine and each control group (version 1 or 2) of this process leave it: the one
    that leaves least. None where the system does not say.

    Cached files count as free, since they give way.

    Args:
        root: where `proc` and `sys` lie.
    """
    rooms = [*_groups(root)]
    machine = _table(root / "proc/meminfo")
    if "MemAvailable:" in machine:
        left = machine["MemAvailable:"]
        rooms.append(Room(left * 1024, machine.get("MemTotal:", left) * 1024))
    return min(rooms) if rooms else None


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory in bytes that this process can still take; None where the system does not say."""
    found = room(root)
    return None if found is None else found.left


def _groups(root: Path) -> Iterator[Room]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            mount, limit, used = "", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, used = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        top = root / "sys/fs/cgroup" / mount
        # A container sees its own group at the top, by whatever path the host has it.
        here = top / group.strip("/")
        for directory in [here, *here.parents]:
            most, now = _text(directory / limit).strip(), _text(directory / used).strip()
            if most.isdigit() and now.isdigit():
                stat = _table(directory / "memory.stat")
                cached = stat.get("inactive_file", stat.get("total_inactive_file", 0))
                yield Room(max(0, int(most) - int(now) + cached), int(most))
            if directory == top:
                break


def release_memory() -> None:
    """Give memory that is free back to the system; after an old model is gone.

    Without it, glibc keeps the pages of small blocks. No garbage is collected for it: a bundle is
    in no cycle, and a collection would stop all threads for as long as there are objects. Does
    nothing where the C library has no `malloc_trim`.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_large_blocks_apart() -> None:
    """Have glibc map each large block by itself, so that freeing it gives it back; at start.

    By default it stops doing so for sizes that were freed once, and what replaces a model then
    lies between smaller blocks that pin it. Does nothing where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _table(path: Path) -> dict[str, int]:
    """Numbers by name, of lines `name number ...`."""
    lines = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
