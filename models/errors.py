"""Errors of models/ that no error of the worker covers."""

from __future__ import annotations

from worker.errors import StreamrecError


class ExtraMissingError(StreamrecError):
    """A package of an optional extra is not installed; the message has the pip command."""

    exit_code = 69  # EX_UNAVAILABLE


class StoreError(StreamrecError):
    """A model store cannot be reached, read or written."""

    exit_code = 74  # EX_IOERR
