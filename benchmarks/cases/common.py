"""What every case is told, and how it says how far it is."""

from __future__ import annotations

import mmap
import struct
import sys
import time
from pathlib import Path

import msgspec

#: Events done (int64) and when the last of them was, in `time.monotonic()` (float64).
_LAYOUT = struct.Struct("<qd")


class CaseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything is. Paths are absolute."""

    bootstrap: str
    topic: str
    group: str
    redis: str
    bundle: str
    #: File that `Progress` shares with the harness.
    progress: str
    #: MessagePack map from user to model indexes, oldest first, of the histories known before.
    histories: str
    #: Events of one batch, where the case chooses it.
    batch: int = 512
    #: Longest that a batch waits to be filled, where the case chooses it.
    wait_s: float = 0.005
    #: Kafka gives a silent process's partitions away after this.
    session_s: int = 30
    top_k: int = 10
    #: Items of a user that are remembered (and never shown again).
    history_length: int = 200


class Progress:
    """A counter in a shared file: the harness reads it without asking the process.

    Args:
        path: of the file; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.done = 0

    def advance(self, events: int) -> None:
        """`events` more are done, now."""
        if not events:
            return
        self.done += events
        _LAYOUT.pack_into(self._map, 0, self.done, time.monotonic())

    def read(self) -> tuple[int, float]:
        """Events done, and when the last of them was."""
        done, at = _LAYOUT.unpack_from(self._map, 0)
        return int(done), float(at)


def read_config() -> CaseConfig:
    """The configuration whose path is the first argument."""
    return msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=CaseConfig)
