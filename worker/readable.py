"""Cached recommendations and their explanations as text for people. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def as_text(found: Mapping[str, Any]) -> str:
    """The table of `streamrec recommend --text`.

    Args:
        found: a `Recommendations` as builtins, with `explanations` (worker/lookup.py) where asked.
    """
    made_at = datetime.fromtimestamp(found["generated_at_ms"] / 1000, UTC)
    count = len(found["items"])
    counted = f"{count} item" if count == 1 else f"{count} items"
    lines = [
        f"user {_plain(found['user_id'])} on {found['surface']}: {counted} by"
        f" {_plain(found['model_version'])}, made {made_at:%Y-%m-%d %H:%M:%S} UTC"
    ]
    explained = found.get("explanations")
    reasons: Sequence[Mapping[str, Any]] = ()
    if explained is not None:
        reasons = explained["items"]
        if reasons:
            lines.append(
                f"the model reads {explained['history_items']} history items; beside each, what it"
                " added to the score"
            )
        if explained["note"]:
            lines.append(explained["note"])
    lines.append("")
    for place, (item, score) in enumerate(zip(found["items"], found["scores"], strict=True)):
        now = ""
        if explained and explained["history_changed"] and reasons[place]["score"] is not None:
            now = f"  (now {reasons[place]['score']:.2f})"
        lines.append(f"{score:9.2f}  {_plain(item)}{now}")
        if reasons:
            lines += _reason(reasons[place])
    return "\n".join(lines)


def _reason(reason: Mapping[str, Any]) -> list[str]:
    if reason["note"]:
        return [f"{'':11}{reason['note']}"]
    return [
        f"{'':11}{title:<8} " + ", ".join(_influence(one) for one in reason[title])
        for title in ("raised", "lowered")
        if reason[title]
    ]


def _influence(one: Mapping[str, Any]) -> str:
    return f"{_plain(one['item'])} ({one['value']:+.2f}, {one['share']:.0%})"


def _plain(text: str) -> str:
    """`text` without what could steer a terminal or cannot be encoded; ids come from events."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
