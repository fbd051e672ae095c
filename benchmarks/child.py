"""A helper process that is asked over a pipe, so that it can be pinned apart."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, Self


class Child:
    """A process that runs `serve(pipe, *arguments)`. A context manager; dies with this process."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10.0)
        self._process.kill()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid
