"""Run one command and end it when the process that started this one goes away.

Started by `process.py` as a script, with nothing but the standard library:

    python watcher.py <stop seconds> <command> [argument...]

Standard input is a pipe from the parent. It closes when the parent exits, however it exits, which
a signal handler or `atexit` could not promise for SIGKILL. The child's process id is the first line
on standard output.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1


def _die_with_watcher() -> None:
    # Should the watcher itself be killed, the kernel ends the child.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Returns the child's exit code, negative for a signal."""
    stop_s = float(sys.argv[1])
    # The parent's Ctrl-C reaches the whole foreground group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(
        sys.argv[2:],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        preexec_fn=_die_with_watcher,  # noqa: PLW1509 - this process has one thread
        start_new_session=True,
    )
    os.write(sys.stdout.fileno(), f"{child.pid}\n".encode())
    while child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.05)
        if readable and not os.read(sys.stdin.fileno(), 1024):
            child.terminate()
            child.send_signal(signal.SIGCONT)
            deadline = time.monotonic() + stop_s
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            return child.wait()
    return child.returncode


if __name__ == "__main__":
    sys.exit(min(255, abs(main())))
