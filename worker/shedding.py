"""Fewer lists while the worker is behind. No I/O.

Most events are views, and say little; the list before is nearly as good. So a worker that may shed,
and is behind, makes no list for users who only viewed. It begins and ends at different lags, or it
would do both at every batch.
"""

from __future__ import annotations

from collections.abc import Callable


class Shedding:
    """Whether views make lists now.

    Args:
        from_s: age of the oldest event, in seconds, beyond which they do not; None for never.
        on_change: called with whether shedding is on, where that changes.
    """

    def __init__(
        self, from_s: float | None, on_change: Callable[[bool], None] = lambda on: None
    ) -> None:
        self._from_s = from_s
        self._on_change = on_change
        self.on = False

    def see(self, oldest_s: float) -> None:
        """The oldest event of a micro-batch is `oldest_s` seconds old."""
        if self._from_s is None:
            return
        on = oldest_s > (self._from_s / 2 if self.on else self._from_s)
        if on != self.on:
            self.on = on
            self._on_change(on)
