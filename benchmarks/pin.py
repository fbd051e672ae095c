"""Run a command on certain CPUs, in a directory: `python -m benchmarks.pin 0,2 DIR COMMAND ...`.

The command takes this process's place, so that its process id is the one that was started and no
thread of it ever ran elsewhere.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Pin, go there, become the command."""
    os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[1].split(",")})
    os.chdir(sys.argv[2])
    os.execvp(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()
