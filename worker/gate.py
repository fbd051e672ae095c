"""Should the canary be promoted or rolled back? A sequential decision from tallies. No I/O.

May be asked after every event; the first answer other than `wait` ends the trial. How it decides
and what it rests on is in docs/quality.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import exp, log
from typing import Literal

from worker.errors import SettingsError
from worker.quality import EFFECT, Tally, residual_squares
from worker.sequences import Interval, MeanTally, half_width, log_evidence_above

Action = Literal["wait", "promote", "rollback"]

#: Tests that can roll back; the chance of a false alarm is shared evenly among them.
_TESTS = 3
#: Differences of ln(seconds) that the bound is tuned to find.
_LATENCY_EFFECT = 0.2


class Verdict(StrEnum):
    """Why a decision is what it is; a metric's label."""

    #: The canary could not be loaded.
    REFUSED = "refused"
    ERRORS = "errors"
    LATENCY = "latency"
    QUALITY = "quality"
    NOT_WORSE = "not_worse"
    #: The trial went on for `max_events` without an answer: the incumbent stays.
    UNDECIDED = "undecided"
    #: Less than the least evidence so far.
    TOO_LITTLE = "too_little"
    #: Enough evidence to look at, not enough to decide.
    UNCERTAIN = "uncertain"
    #: Quality would do; the latency is not yet known to, or too many scorings failed.
    UNHEALTHY = "unhealthy"


