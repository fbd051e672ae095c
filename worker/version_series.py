"""A bound on the series that model versions make in Prometheus.

Versions come and go, and the version of a list that a user was served before is whatever Redis
says. So only those that serve have series of their own, and those seen last.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from prometheus_client.metrics import MetricWrapperBase

#: Versions of a surface that keep their series though they serve no more.
KEPT_VERSIONS = 16
#: A name longer than any version's is none.
MAX_NAME_LENGTH = 300
OTHER = "other"
#: What lists of popular items have for a version.
FALLBACK_VERSION = "popularity"


class VersionSeries:
    """Says which versions may be labels, and removes the series of those that may no more.

    Args:
        families: metrics with the labels `surface` and `model_version`.
    """

    def __init__(self, families: Sequence[MetricWrapperBase]) -> None:
        self._families = tuple(families)
        #: Grows with each removal: what was remembered of labels is then not exported any more.
        self.generation = 0
        self._serving: dict[str, frozenset[str]] = {}
        #: By surface, the one seen last at the end.
        self._seen: dict[str, dict[str, None]] = {}
        # Models are loaded in one thread and lists judged in another.
        self._lock = threading.Lock()

    def serve(self, surface: str, references: Collection[str]) -> None:
        """These versions serve a surface now."""
        with self._lock:
            self._serving[surface] = frozenset(references)
            for reference in references:
                self._note(surface, reference)

    def label(self, surface: str, reference: str) -> str:
        """The label for a version that was seen."""
        if len(reference) > MAX_NAME_LENGTH or not reference.isprintable():
            return OTHER
        with self._lock:
            self._note(surface, reference)
        return reference

    def _note(self, surface: str, reference: str) -> None:
        kept = self._serving.get(surface, frozenset()) | {FALLBACK_VERSION}
        seen = self._seen.setdefault(surface, {})
        seen.pop(reference, None)
        seen[reference] = None
        removable = [one for one in seen if one not in kept]
        for old in removable[: max(0, len(removable) - KEPT_VERSIONS)]:
            del seen[old]
            self.generation += 1
            for family in self._families:
                family.remove_by_labels({"surface": surface, "model_version": old})
