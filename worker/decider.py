"""Looks at the figures of trials, exports them, and carries out what the gate decides.

One worker of the group does it: the one that owns partition 0 of the events topic. Two may for a
moment, in a rebalance; a release changes only from the revision that was decided about, so one of
them comes too late.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import msgspec

from worker.cache import REDIS_FAILURES, Cache, PartitionKey
from worker.errors import ReleaseChangedError, StoreError, StreamrecError
from worker.events import Surface
from worker.gate import Decision, Verdict, decide
from worker.metrics import Metrics
from worker.models import Models, Serving
from worker.outbox import Outbox, Outgoing
from worker.quality import Tally
from worker.registry import Registry
from worker.release_channel import release_record
from worker.releases import (
    Canary,
    Decided,
    Release,
    canary_ended,
    canary_promoted,
    decided_by_gate,
    newer,
)
from worker.retry import until_it_works
from worker.settings import Settings
from worker.trials import PartitionTally, decode_tally, merged

log = logging.getLogger(__name__)

_ENCODE = msgspec.json.Encoder().encode
#: A decision of another worker is published once more unless it is older than this: a worker may
#: have crashed between deciding and publishing.
PUBLISHED_AGAIN_S = 86_400.0


class Decider:
    """Judges the trials of all surfaces.

    Args:
        kafka_failures: what a lost or failing Kafka raises from `outbox`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        models: Models,
        registry: Registry,
        cache: Cache,
        outbox: Outbox,
        metrics: Metrics,
        kafka_failures: tuple[type[BaseException], ...],
    ) -> None:
        self._settings = settings
        self._models = models
        self._registry = registry
        self._cache = cache
        self._outbox = outbox
        self._metrics = metrics
        self._kafka_failures = kafka_failures
        self._by = f"gate@{socket.gethostname()}"
        #: What the gate last said of each surface's trial, for the status page.
        self.latest: dict[Surface, Decision] = {}
        #: Revision by model of the decision that was published last.
        self._published: dict[str, int] = {}
        #: Trial of each surface whose figures are exported.
        self._exported: dict[Surface, int] = {}

    async def look(self) -> None:
        """Export each surface's figures; promote or roll back its canary where that is decided."""
        for surface in Surface:
            serving = self._models.serving(surface)
            if serving is None:
                continue
            try:
                tally = await self._tally(serving)
            except REDIS_FAILURES as error:
                self._metrics.redis_errors.labels("read_tallies").inc()
                log.warning("tallies_unread surface=%s error=%r", surface.value, error)
                continue
            self._export(serving, tally)
            release = self._models.release(surface)
            if release is None:
                continue
            await self._publish(serving.stable.manifest.name, release)
            if release.canary is None or not release.canary.auto:
                continue
            decision = self._decision(serving, release, release.canary, tally)
            if decision is None:
                continue
            try:
                await self._carry_out(serving, release, release.canary, decision)
            except StreamrecError as error:
                # The other surfaces have trials too.
                log.error("decision_failed surface=%s error=%s", surface.value, error)

    def rest(self) -> None:
        """Export nothing: another worker decides."""
        self._metrics.live_quality.clear()
        self._metrics.trial_evidence.clear()
        self.latest.clear()

    async def _tally(self, serving: Serving) -> PartitionTally:
        topic = self._settings.events_topic
        places = [
            PartitionKey(serving.surface, topic, partition)
            for partition in sorted(await self._outbox.partitions(topic))
        ]
        stored = await asyncio.to_thread(self._cache.read_tallies, places)
        return merged((decode_tally(data, serving.period) for data in stored), serving.period)

    def _decision(
        self, serving: Serving, release: Release, canary: Canary, tally: PartitionTally
    ) -> Decision | None:
        """What to do about a canary now; None to wait."""
        refusal = self._models.refusal(serving.surface, canary.version)
        if refusal is not None:
            return Decision("rollback", Verdict.REFUSED, {})
        if serving.role != "canary" or serving.revision != release.revision:
            # It is being loaded.
            return None
        decision = decide(tally.evidence(), self._settings.gate)
        for figure, value in decision.figures.items():
            self._metrics.trial_evidence.labels(serving.surface.value, figure).set(value)
        self.latest[serving.surface] = decision
        return None if decision.action == "wait" else decision

    async def _carry_out(
        self, serving: Serving, release: Release, canary: Canary, decision: Decision
    ) -> None:
        name, now = serving.stable.manifest.name, datetime.now(UTC)
        stable = serving.stable.manifest.version
        refusal = self._models.refusal(serving.surface, canary.version)
        reason = f"gate: {decision.reason.value}" + (f": {refusal}" if refusal else "")

        decided = Decided(
            surface=serving.surface.value,
            model=name,
            action=decision.action,
            reason=reason,
            stable=stable,
            canary=canary.version,
            share=canary.share,
            since=canary.since,
            decided_at=now,
            decided_by=self._by,
            figures={
                name: value if math.isfinite(value) else None
                for name, value in decision.figures.items()
            },
        )

        def transition(old: Release | None) -> Release:
            if decision.action == "promote":
                changed = canary_promoted(old, by=self._by, at=now)
            else:
                changed = canary_ended(old, quarantine=reason, by=self._by, at=now)
            return decided_by_gate(changed, decided)

        changed = await asyncio.to_thread(self._change, name, release, transition)
        if changed is None:
            return
        self._models.note(name, changed)
        surface = serving.surface.value
        self._metrics.decisions.labels(surface, decision.action, decision.reason.value).inc()
        log.info(
            "gate_decided surface=%s action=%s reason=%s stable=%s canary=%s seconds=%.1f"
            " events=%.0f revision=%d",
            surface, decision.action, decision.reason.value, stable, canary.version,
            (now - canary.since).total_seconds(), decision.figures.get("events", 0.0),
            changed.revision,
        )  # fmt: skip
        await self._publish(name, changed)

    async def _publish(self, name: str, release: Release) -> None:
        """Publish the decision that made `release`, and the release, unless this worker has."""
        decided = release.decided
        if decided is None or self._published.get(name) == release.revision:
            return
        age_s = (datetime.now(UTC) - decided.decided_at).total_seconds()
        if age_s < PUBLISHED_AGAIN_S:
            settings, outgoing = self._settings, []
            if settings.releases_topic:
                outgoing.append(release_record(settings.releases_topic, name, release))
            if settings.decisions_topic:
                message = {**msgspec.structs.asdict(decided), "revision": release.revision}
                outgoing.append(
                    Outgoing(settings.decisions_topic, name.encode(), _ENCODE(message), [])
                )
            await until_it_works(
                lambda: self._outbox.send(outgoing),
                name="publish_decision",
                failures=self._kafka_failures,
                on_failure=self._metrics.produce_errors.inc,
            )
        self._published[name] = release.revision

    def _change(
        self, name: str, release: Release, transition: Callable[[Release | None], Release]
    ) -> Release | None:
        """Change the release; None where another was faster, or nothing can be changed."""
        try:
            return self._registry.change(name, transition, expect_revision=release.revision)
        except ReleaseChangedError as error:
            # Or the release was pushed, and the registry does not have it.
            log.info("release_changed model=%s error=%s", name, error)
        except StoreError as error:
            log.warning("registry_not_written model=%s error=%s", name, error)
        with suppress(StoreError):
            # A decision must not outdo, by its later revision, what a person did meanwhile.
            if newer(self._registry.release(name), release) != release:
                log.info("decided_too_late model=%s revision=%d", name, release.revision)
                return None
        if not self._settings.releases_topic:
            log.error(
                "decision_not_carried_out model=%s; make the registry writable for the workers, or"
                " set STREAMREC_RELEASES_TOPIC",
                name,
            )
            return None
        return transition(release)

    def _export(self, serving: Serving, tally: PartitionTally) -> None:
        """Figures of each version with their bounds, over all partitions."""
        if self._exported.get(serving.surface) != serving.period:
            surface = {"surface": serving.surface.value}
            self._metrics.live_quality.remove_by_labels(surface)
            self._metrics.trial_evidence.remove_by_labels(surface)
            self._exported[serving.surface] = serving.period
        alpha = self._settings.gate_alpha / 2
        for role, version, own in _by_version(serving, tally):
            figures = {"mrr": own.mrr_interval(alpha)}
            if role != "shadow":
                # Of a shadow's hits the spread over users is not kept.
                figures["hit_rate"] = own.hit_rate_interval(alpha)
            for figure, interval in figures.items():
                for bound, value in zip(interval._fields, interval, strict=True):
                    self._metrics.live_quality.labels(
                        serving.surface.value, role, version, figure, bound
                    ).set(value)


def _by_version(serving: Serving, tally: PartitionTally) -> Sequence[tuple[str, str, Tally]]:
    stable = serving.stable.manifest.reference
    found = [("stable", stable, tally.stable.merged(tally.others).merged(tally.shadow))]
    if serving.rival is not None and serving.role is not None:
        rival = serving.rival.manifest.reference
        own = tally.canary if serving.role == "canary" else tally.shadow.swapped()
        found.append((serving.role, rival, own))
    return found
