"""Which bundles serve which surface, and the swap from one version to the next."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from worker.bundle import Bundle, open_bundle
from worker.errors import BundleError, Refusal, StoreError, StreamrecError
from worker.events import Surface
from worker.memory import available_bytes, release_memory
from worker.metrics import Metrics, resident_bytes
from worker.priority import give_way
from worker.registry import Registry
from worker.releases import Release, newer, plan
from worker.settings import ModelChoice

log = logging.getLogger(__name__)

#: Seconds until a version that could not be loaded is tried again under the same release: a copy
#: may have been mended, or memory have come free.
REFUSED_AGAIN_S = 60.0
#: A pushed release may be this far ahead of this machine's clock, in seconds. Revisions are times:
#: one from the far future would outdo every release that people make from then on.
MAX_AHEAD_S = 86_400.0

Role = Literal["stable", "canary", "shadow"]


@dataclass(frozen=True, slots=True)
class Serving:
    """What serves one surface. A micro-batch takes it once and keeps it to its end."""

    surface: Surface
    stable: Bundle
    #: The version on trial; None where there is none.
    rival: Bundle | None = None
    #: What the rival is: a canary serves a share of the users, a shadow nobody.
    role: Literal["canary", "shadow"] | None = None
    #: Of the users: whom the canary serves, or for whom the shadow makes lists.
    share: float = 0.0
    #: Names the trial, alike in all workers: what is counted starts anew with each.
    period: int = 0
    #: Of the release that this follows; 0 where there is none.
    revision: int = 0

    @property
    def salt(self) -> str:
        """What users are drawn for the trial with."""
        return f"{self.surface.value}:{self.period}"

    @property
    def bundles(self) -> dict[Role, Bundle]:
        """The bundles by what they are."""
        found: dict[Role, Bundle] = {"stable": self.stable}
        if self.rival is not None and self.role is not None:
            found[self.role] = self.rival
        return found

    @property
    def by_version(self) -> dict[str, Bundle]:
        """The bundles by version."""
        return {bundle.manifest.version: bundle for bundle in self.bundles.values()}


class Models:
    """The bundles in memory. A swap replaces one reference between two micro-batches.

    A release comes from the registry or is pushed (`note`); the newer one counts, whichever way it
    came. Loading runs in a thread that gives way to those that serve: ONNX Runtime leaves the
    interpreter free while it builds a session.

    Args:
        shadow_share: of the users for whom a shadow makes lists.
        memory_budget_bytes: largest memory that a bundle may take to be opened; None for what is
            available then.
        public_keys: of those who may sign bundles; without any, signatures are not looked at.
    """

    def __init__(
        self,
        registry: Registry,
        choices: Mapping[Surface, ModelChoice],
        *,
        inference_threads: int,
        warmup_batches: tuple[int, ...],
        shadow_share: float,
        memory_budget_bytes: int | None,
        public_keys: Sequence[bytes],
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._choices = dict(choices)
        self._inference_threads = inference_threads
        self._warmup_batches = warmup_batches
        self._shadow_share = shadow_share
        self._memory_budget_bytes = memory_budget_bytes
        self._public_keys = tuple(public_keys)
        self._metrics = metrics
        # Sessions with threads of their own would start them with the loader's priority.
        self._loader = ThreadPoolExecutor(
            1, "model-loader", initializer=give_way if inference_threads == 1 else None
        )
        self._serving: dict[Surface, Serving] = {}
        self._releases: dict[str, Release] = {}
        #: Releases come to the event loop by push, and to a loading thread from the registry.
        self._releases_lock = threading.Lock()
        #: Why a version could not be loaded under a revision, and when (`time.monotonic()`): it is
        #: not tried again at each look.
        self._refused: dict[tuple[str, str, int], tuple[str, float]] = {}
        #: Why a surface is not as it should be, by what is wrong, so that it is logged once.
        self._complaints: dict[tuple[Surface, str], str] = {}
        #: Bundles were let go whose memory is to be given back.
        self._let_go = False
        #: Set when a release was pushed.
        self.pushed = asyncio.Event()

    def serving(self, surface: Surface) -> Serving | None:
        """What serves `surface` now; None where no model is set for it."""
        return self._serving.get(surface)

    def release(self, surface: Surface) -> Release | None:
        """The newest release that is known for `surface`; None where nothing was promoted."""
        choice = self._choices.get(surface)
        return None if choice is None else self._releases.get(choice.name)

    def name(self, surface: Surface) -> str | None:
        """Name in the registry of the model of `surface`; None where none is set."""
        choice = self._choices.get(surface)
        return None if choice is None else choice.name

    def refusal(self, surface: Surface, version: str) -> str | None:
        """Why this worker could not load `version` under the present release; None if it could."""
        release = self.release(surface)
        name = self.name(surface)
        if release is None or name is None:
            return None
        refused = self._refused.get((name, version, release.revision))
        return None if refused is None else refused[0]

    @property
    def ready(self) -> bool:
        """Whether every surface that is to have a model has one."""
        return all(surface in self._serving for surface in self._choices)

    def note(self, name: str, release: Release) -> None:
        """A release of model `name` was pushed; anybody may have done that."""
        if all(choice.name != name for choice in self._choices.values()):
            return
        if release.revision > (time.time() + MAX_AHEAD_S) * 1000.0:
            log.error("release_from_the_future model=%s revision=%d", name, release.revision)
            return
        if self._known(name, release):
            self.pushed.set()

    def load_all(self) -> None:
        """Load what should serve, at start.

        Where the registry cannot be read, its surfaces start without a model, on popular items;
        `refresh` goes on trying.

        Raises:
            BundleError: a stable version is missing or broken: a mistake, not an outage.
        """
        for surface, choice in self._choices.items():
            try:
                self._install(self._loaded(surface, choice))
            except StoreError as error:
                self._complain(surface, "started_without_model", str(error))

    async def refresh(self) -> None:
        """Swap in what should serve now. A version that cannot be loaded leaves the old one."""
        self.pushed.clear()
        if self._let_go:
            # A micro-batch that began before the swap has let go of the old session by now.
            self._let_go = False
            await asyncio.to_thread(release_memory)
        loop = asyncio.get_running_loop()
        for surface, choice in self._choices.items():
            started = time.perf_counter()
            try:
                serving = await loop.run_in_executor(self._loader, self._loaded, surface, choice)
            except StreamrecError as error:
                self._complain(surface, "release_not_followed", str(error))
                self._metrics.release_followed.labels(surface.value).set(0)
                continue
            self._complain(surface, "release_not_followed", None)
            self._metrics.release_followed.labels(surface.value).set(1)
            if serving == self._serving.get(surface):
                continue
            loaded = time.perf_counter()
            self._install(serving)
            self._metrics.swap_seconds.labels("load").observe(loaded - started)
            self._metrics.swap_seconds.labels("switch").observe(time.perf_counter() - loaded)

    def describe(self) -> dict[str, object]:
        """What serves each surface, for `/model`."""
        return {
            surface.value: self._described(serving) for surface, serving in self._serving.items()
        }

    def refused(self) -> dict[str, str]:
        """Why versions could not be loaded under the releases that serve, by `name@version`."""
        return {
            f"{serving.stable.manifest.name}@{version}": reason
            for serving in dict(self._serving).values()
            for version, reason in self._refused_under(serving).items()
        }

    def _refused_under(self, serving: Serving) -> dict[str, str]:
        """Why versions of a model could not be loaded under the release that serves."""
        name = serving.stable.manifest.name
        return {
            version: reason
            for (model, version, revision), (reason, _) in dict(self._refused).items()
            if model == name and revision == serving.revision
        }

    def _described(self, serving: Serving) -> dict[str, object]:
        name = serving.stable.manifest.name
        described: dict[str, object] = {"model": name, "revision": serving.revision}
        for role, bundle in serving.bundles.items():
            manifest = bundle.manifest
            described[role] = {
                "version": manifest.version,
                "precision": manifest.precision,
                "created_at": manifest.created_at,
            }
        if serving.role is not None:
            described["share"] = serving.share
        described["refused"] = self._refused_under(serving)
        return described

    def _complain(self, surface: Surface, event: str, problem: str | None) -> None:
        """Log what is wrong, None for nothing, where it was not so before."""
        if problem is None:
            self._complaints.pop((surface, event), None)
        elif self._complaints.get((surface, event)) != problem:
            self._complaints[surface, event] = problem
            log.error("%s surface=%s error=%s", event, surface.value, problem)

    def _known(self, name: str, release: Release | None) -> bool:
        """Keep the newer release of a model; whether that is another than before."""
        with self._releases_lock:
            before = self._releases.get(name)
            after = newer(before, release)
            if after is not None:
                self._releases[name] = after
        return after != before

    def _loaded(self, surface: Surface, choice: ModelChoice) -> Serving:
        """What should serve `surface`, with every bundle open.

        Raises:
            StreamrecError: the registry cannot be read, or the stable version not be loaded.
        """
        before = self._serving.get(surface)
        in_memory = {} if before is None else before.by_version
        if choice.version is None:
            unread = None
            try:
                found, known = self._registry.refresh(choice.name)
            except StreamrecError as error:
                if before is None:
                    raise
                # A rollback that is pushed must not wait for a registry: what it goes back to is
                # in memory.
                found, known, unread = None, tuple(in_memory), str(error)
            self._complain(surface, "registry_unread", unread)
            self._known(choice.name, found)
            release = self._releases.get(choice.name)
            if (
                release is not None
                and release != found
                and release.stable not in known
                and surface not in self._serving
            ):
                # Not there yet, or never: no push may keep a worker from starting.
                log.error("push_not_followed surface=%s stable=%s", surface.value, release.stable)
                release = found
        else:
            # A pinned version serves whatever is released, even where the release is damaged.
            release, known = None, tuple(self._registry.versions(choice.name))
        revision = 0 if release is None else release.revision
        wanted = plan(release, known, choice, where=self._registry.url)

        def bundle(version: str) -> Bundle:
            return in_memory.get(version) or self._open(surface, choice.name, version, revision)

        role: Literal["canary", "shadow"] = "canary" if wanted.canary else "shadow"
        version = wanted.canary or wanted.shadow
        self._registry.keep(choice.name, [wanted.stable, *([version] if version else [])])
        stable, rival = bundle(wanted.stable), None
        problem = f"not in the registry: {wanted.missing}" if wanted.missing else None
        if version is not None:
            # A trial that cannot be loaded harms nobody: the stable version serves all.
            try:
                rival = bundle(version)
            except BundleError:
                pass  # `_open` has logged it.
            except StreamrecError as error:
                problem = str(error)
        self._complain(surface, "trial_not_loaded", problem)
        return Serving(
            surface,
            stable,
            rival=rival,
            role=None if rival is None else role,
            share=wanted.share if wanted.canary else self._shadow_share,
            period=wanted.period or _period_of(stable),
            revision=revision,
        )

    def _open(self, surface: Surface, name: str, version: str, revision: int) -> Bundle:
        """Open one bundle, or raise what it was refused for before."""
        reason, at = self._refused.get((name, version, revision), ("", -REFUSED_AGAIN_S))
        if time.monotonic() < at + REFUSED_AGAIN_S:
            raise BundleError(reason)
        before = resident_bytes()
        budget = self._memory_budget_bytes
        try:
            path = self._registry.path(name, version)
            bundle = open_bundle(
                path,
                intra_op_threads=self._inference_threads,
                warmup_batches=self._warmup_batches,
                memory_budget_bytes=available_bytes() if budget is None else budget,
                public_keys=self._public_keys,
                beside=[
                    one for serving in self._serving.values() for one in serving.bundles.values()
                ],
            )
            manifest = bundle.manifest
            if (manifest.name, manifest.version) != (name, version):
                raise BundleError(
                    f"{path} says that it is {manifest.reference}: it was copied by hand; use"
                    " streamrec models publish --name NAME --version VERSION",
                    Refusal.IDENTITY,
                )
            if manifest.surface != surface.value:
                raise BundleError(
                    f"{path} is made for surface {manifest.surface!r}, not {surface.value!r};"
                    " correct STREAMREC_MODELS or the manifest",
                    Refusal.IDENTITY,
                )
        except BundleError as error:
            self._refused[name, version, revision] = str(error), time.monotonic()
            self._metrics.refused_bundles.labels(surface.value, error.reason.value).inc()
            log.error(
                "bundle_refused surface=%s version=%s reason=%s error=%s",
                surface.value, version, error.reason.value, error,
            )  # fmt: skip
            raise
        self._refused.pop((name, version, revision), None)
        self._metrics.model_memory_bytes.labels(surface.value, version).set(
            max(0, resident_bytes() - before)
        )
        return bundle

    def _install(self, serving: Serving) -> None:
        surface = serving.surface
        before = self._serving.get(surface)
        self._serving[surface] = serving
        metrics = self._metrics
        metrics.versions.serve(
            surface.value, [one.manifest.reference for one in serving.bundles.values()]
        )
        metrics.release_followed.labels(surface.value).set(1)
        metrics.release_revision.labels(surface.value).set(serving.revision)
        metrics.canary_share.labels(surface.value).set(
            serving.share if serving.role == "canary" else 0.0
        )
        if before is not None:
            for role, bundle in before.bundles.items():
                manifest = bundle.manifest
                metrics.model_info.remove(
                    surface.value, manifest.name, manifest.version, manifest.precision, role
                )
                if manifest.version not in serving.by_version:
                    metrics.model_file_bytes.remove(surface.value, manifest.version)
                    metrics.model_memory_bytes.remove(surface.value, manifest.version)
                    self._let_go = True
            if before.bundles != serving.bundles:
                metrics.swaps.labels(surface.value).inc()
        for role, bundle in serving.bundles.items():
            manifest = bundle.manifest
            metrics.model_info.labels(
                surface.value, manifest.name, manifest.version, manifest.precision, role
            ).set(1)
            metrics.model_file_bytes.labels(surface.value, manifest.version).set(
                sum(file.bytes for file in manifest.files.values())
            )
            # An alert watches it: it must be there before the first error.
            metrics.inference_errors.labels(surface.value, manifest.reference)
        created = serving.stable.manifest.created().timestamp()
        metrics.model_created_seconds.labels(surface.value).set(created)
        metrics.model_age_seconds.labels(surface.value).set_function(
            lambda: max(0.0, time.time() - created)
        )
        log.info(
            "serving surface=%s revision=%d %s",
            surface.value,
            serving.revision,
            " ".join(f"{role}={one.manifest.version}" for role, one in serving.bundles.items()),
        )


def _period_of(bundle: Bundle) -> int:
    """The period outside trials: one for each version, below 0."""
    digest = hashlib.blake2b(bundle.manifest.version.encode(), digest_size=6).digest()
    return -1 - int.from_bytes(digest, "big")
