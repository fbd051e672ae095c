"""The errors of streamrec. Each message says what is wrong and what to do about it.

`StreamrecError` is what the command line turns into one line and an exit code; anything else that
escapes is a defect.
"""

from __future__ import annotations

from enum import StrEnum


class StreamrecError(Exception):
    """Base of every error that a user can act on."""

    #: Exit code of the command line (sysexits.h where one fits).
    exit_code = 1


class SettingsError(StreamrecError):
    """A setting is missing or out of range; the message names it."""

    exit_code = 78  # EX_CONFIG


class Refusal(StrEnum):
    """Why a bundle is not opened: the label of a metric, and a row of a table in docs/bundle.md."""

    #: A file or the whole bundle is not there, or cannot be read.
    MISSING = "missing"
    #: The manifest is not one, or contradicts itself.
    MANIFEST = "manifest"
    #: Another release's format, or another way from text to grams.
    FORMAT = "format"
    #: Its name, version or surface is none, or not what was asked for.
    IDENTITY = "identity"
    #: No valid signature by a trusted key.
    SIGNATURE = "signature"
    #: A file name that is no plain name, or something that is no plain file.
    PATH = "path"
    SYMLINK = "symlink"
    #: The files are not those that the manifest lists, by name or size.
    FILES = "files"
    CHECKSUM = "checksum"
    #: A file is larger than any that is opened, or the bundle needs more memory than there is.
    MEMORY = "memory"
    #: Not an ONNX graph that ONNX Runtime loads, or cut short.
    NOT_ONNX = "not_onnx"
    #: The graph wants data from other files.
    EXTERNAL_DATA = "external_data"
    #: The graph uses operators that ONNX Runtime does not come with.
    OPERATORS = "operators"
    #: NaN or infinite weights.
    WEIGHTS = "weights"
    #: Item ids are malformed, come twice, or are not as many as the model or manifest says.
    ITEMS = "items"
    #: Inputs, outputs, or what the model gives break the contract.
    CONTRACT = "contract"
    #: The model does not give what the maker of the bundle saw.
    GOLDEN = "golden"
    #: Not about the content of a bundle: a registry, a version that exists, a wrong use.
    OTHER = "other"


class BundleError(StreamrecError):
    """A model bundle is missing, damaged, or breaks the contract in docs/bundle.md.

    `reason` says which part of it.
    """

    exit_code = 66  # EX_NOINPUT

    def __init__(self, message: str, reason: Refusal = Refusal.OTHER) -> None:
        super().__init__(message)
        self.reason = reason


class StoreError(StreamrecError):
    """A registry cannot be reached, read or written."""

    exit_code = 74  # EX_IOERR


class ReleaseRefusedError(StreamrecError):
    """A change of which version serves that is not allowed; the message says what would be."""

    exit_code = 65  # EX_DATAERR


class ReleaseChangedError(StreamrecError):
    """Another changed the release meanwhile; decide again."""

    exit_code = 75  # EX_TEMPFAIL


class ExtraMissingError(StreamrecError):
    """A package of an optional extra is not installed; the message has the pip command."""

    exit_code = 69  # EX_UNAVAILABLE


class BrokerError(StreamrecError):
    """Kafka cannot be reached or refuses what the worker asks."""

    exit_code = 69  # EX_UNAVAILABLE


class CacheError(StreamrecError):
    """Redis cannot be reached or refuses what the worker asks."""

    exit_code = 69  # EX_UNAVAILABLE


class NotForgottenYetError(StreamrecError):
    """A tombstone is on the events topic, and no worker has carried it out yet."""

    exit_code = 75  # EX_TEMPFAIL


class HistoryFormatError(StreamrecError):
    """Redis holds histories of a later release: run that one, or delete `hist:*` keys."""

    exit_code = 78


class LocalPartError(StreamrecError):
    """A broker or Redis that streamrec starts on this machine did not come up."""

    exit_code = 70  # EX_SOFTWARE
