"""Reads what the status page shows, and keeps the last minutes of it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from prometheus_client import Metric
from pydantic import SecretStr

from worker import __version__
from worker.decider import Decider
from worker.events import Surface
from worker.health import Health
from worker.memory import available_bytes
from worker.metrics import Metrics, resident_bytes
from worker.models import Models, Serving
from worker.recent import INTERVAL_S, Moment, Recent
from worker.samples import Samples
from worker.security import without_credentials
from worker.settings import PREFIX, Settings
from worker.status_page import Setting, Snapshot, Trial, Version, settings_page, status_page

log = logging.getLogger(__name__)


class Status:
    """The pages of one worker. Read by the threads of the HTTP server, beside the event loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        health: Health,
        metrics: Metrics,
        models: Models,
        decider: Decider,
    ) -> None:
        self._settings = settings
        self._health = health
        self._metrics = metrics
        self._models = models
        self._decider = decider
        self._recent = Recent()
        self._started = time.monotonic()

    def page(self, query: str) -> str:
        """The page at `/`; with the query `hold` it does not ask for itself again."""
        return status_page(self.snapshot(), refresh=query != "hold")

    def settings(self, query: str) -> str:
        """The page at `/settings`."""
        return settings_page(self.snapshot())

    def watch(self, stopping: threading.Event) -> None:
        """Start the thread that keeps the last minutes."""

        def run() -> None:
            while True:
                try:
                    self._recent.add(self._moment())
                except Exception:
                    log.exception("status_not_noted")
                if stopping.wait(INTERVAL_S):
                    return

        threading.Thread(target=run, name="streamrec-status", daemon=True).start()

    def snapshot(self) -> Snapshot:
        """How things are now."""
        health, settings = self._health, self._settings
        now = time.monotonic()
        serving = [one for surface in Surface if (one := self._models.serving(surface))]
        releases = {
            one.surface.value: release
            for one in serving
            if (release := self._models.release(one.surface)) is not None
        }
        return Snapshot(
            at=datetime.now(UTC),
            worker=settings.instance_id or socket.gethostname(),
            group=settings.group,
            release=__version__,
            uptime_s=now - self._started,
            stalled=health.stalled(now),
            missing=health.not_ready(),
            kafka_answers=health.kafka_answers,
            redis_answers=health.redis_ready,
            available_bytes=available_bytes(),
            samples=Samples.of(self._metrics.registry.collect()),
            recent=self._recent,
            gate=settings.gate,
            versions=[version for one in serving for version in _versions(one)],
            trials=[trial for one in serving if (trial := self._trial(one)) is not None],
            releases=releases,
            refused=self._models.refused(),
            settings=shown_settings(settings),
        )

    def _moment(self) -> Moment:
        metrics = self._metrics
        families: Iterable[Metric] = (
            family
            for one in (
                metrics.event_seconds,
                metrics.cached_seconds,
                metrics.stage_seconds,
                metrics.consumer_lag,
                metrics.dead_letters,
            )
            for family in one.collect()
        )
        samples = Samples.of(families)
        stage = "streamrec_stage_seconds"
        return Moment(
            at=time.monotonic(),
            events=samples.total("streamrec_event_seconds_count"),
            dead_letters=samples.total("streamrec_dead_letters"),
            lag=samples.total("streamrec_consumer_lag_events"),
            resident_bytes=float(resident_bytes()),
            cached=samples.buckets("streamrec_cached_seconds"),
            published=samples.buckets("streamrec_event_seconds"),
            stages={
                name: samples.buckets(stage, stage=name)
                for name in samples.by("stage", f"{stage}_count")
            },
        )

    def _trial(self, serving: Serving) -> Trial | None:
        stable, *rivals = _versions(serving)
        if not rivals:
            return None
        release = self._models.release(serving.surface)
        canary = None if release is None else release.canary
        return Trial(
            serving.surface.value,
            stable,
            rivals[0],
            since=None if canary is None else canary.since,
            auto=canary is not None and canary.auto,
            decision=self._decider.latest.get(serving.surface),
        )


def shown_settings(settings: Settings) -> list[Setting]:
    """Every setting in the order of the reference, without passwords."""
    shown = []
    for name, info in Settings.model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            secret = value.get_secret_value()
            # The one secret that is an address too.
            told = without_credentials(secret) if name == "redis" else "hidden" if secret else ""
        else:
            told = without_credentials("" if value is None else str(value))
        shown.append(Setting(f"{PREFIX}{name.upper()}", told, bool(value == info.get_default())))
    return shown


def _versions(serving: Serving) -> list[Version]:
    """The stable version first."""
    return [
        Version(
            serving.surface.value,
            role,
            bundle.manifest.name,
            bundle.manifest.version,
            bundle.manifest.precision,
            bundle.manifest.created(),
            1.0 - serving.share * (serving.role == "canary") if role == "stable" else serving.share,
        )
        for role, bundle in serving.bundles.items()
    ]
