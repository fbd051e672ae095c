"""Rules that no model may overrule: blocked items, allowed items per surface, caps per author.

Read from one JSON file (docs/rules.md):

    {"block": ["item"],
     "surfaces": {"posts": {"allow": ["item"], "max_per_author": 2}},
     "authors": {"item": "author"}}
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from worker.errors import SettingsError
from worker.events import Surface


class SurfaceRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rules of one surface."""

    #: Only these items may be recommended; None allows all, an empty list none.
    allow: frozenset[str] | None = None
    #: At most this many items of one author in a list; None sets no cap.
    max_per_author: int | None = None


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rules. The default has none."""

    block: frozenset[str] = frozenset()
    surfaces: dict[Surface, SurfaceRules] = {}
    #: Author of an item; items without one are not capped.
    authors: dict[str, str] = {}

    def of(self, surface: Surface) -> SurfaceRules:
        """The rules of `surface`."""
        return self.surfaces.get(surface, _NO_RULES)


_NO_RULES = SurfaceRules()


def read_rules(path: Path) -> Rules:
    """Read a rules file.

    Raises:
        SettingsError: the file cannot be read or breaks the form; the message names the place.
    """
    try:
        rules = msgspec.json.decode(path.read_bytes(), type=Rules)
    except OSError as error:
        raise SettingsError(f"STREAMREC_RULES: cannot read {path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise SettingsError(f"STREAMREC_RULES: {path}: {error}") from error
    for surface, own in rules.surfaces.items():
        if own.max_per_author is not None and own.max_per_author < 1:
            raise SettingsError(
                f"STREAMREC_RULES: {path}: max_per_author of {surface} must be at least 1"
            )
    return rules
