"""Sees from outside when a list is in Redis: a process that hears of each probe's key being set.

Redis itself tells it (keyspace notifications), so it sees all systems alike and asks none of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from redis import Redis
from redis.exceptions import RedisError

from benchmarks.child import Child
from benchmarks.errors import BenchmarkError

#: For `redis-server`: tell of strings that are set, by key.
NOTIFICATIONS = ("--notify-keyspace-events", "K$")
_PATTERN = "__keyspace@0__:rec:{probe-*"
_PROBE = re.compile(rb"\{probe-(\d+)\}")


@dataclass(frozen=True)
class _Connect:
    url: str


@dataclass(frozen=True)
class _Wait:
    probes: frozenset[int]
    seconds: float


class Observer(Child):
    """The observing process. A context manager; dies with this process."""

    def __init__(self) -> None:
        super().__init__(_serve)

    def watch(self, url: str) -> None:
        """Watch another Redis from now on; what was seen is forgotten."""
        self._ask(_Connect(url), 30.0)

    def wait(self, probes: Iterable[int], seconds: float) -> dict[int, float]:
        """When (`time.monotonic()`) each of `probes` was served.

        Waits until all are, at most `seconds`; the others are missing from the answer.
        """
        answer = self._ask(_Wait(frozenset(probes), seconds), seconds + 30.0)
        assert isinstance(answer, dict)
        return answer

    def _ask(self, request: object, seconds: float) -> object:
        try:
            self._pipe.send(request)
            if not self._pipe.poll(seconds):
                raise BenchmarkError("the observer does not answer")
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise BenchmarkError(f"the observer is gone ({error!r})") from None


def _serve(pipe: Connection) -> None:
    subscription = None
    seen: dict[int, float] = {}
    wanted: _Wait | None = None
    deadline = 0.0
    while True:
        try:
            if pipe.poll(0 if subscription is not None else None):
                request = pipe.recv()
                if isinstance(request, _Connect):
                    subscription = Redis.from_url(request.url).pubsub()
                    subscription.psubscribe(_PATTERN)
                    subscription.get_message(timeout=5.0)  # that it is subscribed
                    seen = {}
                    pipe.send(None)
                else:
                    wanted, deadline = request, time.monotonic() + request.seconds
        except (EOFError, OSError):
            return
        if subscription is None:
            continue
        try:
            message = subscription.get_message(timeout=0.02)
        except (RedisError, OSError):
            # Redis was stopped: the next case brings another.
            subscription, message = None, None
            deadline = 0.0
        now = time.monotonic()
        if message is not None and message["type"] == "pmessage":
            found = _PROBE.search(message["channel"])
            if found is not None:
                seen.setdefault(int(found.group(1)), now)
        if wanted is not None and (wanted.probes <= seen.keys() or now > deadline):
            pipe.send({probe: seen[probe] for probe in wanted.probes if probe in seen})
            wanted = None
