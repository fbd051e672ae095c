"""A store that fails on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class Killed(BaseException):
    """The publisher dies here: nothing catches that."""


class FaultyFileSystem(MemoryFileSystem):
    """A store of its own that dies before its `dies_at`-th change, or in the middle of it."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0
        self.dies_at: int | None = None
        #: A change that dies leaves half its bytes: sftp does so, object stores do not.
        self.leaves_half = False
        self.flips_bytes = False

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._write(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        self._write(path, value)

    def rm_file(self, path: str) -> None:
        self._count()
        super().rm_file(path)

    def _write(self, path: str, data: bytes) -> None:
        try:
            self._count()
        except Killed:
            if self.leaves_half:
                super().pipe_file(path, data[: len(data) // 2])
            raise
        if self.flips_bytes:
            data = data[:-1] + bytes([data[-1] ^ 1])
        super().pipe_file(path, data)

    def _count(self) -> None:
        self.changes += 1
        if self.changes == self.dies_at:
            raise Killed
