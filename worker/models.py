"""Which bundle serves which surface, and the swap from one version to the next."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from worker.bundle import Bundle, open_bundle
from worker.errors import BundleError
from worker.events import Surface
from worker.metrics import Metrics, resident_bytes
from worker.registry import find, serving_version
from worker.settings import ModelChoice

log = logging.getLogger(__name__)


class Models:
    """The bundles in memory, one per surface.

    A batch takes `serving` once and keeps that bundle to its end; a swap replaces the reference
    between two batches. Loading runs in a thread: ONNX Runtime leaves the interpreter free while
    it builds a session.
    """

    def __init__(
        self,
        registry: Path,
        choices: Mapping[Surface, ModelChoice],
        *,
        inference_threads: int,
        warmup_batches: tuple[int, ...],
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._choices = dict(choices)
        self._inference_threads = inference_threads
        self._warmup_batches = warmup_batches
        self._metrics = metrics
        self._serving: dict[Surface, Bundle] = {}
        #: Versions that failed to load, so that they are not tried again at every look.
        self._refused: set[tuple[str, str]] = set()

    def serving(self, surface: Surface) -> Bundle | None:
        """The bundle that serves `surface` now; None where no model is set for it."""
        return self._serving.get(surface)

    @property
    def ready(self) -> bool:
        """Whether every surface that is to have a model has one."""
        return all(surface in self._serving for surface in self._choices)

    def load_all(self) -> None:
        """Load what should serve, at start.

        Raises:
            BundleError: a bundle is missing or broken; the worker must not start without it.
        """
        for surface, choice in self._choices.items():
            version = serving_version(self._registry, choice.name, choice.version)
            self._install(surface, self._open(surface, choice.name, version))

    async def refresh(self) -> None:
        """Swap in what should serve now. A version that cannot be loaded leaves the old one."""
        for surface, choice in self._choices.items():
            try:
                version = await asyncio.to_thread(
                    serving_version, self._registry, choice.name, choice.version
                )
            except BundleError as error:
                log.warning("registry_unreadable surface=%s error=%s", surface.value, error)
                continue
            current = self._serving.get(surface)
            if (choice.name, version) in self._refused or (
                current is not None and current.manifest.version == version
            ):
                continue
            started = time.perf_counter()
            try:
                bundle = await asyncio.to_thread(self._open, surface, choice.name, version)
            except BundleError as error:
                self._refused.add((choice.name, version))
                self._metrics.swaps.labels(surface.value, "refused").inc()
                log.error(
                    "swap_refused surface=%s version=%s error=%s", surface.value, version, error
                )
                continue
            loaded = time.perf_counter()
            self._install(surface, bundle)
            # The old session's memory goes back now, not at some later collection.
            await asyncio.to_thread(gc.collect)
            self._metrics.swap_seconds.labels("load").observe(loaded - started)
            self._metrics.swap_seconds.labels("switch").observe(time.perf_counter() - loaded)
            self._metrics.swaps.labels(surface.value, "swapped").inc()
            log.info("model_swapped surface=%s version=%s", surface.value, version)

    def _open(self, surface: Surface, name: str, version: str) -> Bundle:
        path = find(self._registry, name, version)
        before = resident_bytes()
        bundle = open_bundle(
            path, intra_op_threads=self._inference_threads, warmup_batches=self._warmup_batches
        )
        if bundle.manifest.surface != surface.value:
            raise BundleError(
                f"{path} is made for surface {bundle.manifest.surface!r}, not {surface.value!r};"
                " correct STREAMREC_MODELS or the manifest"
            )
        self._metrics.model_memory_bytes.labels(surface.value).set(
            max(0, resident_bytes() - before)
        )
        return bundle

    def _install(self, surface: Surface, bundle: Bundle) -> None:
        old = self._serving.get(surface)
        self._serving[surface] = bundle
        metrics, manifest = self._metrics, bundle.manifest
        if old is not None:
            metrics.model_info.remove(
                surface.value, old.manifest.name, old.manifest.version, old.manifest.precision
            )
        metrics.model_info.labels(
            surface.value, manifest.name, manifest.version, manifest.precision
        ).set(1)
        metrics.model_file_bytes.labels(surface.value).set(
            sum(file.bytes for file in manifest.files.values())
        )
        created = manifest.created().timestamp()
        metrics.model_created_seconds.labels(surface.value).set(created)
        metrics.model_age_seconds.labels(surface.value).set_function(
            lambda: max(0.0, time.time() - created)
        )
