"""What can be wrong with what is to be reported on."""

from __future__ import annotations

from worker.errors import StreamrecError


class ReportError(StreamrecError):
    """Bundles, events or options that cannot be compared; the message says why."""

    exit_code = 65  # EX_DATAERR
