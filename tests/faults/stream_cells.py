"""Cells about what is in the stream: poison, repeats, disorder, bursts."""

from __future__ import annotations

import time

from tests.faults.harness import RATE, Cell, Scene
from tests.faults.plan import Plan

BURST = 10
BURST_S = 4.0


def _go_on(scene: Scene) -> None:
    """The load itself is the fault."""
    scene.wait_for_commits(2500)


def _burst(scene: Scene) -> None:
    scene.load.rate *= BURST
    time.sleep(BURST_S)
    scene.load.rate /= BURST


CELLS = (
    Cell(
        "poison",
        "1 % of records break the contract, in each of the ways there are",
        _go_on,
        "drop_rejected",
        short=True,
        plan=Plan(poison=0.01),
        rate=2 * RATE,
    ),
    Cell(
        "duplicates",
        "20 % of events are sent again by their producer",
        _go_on,
        "forget_event_ids",
        plan=Plan(repeats=0.2),
    ),
    Cell(
        "disorder",
        "events' times are thrown about over 2 h",
        _go_on,
        "order_by_arrival",
        plan=Plan(spread_ms=3_600_000),
    ),
    Cell(
        "burst",
        f"{BURST} times the rate for {BURST_S:.0f} s",
        _burst,
        "drop_when_behind",
        rate=1.5 * RATE,
    ),
)
