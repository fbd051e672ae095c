"""`streamrec` with a fault inside: `python -m tests.faults.injected worker`.

The code under test has no hooks; this module wraps the functions that lie at its stage boundaries,
then runs the ordinary command. What it does is said by the environment:

- `FAULTS_INJECT=<point>:<nth>:<action>[:<seconds>[:<times>]]`: at the nth passage of the point do
  the action: `stop` the process (SIGSTOP), or `sleep` for so many seconds at this and the next
  `times - 1` passages, or `kill` the process (SIGKILL) after so many seconds in which what lies
  beyond the point is not reached, and all else goes on: a commit too early would come then.
- `FAULTS_CLOCK_SHIFT_S`: SIGRTMIN (Faust takes SIGUSR1 and SIGUSR2) moves the wall clock
  (`time.time`) by so many seconds.
- `FAULTS_MUTATION`: the name of a mutation, see `mutations.py`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

INJECT = "FAULTS_INJECT"
CLOCK_SHIFT = "FAULTS_CLOCK_SHIFT_S"
MUTATION = "FAULTS_MUTATION"


@dataclass(frozen=True)
class Point:
    """A stage boundary: before or after a function (`module:Class.method`).

    Only passages count whose result (or, before, whose arguments) `counts`.
    """

    target: str
    after: bool = True
    counts: Callable[[Any], bool] = lambda _: True


POINTS: dict[str, Point] = {
    "fetched": Point("worker.intake:BatchConsumerThread._fetch_records", counts=bool),
    "decoded": Point("worker.events:Decoder.decode"),
    "read": Point("worker.histories:Histories.load", counts=bool),
    "scored": Point("worker.lists:ListMaker.make"),
    "sent": Point("worker.early_write:EarlyWrite.users"),
    "written": Point("worker.processor:Processor._write"),
    "publishing": Point(
        "worker.outbox:Outbox.send", after=False, counts=lambda args: bool(args[1])
    ),
    "published": Point("worker.pipeline:Pipeline._publish"),
    "committing": Point("worker.intake:BatchConsumerThread._commit", after=False),
    "committed": Point("worker.intake:BatchConsumerThread._commit", counts=bool),
}
#: Points inside a step, each set up by a function of its own.
INSIDE = ("half_written", "half_published")


class Trigger:
    """Counts passages, and acts at the nth."""

    def __init__(self, nth: int, action: str, seconds: float = 0.0, times: int = 1) -> None:
        self._nth = nth
        self._action = action
        self._seconds = seconds
        self._times = times
        self._passed = 0

    def due_s(self) -> float:
        """Act; returns how long to sleep, in seconds."""
        self._passed += 1
        if not self._nth <= self._passed < self._nth + self._times:
            return 0.0
        if self._action == "sleep":
            return self._seconds
        if self._action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return 0.0
        threading.Timer(self._seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return self._seconds + 60.0


def trigger(spec: str) -> tuple[str, Trigger]:
    """Point and trigger of a specification."""
    point, nth, action, *rest = spec.split(":")
    if point not in POINTS and point not in INSIDE:
        raise ValueError(f"no point {point}: {', '.join([*POINTS, *INSIDE])}")
    seconds = float(rest[0]) if rest else 0.0
    return point, Trigger(int(nth), action, seconds, int(rest[1]) if len(rest) > 1 else 1)


def replace(target: str, make: Callable[[Any], Any]) -> None:
    """Put `make(function)` in the place of the function `module:Class.name`."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, make(getattr(owner, name)))


def _at(point: Point, trigger: Trigger) -> None:
    def wrap(function: Any) -> Any:
        def due_s(value: Any) -> float:
            return trigger.due_s() if point.counts(value) else 0.0

        @functools.wraps(function)
        async def waited_for(*args: Any, **kwargs: Any) -> Any:
            if not point.after:
                await asyncio.sleep(due_s(args))
            result = await function(*args, **kwargs)
            if point.after:
                await asyncio.sleep(due_s(result))
            return result

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if not point.after:
                time.sleep(due_s(args))
            result = function(*args, **kwargs)
            if point.after:
                time.sleep(due_s(result))
            return result

        return waited_for if asyncio.iscoroutinefunction(function) else called

    replace(point.target, wrap)


def _half_written(trigger: Trigger) -> None:
    """Half of a write's bytes reach Redis, and are worked on, before the trigger."""
    writing = False

    def mark(function: Any) -> Any:
        def write(*args: Any, **kwargs: Any) -> Any:
            nonlocal writing
            writing = True
            try:
                return function(*args, **kwargs)
            finally:
                writing = False

        return write

    def cut(function: Any) -> Any:
        def send(self: Any, command: Any, check_health: bool = True) -> Any:
            if not writing or b"EVALSHA" not in bytes(b"".join(command)):
                return function(self, command, check_health)
            data = b"".join([command] if isinstance(command, bytes) else command)
            function(self, [data[: len(data) // 2]], check_health)
            time.sleep(trigger.due_s())
            return self._sock.sendall(data[len(data) // 2 :])

        return send

    replace("worker.cache:BatchWrite.users", mark)
    replace("redis.connection:AbstractConnection.send_packed_command", cut)


def _half_published(trigger: Trigger) -> None:
    """The first of a write's record batches is acknowledged before the trigger."""

    def wrap(function: Any) -> Any:
        async def send_batch(*args: Any, **kwargs: Any) -> Any:
            sent = await function(*args, **kwargs)
            await sent
            await asyncio.sleep(trigger.due_s())
            return sent

        return send_batch

    replace("aiokafka:AIOKafkaProducer.send_batch", wrap)


def _shift_clock(shift_s: float) -> None:
    real, shifted = time.time, 0.0

    def jump(*_: object) -> None:
        nonlocal shifted
        shifted = shift_s

    time.time = lambda: real() + shifted
    signal.signal(signal.SIGRTMIN, jump)


def main() -> None:
    """Set the fault up, then run the command line."""
    # Before any module takes `time` from `time`.
    if CLOCK_SHIFT in os.environ:
        _shift_clock(float(os.environ[CLOCK_SHIFT]))
    if MUTATION in os.environ:
        from tests.faults.mutations import MUTATIONS

        MUTATIONS[os.environ[MUTATION]].apply()
    if INJECT in os.environ:
        name, at = trigger(os.environ[INJECT])
        if name == "half_written":
            _half_written(at)
        elif name == "half_published":
            _half_published(at)
        else:
            _at(POINTS[name], at)
    from worker.cli import main as command

    command()


if __name__ == "__main__":
    main()
