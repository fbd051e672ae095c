"""A made-up follow graph that grows in time. Synthetic: no real users, no real platform.

No real follow graph with times ships in a package that we know of, so tests and documentation use
this one. Figures on it say that the code does what it should, not how good it is on real users.

What is put in, after what is known of social networks:

- communities: everybody is of one, every fifth user of a second, and few follow outside theirs;
- preferential attachment: who has followers gains more (Barabási & Albert, Science 1999), also of
  late, so that somebody's followers come in bursts;
- triadic closure: one follows whom those whom one follows follow (Holme & Kim, Phys. Rev. E 2002);
- reciprocity: one follows back;
- users differ in how active they are (log-normal), come in sessions of a few follows, and join over
  time.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate

import numpy as np

from models.events import TYPE_CODES, EventLog, Events, SourceError
from worker.events import EventType

#: 2025-01-01T00:00:00Z and a year, in milliseconds.
_START_MS, _SPAN_MS = 1_735_689_600_000, 365 * 24 * 3600 * 1000
#: Users of a community on average.
_COMMUNITY = 200
#: Share of the users that are there from the beginning.
_EARLY = 0.3
#: Follows of a session on average.
_SESSION = 3.0
#: How often each way of finding somebody is taken first; the rest meet somebody at random.
_RECIPROCITY, _CLOSURE, _ATTACHMENT, _BURST = 0.2, 0.4, 0.2, 0.1
_BOUNDS = list(accumulate([_RECIPROCITY, _CLOSURE, _ATTACHMENT, _BURST]))
#: How many of the last follows a user has in mind.
_LATELY = 5
#: How often somebody of other communities is followed once they are met.
_OUTSIDE = 0.1
_TRIES = 20


def synthetic_follows(users: int, events: int, seed: int, *, limit: int | None = None) -> Events:
    """`events` distinct follows among at most `users` users within a year; surface `friends`.

    Ids are `user-1` and so on; nobody follows themselves, nobody anybody twice. The same arguments
    give the same events.

    Args:
        limit: keep the first `limit` events by time.

    Raises:
        SourceError: fewer than 20 users, or more follows than a tenth of all pairs.
    """
    if users < 20 or not 1 <= events <= users * (users - 1) // 10:
        raise SourceError(
            f"{events} follows among {users} users cannot be made up: give 20 users or more, and"
            " follows for at most a tenth of their pairs"
        )
    # One draw at a time: the standard library's generator is ten times faster at that than NumPy's.
    rng = random.Random(seed)
    graph = _Growing(users, rng)
    followers: list[int] = []
    followed: list[int] = []
    activity = list(accumulate(rng.lognormvariate(0.0, 0.7) for _ in range(users)))
    while len(followed) < events:
        joined = max(20, int(users * (_EARLY + (1.0 - _EARLY) * len(followed) / events)))
        follower = bisect_right(activity, rng.random() * activity[joined - 1])
        while len(followed) < events:
            target = graph.meet(follower, joined)
            if target is None:
                break
            followers.append(follower)
            followed.append(target)
            if rng.random() < 1.0 / _SESSION:
                break
    times = np.array(sorted(rng.randrange(_SPAN_MS) for _ in range(events))) + _START_MS
    log = EventLog()
    log.extend(
        log.users.codes(f"user-{number + 1}" for number in followers),
        log.items.codes(f"user-{number + 1}" for number in followed),
        np.full(events, TYPE_CODES[EventType.FOLLOW], dtype=np.int8),
        times,
    )
    digest = hashlib.sha256(np.array([followers, followed, times.tolist()]).tobytes())
    return log.events(
        name=f"synthetic follows ({users} users, {events} follows, seed {seed})",
        sha256=digest.hexdigest(),
        limit=limit,
    )


class _Growing:
    """The graph as it grows; users are 0-based, in the order in which they join."""

    def __init__(self, users: int, rng: random.Random) -> None:
        self._rng = rng
        self._out: list[list[int]] = [[] for _ in range(users)]
        self._into: list[list[int]] = [[] for _ in range(users)]
        self._pairs: set[tuple[int, int]] = set()
        count = max(2, users // _COMMUNITY)
        self._members: list[list[int]] = [[] for _ in range(count)]
        #: Whom members of a community followed, in time order: an urn that favours the followed.
        self._urns: list[list[int]] = [[] for _ in range(count)]
        self._of: list[list[int]] = []
        for user in range(users):
            own = [rng.randrange(count) for _ in range(1 + (rng.random() < 0.2))]
            self._of.append(own)
            for community in set(own):
                self._members[community].append(user)

    def meet(self, follower: int, joined: int) -> int | None:
        """Let `follower` follow somebody new; None where nobody is found."""
        ways: tuple[Callable[[int, int], int | None], ...] = (
            self._back, self._closing, self._followed, self._rising, self._anybody,
        )  # fmt: skip
        for _ in range(_TRIES):
            way = ways[bisect_right(_BOUNDS, self._rng.random())]
            target = way(follower, joined)
            if target is not None and self._takes(follower, target):
                self._pairs.add((follower, target))
                self._out[follower].append(target)
                self._into[target].append(follower)
                self._urns[self._community(follower)].append(target)
                return target
        return None

    def _takes(self, follower: int, target: int) -> bool:
        if target == follower or (follower, target) in self._pairs:
            return False
        near = not set(self._of[follower]).isdisjoint(self._of[target])
        return near or self._rng.random() < _OUTSIDE

    def _back(self, follower: int, _: int) -> int | None:
        return self._one(self._into[follower][-2 * _LATELY :])

    def _closing(self, follower: int, _: int) -> int | None:
        through = self._one(self._out[follower][-_LATELY:])
        if through is None:
            return None
        theirs = self._out[through] if self._rng.random() < 0.8 else self._into[through]
        return self._one(theirs[-2 * _LATELY :])

    def _followed(self, follower: int, _: int) -> int | None:
        return self._one(self._urns[self._community(follower)])

    def _rising(self, follower: int, _: int) -> int | None:
        return self._one(self._urns[self._community(follower)][-2 * _LATELY :])

    def _anybody(self, follower: int, joined: int) -> int | None:
        """Mostly of the community, so that newcomers are found."""
        if self._rng.random() < 0.2:
            return self._rng.randrange(joined)
        members = self._members[self._community(follower)]
        return self._one(members[: bisect_left(members, joined)])

    def _community(self, user: int) -> int:
        return self._rng.choice(self._of[user])

    def _one(self, among: list[int]) -> int | None:
        return self._rng.choice(among) if among else None
