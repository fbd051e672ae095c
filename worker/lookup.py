"""Read what is cached, as an application would, and explain it."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from worker.bundle import Bundle, open_bundle
from worker.cache import REDIS_FAILURES, Cache, UserKey, decode
from worker.errors import BundleError, CacheError, SettingsError
from worker.events import parse_surface
from worker.explain import Explanation, explain
from worker.history import History
from worker.ranking import Recommendations
from worker.redis_security import shown_url
from worker.refusals import redis_refusal
from worker.registry import Registry
from worker.settings import Settings

RAISED_SHOWN = 3
LOWERED_SHOWN = 1

POPULARITY = (
    "by popularity: these have the most events of all users, newer ones counting more, less what"
    " this user has seen or hidden; the model could not score the user's history"
)
NO_HISTORY = "not explained: Redis holds no history of this user (it has expired or was deleted)"
DAMAGED_HISTORY = "not explained: the user's history in Redis is damaged"
HISTORY_CHANGED = (
    "the history has changed since the list was made: scores and influences are those of the"
    " history as it is now"
)


@dataclass(frozen=True, slots=True)
class Cached:
    """What Redis holds for a user on a surface."""

    recommendations: Recommendations
    #: The stored history; None where there is none.
    history: bytes | None

    def as_builtins(self) -> dict[str, Any]:
        """The recommendations, as they are published."""
        return dict(msgspec.to_builtins(self.recommendations))


def read_cached(settings: Settings, user_id: str, surface: str) -> Cached | None:
    """What is cached for a user; None where no recommendations are.

    Raises:
        SettingsError: there is no such surface.
        CacheError: Redis does not answer, or holds something else.
    """
    try:
        key = UserKey(user_id, parse_surface(surface))
    except ValueError as error:
        raise SettingsError(str(error)) from None
    cache = Cache.from_settings(settings)
    try:
        ((history, data),) = cache.read_users([key])
    except REDIS_FAILURES as error:
        raise CacheError(
            redis_refusal(shown_url(settings), error)
            or f"Redis does not answer ({error}): start it, or set STREAMREC_REDIS to where it is"
        ) from None
    finally:
        cache.close()
    return None if data is None else Cached(decode(data), history)


def cached_recommendations(settings: Settings, user_id: str, surface: str) -> dict[str, Any] | None:
    """The recommendations cached for a user, as builtins; None where there are none.

    Raises:
        SettingsError: there is no such surface.
        CacheError: Redis does not answer, or holds something else.
    """
    cached = read_cached(settings, user_id, surface)
    return None if cached is None else cached.as_builtins()


def explanations(cached: Cached, registry: Registry) -> dict[str, Any]:
    """Explain a list by the history as it is now and the bundle that made the list.

    Returns:
        `items`, one for each recommended item (empty where `note` says why); `history_changed`;
        `history_items`, how many history items the model reads; `note`, a sentence or None.

    Raises:
        BundleError: the bundle that made the list is not in `registry`, or is broken.
        HistoryFormatError: another release wrote the history.
    """
    served = cached.recommendations
    if served.source == "fallback":
        return _explanations(note=POPULARITY)
    if cached.history is None:
        return _explanations(note=NO_HISTORY)
    try:
        # In whole: whoever wrote it has cut it to the worker's length.
        history = History.from_bytes(cached.history, sys.maxsize)
    except ValueError:
        return _explanations(note=DAMAGED_HISTORY)
    bundle = _bundle_of(served.model_version, registry)
    changed = not _reflects(served, history)
    made = explain(bundle, history.items, served.items)
    return _explanations(
        note=HISTORY_CHANGED if changed else None,
        history_changed=changed,
        history_items=min(
            bundle.manifest.max_length, sum(item in bundle.index for item in history.items)
        ),
        items=[_shown(one) for one in made],
    )


def _explanations(
    *,
    note: str | None,
    history_changed: bool = False,
    history_items: int = 0,
    items: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    return {
        "note": note,
        "history_changed": history_changed,
        "history_items": history_items,
        "items": items or [],
    }


def _bundle_of(model_version: str, registry: Registry) -> Bundle:
    name, _, version = model_version.partition("@")
    try:
        path = registry.path(name, version)
    except BundleError as error:
        raise BundleError(
            f"the list was made by {model_version}, which is needed to explain it: {error}; set"
            " STREAMREC_REGISTRY to the registry that the worker serves from, or wait for the"
            " user's next event"
        ) from None
    return open_bundle(path, warmup_batches=())


def _reflects(served: Recommendations, history: History) -> bool:
    """Whether the list was made from this very history: both name the same newest event."""
    origin = served.origin
    applied = history.last_applied(origin.topic, origin.partition)
    return applied is not None and applied[0] == origin.offset


def _shown(one: Explanation) -> dict[str, Any]:
    return {
        "item": one.item,
        "score": one.score,
        "base": one.base,
        "raised": [asdict(influence) for influence in one.raised(RAISED_SHOWN)],
        "lowered": [asdict(influence) for influence in one.lowered(LOWERED_SHOWN)],
        "note": one.note,
    }