#: Those that end a trial by a rollback.
ROLLBACK_VERDICTS = (
    Verdict.REFUSED, Verdict.ERRORS, Verdict.LATENCY, Verdict.QUALITY, Verdict.UNDECIDED,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What is accepted, and how surely.

    Raises:
        SettingsError: a number is out of range.
    """

    #: Chance that a trial of an acceptable canary ends in a rollback, over all tests and times.
    #: Of `promote` for an unacceptable one: a third of it.
    alpha: float = 0.05
    #: Largest relative loss of quality still accepted, in [0, 1).
    max_loss: float = 0.05
    #: Largest accepted ratio of the canary's scoring time to the stable version's, at least 1.
    max_latency_ratio: float = 2.0
    #: Largest accepted share of the canary's scorings that fail, in (0, .5).
    max_error_rate: float = 0.01
    #: Users in each arm, and events and latencies in all, below which nothing is decided by them.
    min_users: int = 10
    min_events: int = 100
    min_latencies: int = 30
    #: Events after which an undecided trial ends.
    max_events: int = 1_000_000

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("alpha", 0.0 < self.alpha < 0.5, "above 0 and below 0.5"),
            ("max_loss", 0.0 <= self.max_loss < 1.0, "at least 0 and below 1"),
            ("max_latency_ratio", self.max_latency_ratio >= 1.0, "at least 1"),
            ("max_error_rate", 0.0 < self.max_error_rate < 0.5, "above 0 and below 0.5"),
            ("min_users", self.min_users >= 2, "at least 2"),
            ("min_events", self.min_events >= 1, "at least 1"),
            ("min_latencies", self.min_latencies >= 2, "at least 2"),
            ("max_events", self.max_events >= self.min_events, "at least min_events"),
        ):
            if not valid:
                raise SettingsError(f"{name} is {getattr(self, name)}; set it to {wanted}")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a trial has shown so far, merged over all partitions and workers."""

    #: Users served the stable version, and those served the canary, from equal shares of users.
    stable: Tally = field(default_factory=Tally)
    canary: Tally = field(default_factory=Tally)
    #: ln(canary seconds / stable seconds) of the two versions on the same inputs.
    latency: MeanTally = field(default_factory=MeanTally)
    #: Calls of the canary's model, each input once: lists of one call fail together.
    scorings: int = 0
    errors: int = 0

    @property
    def events(self) -> int:
        """Of both arms."""
        return self.stable.events + self.canary.events

    @property
    def paired(self) -> bool:
        """Whether each event was looked up in both versions' lists."""
        return self.stable.pairs + self.canary.pairs == self.events


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, why, and the figures behind it."""

    action: Action
    reason: Verdict
    figures: dict[str, float]


def decide(evidence: Evidence, settings: GateSettings) -> Decision:
    """Promote the canary, roll it back, or wait for more evidence."""
    alpha = settings.alpha / _TESTS
    doubt = log_evidence_above(evidence.errors, evidence.scorings, settings.max_error_rate)
    ratio = evidence.latency.interval(effect=_LATENCY_EFFECT, alpha=alpha)
    figures = _figures(evidence, doubt, ratio)
    if doubt >= -log(alpha):
        return Decision("rollback", Verdict.ERRORS, figures)
    timed = evidence.latency.count >= settings.min_latencies
    limit = log(settings.max_latency_ratio)
    if timed and ratio.low > limit:
        return Decision("rollback", Verdict.LATENCY, figures)
    enough = (
        min(evidence.stable.users, evidence.canary.users) >= settings.min_users
        and evidence.events >= settings.min_events
    )
    reason = Verdict.TOO_LITTLE
    if enough:
        excess = difference(evidence, max_loss=settings.max_loss, alpha=alpha)
        figures |= {"excess": excess.estimate, "excess_low": excess.low, "excess_high": excess.high}
        if excess.high < 0.0:
            return Decision("rollback", Verdict.QUALITY, figures)
        healthy = (
            timed
            and ratio.high < limit
            and evidence.errors <= settings.max_error_rate * evidence.scorings
        )
        if excess.low > 0.0 and healthy:
            return Decision("promote", Verdict.NOT_WORSE, figures)
        reason = Verdict.UNHEALTHY if excess.low > 0.0 else Verdict.UNCERTAIN
    if evidence.events >= settings.max_events:
        return Decision("rollback", Verdict.UNDECIDED, figures)
    return Decision("wait", reason, figures)


def difference(evidence: Evidence, *, max_loss: float, alpha: float) -> Interval:
    """Quality of the canary beyond the least accepted: its MRR - (1 - `max_loss`) stable MRR.

    By pairs where each event was looked up in both lists (users in common: most of the variance
    goes), else between the two groups. Needs two users in each.

    Each bound is taken as though one more user had been seen, for whom only the version it speaks
    against had done well, as well as for a user to whom an average unit of gain went. While gains
    are few, or nearly all in common, the variance seen is no measure of the losses to come: without
    that user, twenty hits in common would show that less than one in twenty is lost.
    """
    kept = 1.0 - max_loss
    stable, canary = evidence.stable, evidence.canary
    if evidence.paired:
        # Both arms: clicks favour the list that was shown, and shown was each version once.
        both = canary.merged(stable.swapped())
        total = both.gain - kept * both.other_gain
        squares = both.gain_gain - 2.0 * kept * both.gain_other + kept * kept * both.other_other
        spread = residual_squares(both, total, squares, both.gain_events - kept * both.other_events)
        gains, gain_squares = both.gain + both.other_gain, both.gain_gain + both.other_other
        size = gain_squares / gains if gains else 0.0
        estimate = total / both.events
        variance = (spread + size * size) / both.events**2
        lost, won = kept * size / both.events, size / both.events
        figure = max(both.mrr, both.other_gain / both.events)
    else:
        gains, gain_squares = canary.gain + stable.gain, canary.gain_gain + stable.gain_gain
        size = gain_squares / gains if gains else 0.0
        estimate = canary.mrr - kept * stable.mrr
        variance = _mean_variance(canary, size) + kept * kept * _mean_variance(stable, size)
        lost, won = kept * size / stable.events, size / canary.events
        figure = max(canary.mrr, stable.mrr)
    half = half_width(variance, effect=EFFECT * figure, alpha=alpha)
    return Interval(estimate, estimate - lost - half, estimate + won + half)


def _mean_variance(tally: Tally, size: float) -> float:
    """Of a group's MRR, with one more user of gain `size`."""
    spread = residual_squares(tally, tally.gain, tally.gain_gain, tally.gain_events)
    return (spread + size * size) / tally.events**2


def _figures(evidence: Evidence, doubt: float, ratio: Interval) -> dict[str, float]:
    stable, canary = evidence.stable, evidence.canary
    return {
        "events": evidence.events,
        "stable_users": stable.users,
        "canary_users": canary.users,
        "stable_hit_rate": stable.hit_rate,
        "canary_hit_rate": canary.hit_rate,
        "stable_mrr": stable.mrr,
        "canary_mrr": canary.mrr,
        "latencies": evidence.latency.count,
        "latency_ratio": exp(ratio.estimate),
        "error_rate": evidence.errors / evidence.scorings if evidence.scorings else 0.0,
        "log_error_evidence": doubt,
    }
