"""The load generator: a process that sends by the clock and never waits for who reads.

It is told what to do over a pipe, one request at a time; `Generator` is the end that tells.
"""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from confluent_kafka import Producer

from benchmarks.child import Child
from benchmarks.errors import BenchmarkError
from benchmarks.schedule import Pace, quantile
from benchmarks.workloads import (
    Draw,
    WorkloadSpec,
    encode,
    first_timestamp_ms,
    probe_name,
    workload,
)

#: A record: user, item, partition (or -1 for the key's).
_Send = tuple[str, str, int]
_NEXT_DUE_S = 0.0005
_LEAD_S = 0.1


@dataclass(frozen=True)
class Backlog:
    """Send `count` events as fast as the broker takes them, then one probe to each partition."""

    topic: str
    count: int
    #: Probe by partition; sent last.
    last: dict[int, int]


@dataclass(frozen=True)
class Paced:
    """Send by `pace`."""

    topic: str
    pace: Pace


@dataclass(frozen=True)
class Track:
    """Start a new stream of events; remember what these users are sent."""

    spec: WorkloadSpec
    users: frozenset[str]


@dataclass(frozen=True)
class Tracked:
    """Ask what they were sent."""


@dataclass(frozen=True)
class Sent:
    """What was done. Times are `time.monotonic()`, lateness is in milliseconds."""

    events: int
    started_at: float
    seconds: float
    late_p99_ms: float = 0.0
    late_max_ms: float = 0.0


class Generator(Child):
    """The generator process. A context manager; dies with this process.

    Raises:
        BenchmarkError: (by any request) it could not send, or is gone.
    """

    def __init__(self, bootstrap: str) -> None:
        super().__init__(_serve, bootstrap)

    def start_stream(self, spec: WorkloadSpec, users: frozenset[str] = frozenset()) -> None:
        """Begin a stream of events; of `users` it is remembered what they are sent."""
        self._ask(Track(spec, users))

    def backlog(self, request: Backlog) -> Sent:
        """Send a backlog; returns when the broker has all of it."""
        return self._sent(request, lambda: None)

    def paced(self, request: Paced, meanwhile: Callable[[], None]) -> Sent:
        """Send by the clock; calls `meanwhile` about once a second."""
        return self._sent(request, meanwhile)

    def tracked(self) -> dict[str, list[str]]:
        """Items that the users named in `start_stream` were sent, in order."""
        found = self._ask(Tracked())
        assert isinstance(found, dict)
        return found

    def _sent(self, request: object, meanwhile: Callable[[], None]) -> Sent:
        sent = self._ask(request, meanwhile)
        assert isinstance(sent, Sent)
        return sent

    def _ask(self, request: object, meanwhile: Callable[[], None] = lambda: None) -> object:
        try:
            self._pipe.send(request)
            while not self._pipe.poll(1.0):
                meanwhile()
            answer: object = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise BenchmarkError(f"the load generator is gone ({error!r})") from None
        if isinstance(answer, str):
            raise BenchmarkError(f"the load generator failed: {answer}")
        return answer


def _serve(pipe: Connection, bootstrap: str) -> None:
    sender = _Sender(bootstrap)
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(sender.do(request))
        except Exception as error:
            pipe.send(repr(error))


class _Sender:
    """Lives in the generator process."""

    def __init__(self, bootstrap: str) -> None:
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "acks": "all",
                "linger.ms": 1,
                "partitioner": "murmur2",
                "queue.buffering.max.messages": 2_000_000,
                "queue.buffering.max.kbytes": 1_000_000,
                "log_level": 0,
            }
        )
        self._draws: Iterator[Draw] = iter(())
        self._time_ms = first_timestamp_ms()
        self._users: frozenset[str] = frozenset()
        self._tracked: dict[str, list[str]] = {}

    def do(self, request: object) -> object:
        if isinstance(request, Track):
            self._draws = workload(request.spec).draws()
            self._users, self._tracked = request.users, defaultdict(list)
            return None
        if isinstance(request, Tracked):
            return dict(self._tracked)
        if isinstance(request, Backlog):
            return self._backlog(request)
        assert isinstance(request, Paced)
        return self._paced(request)

    def _backlog(self, request: Backlog) -> Sent:
        started = time.monotonic()
        for number in range(request.count):
            self._send(request.topic, *next(self._draws))
            if number % 1000 == 0:
                self._producer.poll(0)
        # Nothing may come after the last ones.
        self._flush()
        for partition, probe in request.last.items():
            _, item = next(self._draws)
            self._send(request.topic, probe_name(probe), item, partition)
        self._flush()
        sent = request.count + len(request.last)
        return Sent(sent, started, time.monotonic() - started)

    def _paced(self, request: Paced) -> Sent:
        pace, topic = request.pace, request.topic
        late = array("d")
        sent = 0
        started = time.monotonic() + _LEAD_S
        while sent < pace.count:
            now = time.monotonic() - started
            due = pace.due_by(now) if now >= 0 else 0
            if sent < due:
                late.append(1000.0 * (now - pace.due_s(sent)))
            while sent < due:
                user, item = next(self._draws)
                probe = pace.probe_of(sent)
                self._send(topic, user if probe is None else probe_name(probe), item)
                sent += 1
            self._producer.poll(0)
            wait_s = pace.due_s(sent) - (time.monotonic() - started)
            if wait_s > 0:
                time.sleep(max(wait_s, _NEXT_DUE_S))
        self._flush()
        ordered = sorted(late)
        return Sent(sent, started, time.monotonic() - started, quantile(ordered, 0.99), ordered[-1])

    def _send(self, topic: str, user: str, item: str, partition: int = -1) -> None:
        if user in self._users:
            self._tracked[user].append(item)
        self._time_ms += 1
        key = user.encode()
        value = encode(key, item.encode(), self._time_ms)
        options: dict[str, Any] = {} if partition < 0 else {"partition": partition}
        while True:
            try:
                self._producer.produce(topic, value, key, **options)
            except BufferError:
                self._producer.poll(0.01)
            else:
                return

    def _flush(self) -> None:
        left = self._producer.flush(60.0)
        if left:
            raise BenchmarkError(f"the broker did not take {left} events in 60 s")
