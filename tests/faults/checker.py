"""Was anything lost, done twice or done in another order? Compares the log of events with all that
came of it. No I/O.

The evidence is gathered once a cell is over: every record that was sent was also read, written and
committed by then, or never will be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import isclose

from tests.faults.model import Expected, LogRecord, Outcome, Place, User, outcome
from tests.faults.plan import Planned
from worker.events import Reason

#: Of the base-2 logarithm of a weight: sums are taken in another order, and stored as decimals.
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that must not be. `count` is how many events it is about."""

    kind: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


@dataclass(frozen=True, slots=True)
class StoredUser:
    """What Redis holds of one user on one surface."""

    entries: Sequence[tuple[str, int]]
    hidden: Sequence[str]
    #: Offset of the last record that was taken, by partition.
    applied: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class List:
    """Recommendations as stored or published."""

    user: User
    origin: Place
    items: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record of the dead-letter topic."""

    origin: Place
    reason: str
    key: bytes | None
    value: bytes | None


@dataclass(frozen=True)
class Evidence:
    """All that one cell left behind."""

    #: What the broker acknowledged, by number.
    accepted: Mapping[int, Planned]
    #: What it did not acknowledge; it may be in the log all the same.
    doubtful: Mapping[int, Planned]
    #: The events topic; each partition's records in their order.
    log: Sequence[LogRecord]
    stored: Mapping[User, StoredUser]
    lists: Mapping[User, List]
    #: The recommendations topic; each partition's records in their order.
    published: Sequence[List]
    #: Null values on that topic: who, and where their tombstone lies.
    erasures: Sequence[tuple[str, Place]]
    dead_letters: Sequence[DeadLetter]
    #: Next offset to read, and to write, by partition.
    committed: Mapping[int, int]
    ends: Mapping[int, int]
    #: By surface and partition: weight of each item, as base-2 logarithm.
    popularity: Mapping[tuple[str, int], Mapping[str, float]]
    history_length: int
    half_life_ms: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checker found."""

    violations: Sequence[Violation]
    #: Records in the log.
    events: int
    #: Good events whose effects are all there.
    applied: int
    dead_letters: int
    #: What was published again for the same record: lists, dead letters, null values.
    repeats: int
    #: Lists published after one of a later event of the same user.
    steps_back: int
    lost: int


def check(evidence: Evidence) -> Verdict:
    """Compare all with all."""
    plan = {**evidence.doubtful, **evidence.accepted}
    good = [record for record in evidence.log if plan[record.number].reason is None]
    bad = {
        record.place: (record, reason)
        for record in evidence.log
        if (reason := plan[record.number].reason) is not None
    }
    expected = outcome(good, length=evidence.history_length, half_life_ms=evidence.half_life_ms)
    violations = [
        *_missing_from_log(evidence),
        *_uncommitted(evidence),
        *_histories(evidence, expected),
        *_lists(evidence, expected),
        *_published(evidence, expected),
        *_dead_letters(evidence, bad),
        *_popularity(evidence, expected),
    ]
    lost = sum(one.count for one in violations if one.kind in LOSSES)
    origins = Counter((one.user, one.origin) for one in evidence.published)
    letters = Counter(one.origin for one in evidence.dead_letters)
    erasures = Counter(evidence.erasures)
    published = (origins, letters, erasures)
    return Verdict(
        violations,
        events=len(evidence.log),
        applied=max(0, len(good) - lost),
        dead_letters=len(letters),
        repeats=sum(one.total() - len(one) for one in published),
        steps_back=_steps_back(evidence.published),
        lost=lost,
    )


#: Kinds of violation that mean an accepted event without its effect.
LOSSES = frozenset({"not_in_log", "lost", "dead_letter_missing"})


def _missing_from_log(evidence: Evidence) -> Iterator[Violation]:
    """An acknowledged event that the broker no longer has."""
    found = {record.number for record in evidence.log}
    for number in evidence.accepted.keys() - found:
        yield Violation("not_in_log", f"event {number} was acknowledged and is not in the topic")


def _uncommitted(evidence: Evidence) -> Iterator[Violation]:
    for partition, end in evidence.ends.items():
        at = evidence.committed.get(partition, 0)
        if at < end:
            yield Violation("uncommitted", f"partition {partition} is at {at} of {end}", end - at)
        if at > end:
            yield Violation("uncommitted", f"partition {partition} is at {at}, past its end {end}")


def _histories(evidence: Evidence, expected: Outcome) -> Iterator[Violation]:
    for user, wanted in expected.users.items():
        stored = evidence.stored.get(user)
        if stored is None:
            yield Violation("lost", f"{_name(user)} has no history", len(wanted.places))
            continue
        yield from _entries(user, wanted, stored)
        if list(stored.hidden) != wanted.hidden:
            yield Violation("hidden", f"{_name(user)}: {stored.hidden}, not {wanted.hidden}")
        last = stored.applied.get(wanted.last.partition, -1)
        if last != wanted.last.offset:
            yield Violation(
                "lost" if last < wanted.last.offset else "foreign",
                f"{_name(user)} was applied up to {last}, not {wanted.last}",
                sum(last < place.offset for place in wanted.places) or 1,
            )
    for user in evidence.stored.keys() - expected.users.keys():
        yield Violation("foreign", f"{_name(user)} has a history and no event")


