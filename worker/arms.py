"""Which users belong to which side of a trial. No I/O."""

from __future__ import annotations

from typing import Literal, NamedTuple

from worker.history import History, Shown
from worker.models import Serving
from worker.quality import arm_of, bucket

#: A side of a trial: users served the canary, as many served the stable version, those for whom a
#: shadow makes lists that nobody sees, and all others.
Arm = Literal["canary", "stable", "shadow", "others"]


def arm(serving: Serving, user_id: str) -> Arm:
    """The side that a user is on, alike in all workers for as long as the trial lasts."""
    if serving.role == "canary":
        return arm_of(user_id, serving.salt, serving.share) or "others"
    if serving.role == "shadow" and bucket(user_id, serving.salt) < serving.share:
        return "shadow"
    return "others"


class Judged(NamedTuple):
    """What an event of a user is looked up in."""

    side: Arm
    #: The list of the version of that side, and the other version's; for `others` that may be
    #: unknown.
    own: Shown
    other: Shown | None


def judged_as(serving: Serving, user_id: str, history: History) -> Judged | None:
    """The side that an event of the user counts for, and by which lists.

    None where the lists that the user has are not those of that side: made before the trial began,
    by the fallback, or with the other version's list unknown (it is not stored).
    """
    side, served, beside = arm(serving, user_id), history.served, history.beside
    if served is None:
        return None
    stable = serving.stable.manifest.reference
    rival = None if serving.rival is None else serving.rival.manifest.reference
    by_stable = served.version == stable
    if side == "others":
        return Judged(side, served, beside) if by_stable else None
    if beside is None or {served.version, beside.version} != {stable, rival}:
        return None
    if by_stable == (side != "canary"):
        return Judged(side, served, beside)
    # The stable version steps in only where the canary has nothing for a user.
    return Judged(side, beside, served) if by_stable and not beside.items else None
