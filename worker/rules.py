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

#: Largest rules file. They are held in memory, and looked up for each item of a model.
MAX_RULES_BYTES = 16 << 20


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
        with path.open("rb") as file:
            data = file.read(MAX_RULES_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"STREAMREC_RULES: cannot read {path}: {error.strerror}") from error
    return decode_rules(data, path)


def decode_rules(data: bytes, where: Path | str) -> Rules:
    """Parse rules; `where` is for the message.

    Raises:
        SettingsError: they are too large or break the form; the message names the place.
    """
    if len(data) > MAX_RULES_BYTES:
        raise SettingsError(
            f"STREAMREC_RULES: {where} has more than {MAX_RULES_BYTES} bytes: leave items that"
            " nobody is to see out of the model, or give the list of allowed ones instead"
        )
    try:
        rules = msgspec.json.decode(data, type=Rules)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SettingsError(f"STREAMREC_RULES: {where}: {error}") from error
    for surface, own in rules.surfaces.items():
        if own.max_per_author is not None and own.max_per_author < 1:
            raise SettingsError(
                f"STREAMREC_RULES: {where}: max_per_author of {surface} must be at least 1"
            )
    return rules
