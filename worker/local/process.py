"""A server process on loopback: started, waited for, stopped by its own id, never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from worker.errors import LocalPartError

_WATCHER = Path(__file__).with_name("watcher.py")
_LOG_TAIL_LINES = 15


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ManagedProcess:
    """One command, its log and its life.

    Args:
        name: what it is, for messages.
        command: program and arguments.
        log_path: where its output goes, appended over restarts.
        ready: returns True once it serves; may raise OSError while it does not.
        stop_s: seconds from SIGTERM to SIGKILL.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        ready: Callable[[], bool],
        ready_timeout_s: float = 60.0,
        stop_s: float = 10.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command = list(command)
        self._ready = ready
        self._ready_timeout_s = ready_timeout_s
        self._stop_s = stop_s
        self._env = None if env is None else {**os.environ, **env}
        self._watcher: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._watcher is not None and self._watcher.poll() is None

    def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            LocalPartError: it exited or was not ready in time; says the end of its log.
        """
        if self.running:
            return
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._watcher = subprocess.Popen(
                [sys.executable, "-I", str(_WATCHER), str(self._stop_s), *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._env,
            )
        assert self._watcher.stdout is not None
        first_line = self._watcher.stdout.readline()
        if not first_line:
            raise LocalPartError(f"{self.name} could not be started. {self._log_tail()}")
        self.pid = int(first_line)
        deadline = time.monotonic() + self._ready_timeout_s
        while True:
            with suppress(OSError):
                if self._ready():
                    return
            if not self.running:
                raise LocalPartError(f"{self.name} exited at start. {self._log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise LocalPartError(
                    f"{self.name} was not ready after {self._ready_timeout_s:.0f} s."
                    f" {self._log_tail()}"
                )
            time.sleep(0.05)

    def stop(self) -> int | None:
        """SIGTERM, then SIGKILL after `stop_s`.

        Returns:
            Its exit code, or the number of the signal that ended it; None where it was not started.
        """
        if self._watcher is None:
            return None
        assert self._watcher.stdin is not None and self._watcher.stdout is not None
        self._watcher.stdin.close()
        code = self._watcher.wait(self._stop_s + 5.0)
        self._watcher.stdout.close()
        self._watcher = None
        self.pid = None
        return code

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.signal(signal.SIGKILL)
        self.stop()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process (SIGSTOP and SIGCONT pause and resume it)."""
        if self.pid is not None and self.running:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def exit_note(self) -> str:
        """How it ended, while it has not been stopped: its exit code or signal number."""
        code = None if self._watcher is None else self._watcher.poll()
        return "still running" if code is None else f"exit code {code}"

    def _log_tail(self) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        except OSError:
            lines = []
        return f"Its log is {self.log_path}; it ends:\n" + "\n".join(lines)


class LocalServer:
    """Base of the parts: a port of their own and one process, restartable in place."""

    def __init__(self, directory: Path, port: int | None) -> None:
        self.directory = directory
        self.port = free_port() if port is None else port
        self.process: ManagedProcess | None = None

    def _new_process(self) -> ManagedProcess:
        raise NotImplementedError

    def start(self) -> None:
        """Start on the same port as before, and wait until ready."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.process is None:
            self.process = self._new_process()
        self.process.start()

    def stop(self) -> None:
        """Stop in order."""
        if self.process is not None:
            self.process.stop()

    def kill(self) -> None:
        """End by SIGKILL."""
        if self.process is not None:
            self.process.kill()

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def kafka_answers(port: int) -> bool:
    """Whether a Kafka protocol server answers an ApiVersions request (KIP-35, version 0)."""
    body = (
        b"\x00\x12\x00\x00\x00\x00\x00\x01\xff\xff"  # ApiVersions v0, correlation 1, no client id
    )
    with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
        connection.sendall(len(body).to_bytes(4, "big") + body)
        answer = connection.recv(8)
    return len(answer) == 8 and answer[4:] == b"\x00\x00\x00\x01"
