"""What can be wrong with a ranker, its data, or a recipe."""

from __future__ import annotations

from worker.errors import StreamrecError


class RankerError(StreamrecError):
    """The model or the data cannot be used; the message says why and what to do."""

    exit_code = 65  # EX_DATAERR


class RecipeError(StreamrecError):
    """A recipe is malformed, or asks for what this model cannot do."""

    exit_code = 64  # EX_USAGE