def _entries(user: User, wanted: Expected, stored: StoredUser) -> Iterator[Violation]:
    is_, should = Counter(stored.entries), Counter(wanted.entries)
    lost, more = should - is_, is_ - should
    if lost:
        yield Violation("lost", f"{_name(user)} lacks {_some(lost)}", lost.total())
    known = dict.fromkeys(item for item, _ in wanted.entries)
    repeated = {entry for entry in more if entry[0] in known}
    if repeated:
        yield Violation("repeated", f"{_name(user)} has again {_some(repeated)}", len(repeated))
    if more.keys() - repeated:
        yield Violation("foreign", f"{_name(user)} has {_some(more.keys() - repeated)}")
    if not lost and not more and list(stored.entries) != wanted.entries:
        at = next(
            n for n, pair in enumerate(zip(stored.entries, wanted.entries, strict=True))
            if pair[0] != pair[1]
        )  # fmt: skip
        yield Violation(
            "order", f"{_name(user)} has {stored.entries[at]} where {wanted.entries[at]} belongs"
        )


def _lists(evidence: Evidence, expected: Outcome) -> Iterator[Violation]:
    """The last list is that of the user's last event, and shows nothing that they know or hid."""
    for user, wanted in expected.users.items():
        made = evidence.lists.get(user)
        if wanted.erased:
            if made is not None:
                yield Violation("list_kept", f"{_name(user)} was erased at {wanted.last}: {made}")
            continue
        if made is None:
            yield Violation("list_missing", f"{_name(user)} has no list in Redis")
            continue
        if made.origin != wanted.last:
            yield Violation("list_stale", f"{_name(user)}: {made.origin}, not {wanted.last}")
        known = {item for item, _ in wanted.entries} | set(wanted.hidden)
        shown = known.intersection(made.items)
        if shown:
            yield Violation("list_shows_known", f"{_name(user)} is shown {_some(shown)}")


def _published(evidence: Evidence, expected: Outcome) -> Iterator[Violation]:
    """The last event of each user was published; nothing was that never happened."""
    origins: dict[User, set[Place]] = {}
    for one in evidence.published:
        origins.setdefault(one.user, set()).add(one.origin)
    for user, wanted in expected.users.items():
        found = origins.pop(user, set())
        if wanted.last not in found and not wanted.erased:
            yield Violation("unpublished", f"{_name(user)}: no list of {wanted.last}")
        strange = found.difference(wanted.places)
        if strange:
            yield Violation("published_strange", f"{_name(user)}: lists of {_some(strange)}")
    for user in origins:
        yield Violation("published_strange", f"{_name(user)} has lists and no event")
    for user_id, place in set(expected.erased).difference(evidence.erasures):
        yield Violation("unpublished", f"no null value for {user_id}, erased at {place}")
    for user_id, place in set(evidence.erasures).difference(expected.erased):
        yield Violation("published_strange", f"a null value for {user_id}, of {place}")


def _dead_letters(
    evidence: Evidence, bad: Mapping[Place, tuple[LogRecord, Reason]]
) -> Iterator[Violation]:
    found = {one.origin: one for one in evidence.dead_letters}
    for place, (record, reason) in bad.items():
        letter = found.get(place)
        if letter is None:
            yield Violation("dead_letter_missing", f"none for {reason} at {place}")
        elif (letter.reason, letter.key, letter.value) != (reason.value, record.key, record.value):
            yield Violation("dead_letter_wrong", f"{letter} for {reason} at {place}")
    for place in found.keys() - bad.keys():
        yield Violation("dead_letter_strange", f"{found[place].reason} for a good event at {place}")


def _popularity(evidence: Evidence, expected: Outcome) -> Iterator[Violation]:
    """Each good event counts once: exactly, since a sum shows every repeat and every loss."""
    for place, wanted in expected.popularity.items():
        found = evidence.popularity.get(place, {})
        wrong = _unequal(found, wanted)
        if wrong:
            yield Violation(
                "popularity", f"{place[0]}, partition {place[1]}: {_some(wrong)}", len(wrong)
            )


def _unequal(found: Mapping[str, float], wanted: Mapping[str, float]) -> AbstractSet[str]:
    return {
        item
        for item in found.keys() | wanted.keys()
        if item not in found
        or item not in wanted
        or not isclose(found[item], wanted[item], rel_tol=0.0, abs_tol=_TOLERANCE)
    }


def _steps_back(published: Sequence[List]) -> int:
    reached: dict[User, Place] = {}
    count = 0
    for one in published:
        last = reached.get(one.user)
        if last is not None and one.origin.offset < last.offset:
            count += 1
        else:
            reached[one.user] = one.origin
    return count


def _name(user: User) -> str:
    return f"{user.user_id} on {user.surface}"


def _some(things: Mapping[object, object] | AbstractSet[object]) -> str:
    shown = sorted(map(str, things))
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
