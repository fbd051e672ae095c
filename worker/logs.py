"""Structured logs: one JSON object a line on standard error. They hold no user's id.

A user is named by a keyed hash: the same in all lines and workers that share the key, and of no use
to who reads logs without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path

#: Frames of an error that are told, the innermost.
FRAMES_SHOWN = 5
#: The key of `hashed_user`, until `set_up_logging` sets another.
_key = secrets.token_bytes(32)


def hashed_user(user_id: str) -> str:
    """A user for a log line: 16 hexadecimal digits."""
    data = user_id.encode("utf-8", "surrogatepass")
    return hashlib.blake2s(data, key=_key, digest_size=8).hexdigest()


def place_of(error: BaseException) -> str:
    """Type of an error and where it was raised, innermost first; its message may quote an event."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES_SHOWN:]
    places = [f"{Path(one.filename).name}:{one.lineno}:{one.name}" for one in reversed(frames)]
    return f"{type(error).__name__} at {' < '.join(places)}"


def message_of(error: BaseException) -> str:
    """Message of a dependency's error. Redis quotes commands that it does not know, with the keys
    in them; those go."""
    return str(error).partition(", with args beginning with")[0]


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, tz=UTC).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(level: str, salt: str = "") -> None:
    """Log `level` and above, from libraries at least warnings.

    Args:
        salt: from which the key of `hashed_user` is made; empty: one of this process alone.
    """
    global _key  # noqa: PLW0603 - logging is one for the process
    _key = hashlib.sha256(salt.encode()).digest() if salt else secrets.token_bytes(32)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("worker").setLevel(level.upper())
    logging.getLogger("models").setLevel(level.upper())
