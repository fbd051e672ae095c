"""What is sent: endless streams of events, and the histories that their users bring along.

- `social`: many users, none much busier than the rest, so that consecutive events are mostly of
  different ones; half of what a user takes is popular, half is of their own interest.
- `ml-100k`: the ratings of MovieLens 100K in time order. Bursty: a user's events come together.

Probe users (`probe-0`, `probe-1`, ...) come on top of both. Each is sent one event only, so that
the one list written for it tells when that event was served. Everything is drawn from a seed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from worker.local.ml100k import load_ml100k

Kind = Literal["social", "ml-100k"]
#: User, item. Both are ids as events carry them.
Draw = tuple[str, str]

#: Events say that they happened a millisecond after each other, from this long before now: the
#: worker refuses the future.
_SINCE_MS = 2 * 24 * 3600 * 1000
_CHUNK = 8192
_TEMPLATE = b'{"user_id":"%b","item_id":"%b","event_type":"view","surface":"posts","timestamp":%d}'


@dataclass(frozen=True)
class WorkloadSpec:
    """What to draw; picklable, so that other processes draw the same.

    Args:
        items: ids in the order of the model's indexes.
        history: items that each user has behind them when measuring starts (`social` and probes).
        probes: probe users that have such a history.
    """

    kind: Kind
    items: tuple[str, ...]
    users: int = 10_000
    history: int = 50
    probes: int = 10_000
    seed: int = 7


class Workload(Protocol):
    """A stream of events and what came before it."""

    def draws(self) -> Iterator[Draw]:
        """Users and items, endlessly."""
        ...

    def histories(self, users: int | None = None) -> Iterator[tuple[str, list[int]]]:
        """Users and the model indexes (from 1) of their histories, oldest first.

        Args:
            users: only the first so many, beside the probes.
        """
        ...


def workload(spec: WorkloadSpec) -> Workload:
    """The workload that `spec` describes."""
    return Social(spec) if spec.kind == "social" else Ml100kReplay(spec)


def probe_name(number: int) -> str:
    """User id of a probe."""
    return f"probe-{number}"


def encode(user: bytes, item: bytes, timestamp_ms: int) -> bytes:
    """An event as docs/events.md has it."""
    return _TEMPLATE % (user, item, timestamp_ms)


def first_timestamp_ms() -> int:
    """Time of the first event of a stream that starts now."""
    return int(time.time() * 1000) - _SINCE_MS


class Social:
    """The workload `social`."""

    def __init__(self, spec: WorkloadSpec) -> None:
        self._spec = spec
        rng = np.random.default_rng(spec.seed)
        count = len(spec.items)
        #: Zipf's law with a flat head (Mandelbrot), for items and, flatter, for users.
        self._item_edges = _edges((np.arange(count) + 20.0) ** -1.0)
        self._user_edges = _edges((np.arange(spec.users) + 50.0) ** -0.6)
        self._by_rank = rng.permutation(count)
        self._centre = rng.integers(0, count, spec.users + spec.probes)
        self._spread = max(1.0, count / 50)

    def draws(self) -> Iterator[Draw]:
        """Users and items, endlessly."""
        rng = np.random.default_rng(self._spec.seed + 1)
        items = self._spec.items
        while True:
            users = np.searchsorted(self._user_edges, rng.random(_CHUNK))
            for user, item in zip(users.tolist(), self._items(rng, users).tolist(), strict=True):
                yield f"user-{user}", items[item]

    def histories(self, users: int | None = None) -> Iterator[tuple[str, list[int]]]:
        """Users and their histories; probes last."""
        spec = self._spec
        rng = np.random.default_rng(spec.seed + 2)
        known = spec.users if users is None else min(users, spec.users)
        for user in itertools.chain(range(known), range(spec.users, spec.users + spec.probes)):
            name = f"user-{user}" if user < spec.users else probe_name(user - spec.users)
            drawn = self._items(rng, np.full(spec.history, user)) + 1
            yield name, without_repeats(drawn.tolist())

    def _items(self, rng: np.random.Generator, users: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of items int64 `[n]`, one for each of `users`."""
        n = len(users)
        popular = self._by_rank[np.searchsorted(self._item_edges, rng.random(n))]
        near = self._centre[users] + (rng.standard_exponential(n) * self._spread).astype(np.int64)
        return np.where(rng.random(n) < 0.5, popular, near % len(self._spec.items))


class Ml100kReplay:
    """The workload `ml-100k`. When it is over it starts again with other users."""

    def __init__(self, spec: WorkloadSpec) -> None:
        data = load_ml100k()
        self._spec = spec
        self._users, self._items = data.users.tolist(), data.items.tolist()

    def draws(self) -> Iterator[Draw]:
        """Users and items, endlessly."""
        for round_ in itertools.count():
            for user, item in zip(self._users, self._items, strict=True):
                yield f"{user}.{round_}", item

    def histories(self, users: int | None = None) -> Iterator[tuple[str, list[int]]]:
        """Probes and theirs: pieces of the replay. Other users start with nothing."""
        index = {item: place for place, item in enumerate(self._spec.items, start=1)}
        known = [index[item] for item in self._items if item in index]
        for probe in range(self._spec.probes):
            start = (probe * 7) % (len(known) - self._spec.history)
            yield probe_name(probe), without_repeats(known[start : start + self._spec.history])


def without_repeats(items: list[int]) -> list[int]:
    """`items` without those equal to the one before them, as a history keeps them."""
    return [item for item, _ in itertools.groupby(items)]


def known_items(names: tuple[str, ...], indexes: list[int]) -> list[str]:
    """Ids of model indexes (from 1)."""
    return [names[at - 1] for at in indexes]


def expected_items(before: list[str], sent: list[str], length: int) -> list[str]:
    """What a history of at most `length` items is after `sent` events, all in order."""
    return [item for item, _ in itertools.groupby([*before, *sent])][-length:]


def _edges(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a number in [0, 1) falls by `weights`."""
    return np.cumsum(weights / weights.sum())[:-1]


def as_map(pairs: Iterator[tuple[str, list[int]]]) -> Mapping[str, list[int]]:
    """For the file that peers read."""
    return dict(pairs)
