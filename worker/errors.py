"""The errors of streamrec. Each message says what is wrong and what to do about it.

`StreamrecError` is what the command line turns into one line and an exit code; anything else that
escapes is a defect.
"""

from __future__ import annotations


class StreamrecError(Exception):
    """Base of every error that a user can act on."""

    #: Exit code of the command line (sysexits.h where one fits).
    exit_code = 1


class SettingsError(StreamrecError):
    """A setting is missing or out of range; the message names it."""

    exit_code = 78  # EX_CONFIG


class BundleError(StreamrecError):
    """A model bundle is missing, damaged, or breaks the contract in docs/bundle.md."""

    exit_code = 66  # EX_NOINPUT


class BrokerError(StreamrecError):
    """Kafka cannot be reached or refuses what the worker asks."""

    exit_code = 69  # EX_UNAVAILABLE


class CacheError(StreamrecError):
    """Redis cannot be reached or refuses what the worker asks."""

    exit_code = 69  # EX_UNAVAILABLE


class HistoryFormatError(StreamrecError):
    """Redis holds histories of a later release: run that one, or delete `hist:*` keys."""

    exit_code = 78


class LocalPartError(StreamrecError):
    """A broker or Redis that streamrec starts on this machine did not come up."""

    exit_code = 70  # EX_SOFTWARE
