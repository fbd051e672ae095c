"""When events are due, and what quantiles their latencies have. Pure.

The load is open: event `i` is due at `start + i / rate`, whatever became of those before it.
Latency counts from when an event was due, not from when it was sent, so that a stall of anything,
the generator included, is felt by every event that it delayed (Tene, "How NOT to Measure Latency";
what wrk2 calls avoiding coordinated omission).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Pace:
    """An open-loop schedule.

    Args:
        rate: events a second.
        count: events in all.
        probe_every: one of so many events is a probe's.
        first_probe: number of the first probe.
    """

    rate: float
    count: int
    probe_every: int
    first_probe: int

    @classmethod
    def of(cls, rate: float, seconds: float, *, probes_per_s: float, first_probe: int) -> Pace:
        """A schedule of `seconds` with about `probes_per_s`, but at most every other event."""
        return cls(
            rate, max(2, round(rate * seconds)), max(2, round(rate / probes_per_s)), first_probe
        )

    @property
    def probes(self) -> int:
        """How many events are probes'."""
        return self.count // self.probe_every

    def probe_of(self, event: int) -> int | None:
        """Number of the probe that `event` is of; None where it is another user's."""
        place, rest = divmod(event, self.probe_every)
        return self.first_probe + place if rest == self.probe_every - 1 else None

    def due_s(self, event: int) -> float:
        """Seconds from the start until `event` is due."""
        return event / self.rate

    def due_by(self, seconds: float) -> int:
        """How many events are due `seconds` after the start."""
        return max(0, min(self.count, math.floor(seconds * self.rate) + 1))

    def probe_due_s(self) -> dict[int, float]:
        """Seconds from the start by number of probe."""
        return {
            self.first_probe + place: self.due_s(place * self.probe_every + self.probe_every - 1)
            for place in range(self.probes)
        }


@dataclass(frozen=True)
class Latency:
    """Quantiles in milliseconds; `unanswered` probes are in none of them."""

    probes: int
    unanswered: int
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


def latency(due: Mapping[int, float], seen: Mapping[int, float]) -> Latency:
    """Compare when probes were due with when their lists appeared; both in seconds."""
    answered = sorted(1000.0 * (seen[probe] - at) for probe, at in due.items() if probe in seen)
    return Latency(
        probes=len(due),
        unanswered=len(due) - len(answered),
        p50=quantile(answered, 0.5),
        p90=quantile(answered, 0.9),
        p99=quantile(answered, 0.99),
        p999=quantile(answered, 0.999),
        max=answered[-1] if answered else math.inf,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `ordered` do not exceed; infinite where empty.

    No interpolation: it is one of the measured values.
    """
    if not ordered:
        return math.inf
    # 0.99 * 100 is a little more than 99.
    return ordered[max(0, math.ceil(round(share * len(ordered), 9)) - 1)]


def as_dict(found: Latency) -> dict[str, float]:
    """For JSON; where nothing was answered there are no quantiles."""
    return {name: value for name, value in asdict(found).items() if math.isfinite(value)}
