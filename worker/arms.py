"""Which users belong to which side of a trial. No I/O."""

from __future__ import annotations

from typing import Literal

from worker.history import History
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


def judged_as(serving: Serving, user_id: str, history: History) -> Arm | None:
    """The side that an event of the user counts for.

    None where the lists that the user has are not those of that side: made before the trial began,
    by the fallback, or with the other version's list unknown (it is not stored).
    """
    side, served, beside = arm(serving, user_id), history.served, history.beside
    stable = serving.stable.manifest.reference
    rival = None if serving.rival is None else serving.rival.manifest.reference
    own, other = (rival, stable) if side == "canary" else (stable, rival)
    if served is None or served.version != own:
        return None
    if side != "others" and (beside is None or beside.version != other):
        return None
    return side
