"""What a worker serves after releases by push and pull, in any order, good or bad."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import threading
import time
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.conftest import tiny_bundle
from tests.unit.serving import AT, BROKEN, POSTS, STRANGE, V1, V2, models, samples, total
from tests.unit.serving import registry as registry_at
from worker import models as models_module
from worker.errors import BundleError, StoreError
from worker.metrics import Metrics
from worker.models import MAX_AHEAD_S, Models
from worker.registry import LocalRegistry
from worker.releases import (
    Canary,
    Release,
    canary_ended,
    canary_promoted,
    decode_release,
    promoted,
    with_canary,
    with_quarantined,
    with_shadow,
)


class Watched(LocalRegistry):
    """Counts how often a version is opened; may be told to fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: list[str] = []
        self.away = False
        self.kept: list[list[str]] = []

    def path(self, name: str, version: str) -> Path:
        self.opened.append(version)
        return super().path(name, version)

    def release(self, name: str) -> Release | None:
        if self.away:
            raise StoreError("the registry is away")
        return super().release(name)

    def keep(self, name: str, versions: Collection[str]) -> None:
        self.kept.append(sorted(versions))


@pytest.fixture
def registry(tmp_path: Path) -> Watched:
    made = Watched(registry_at(tmp_path).root)
    made.promote("posts", V1)
    return made


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def own(registry: Watched, metrics: Metrics) -> Models:
    made = models(registry, metrics)
    made.load_all()
    return made


def canary(registry: LocalRegistry, version: str = V2) -> Release:
    return registry.change("posts", lambda old: with_canary(old, version, 0.5, at=AT))


def roles(models: Models) -> dict[str, str]:
    """Version by role."""
    serving = models.serving(POSTS)
    assert serving is not None
    return {role: bundle.manifest.version for role, bundle in serving.bundles.items()}


def refresh(models: Models) -> None:
    asyncio.run(models.refresh())


# -- releases


def test_the_promoted_version_serves(own: Models) -> None:
    assert roles(own) == {"stable": V1}
    assert own.ready


def test_a_release_is_found_by_looking(own: Models, registry: Watched) -> None:
    release = canary(registry)
    refresh(own)
    assert roles(own) == {"stable": V1, "canary": V2}
    serving = own.serving(POSTS)
    assert serving is not None
    assert (serving.share, serving.period, serving.revision) == (
        0.5, release.period, release.revision,
    )  # fmt: skip


def test_a_pushed_release_is_followed_though_the_registry_lags(
    own: Models, registry: Watched
) -> None:
    own.note("posts", with_canary(registry.release("posts"), V2, 0.5, at=AT))
    assert own.pushed.is_set()
    refresh(own)
    assert roles(own) == {"stable": V1, "canary": V2}
    assert not own.pushed.is_set()
    refresh(own)
    assert roles(own) == {"stable": V1, "canary": V2}


def test_a_release_heard_of_again_wakes_nobody(own: Models, registry: Watched) -> None:
    release = registry.release("posts")
    assert release is not None
    own.note("posts", release)
    assert not own.pushed.is_set()


CHAIN: list[Release] = [promoted(None, V1, at=AT)]
CHAIN.append(with_canary(CHAIN[-1], V2, 0.5, at=AT))
CHAIN.append(canary_promoted(CHAIN[-1], at=AT))
CHAIN.append(with_shadow(CHAIN[-1], V1, at=AT))
CHAIN.append(with_quarantined(CHAIN[-1], V1, "worse", at=AT))
CHAIN.append(with_canary(CHAIN[-1], STRANGE, 0.1, at=AT))
CHAIN.append(canary_ended(CHAIN[-1], quarantine="strange", at=AT))


class Scripted(LocalRegistry):
    """Says what it is told of releases."""

    stored: Release | None = None

    def release(self, name: str) -> Release | None:
        return self.stored


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    return Scripted(registry_at(tmp_path_factory.mktemp("registry")).root)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ways=st.lists(
        st.tuples(st.sampled_from(["push", "pull", "refresh"]), st.sampled_from(CHAIN)),
        min_size=1,
        max_size=12,
    )
)
def test_the_newest_release_holds_in_whatever_order_and_way_releases_come(
    scripted: Scripted, ways: list[tuple[str, Release]]
) -> None:
    scripted.stored = CHAIN[0]
    own = models(scripted)
    own.load_all()
    newest = CHAIN[0]
    for way, release in ways:
        if way == "push":
            own.note("posts", release)
        elif way == "pull":
            # A store may serve an older file for a while.
            scripted.stored = release
        if way == "refresh" or way == "pull":
            refresh(own)
        if way != "refresh":
            newest = max(newest, release, key=lambda one: one.revision)
    refresh(own)
    trial = {} if newest.canary is None else {"canary": newest.canary.version}
    if newest.shadow is not None:
        trial = {"shadow": newest.shadow}
    assert roles(own) == {"stable": newest.stable, **trial}
    serving = own.serving(POSTS)
    assert serving is not None and serving.revision == newest.revision
    assert own.release(POSTS) == newest
    assert not set(roles(own).values()) & set(newest.quarantined)


def test_no_push_is_lost_while_the_registry_is_read(
    registry: Watched, own: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loading thread and the event loop keep releases at the same moment."""
    pushed = with_canary(registry.release("posts"), V2, 0.5, at=AT)
    inside, go_on = threading.Event(), threading.Event()
    plain = models_module.newer

    def slow(a: Release | None, b: Release | None) -> Release | None:
        found = plain(a, b)
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(0.3)
        return found

    monkeypatch.setattr(models_module, "newer", slow)

    async def run() -> None:
        loading = asyncio.create_task(own.refresh())
        await asyncio.to_thread(inside.wait, 5.0)
        own.note("posts", pushed)
        go_on.set()
        await loading

    asyncio.run(run())
    assert own.release(POSTS) == pushed


# -- what anybody may push


def test_a_push_about_another_model_is_nothing_to_this_worker(own: Models) -> None:
    own.note("friends", Release("v9", revision=5))
    assert not own.pushed.is_set()
    assert roles(own) == {"stable": V1}


def test_a_pushed_version_that_is_nowhere_changes_nothing_and_later_ones_are_followed(
    own: Models, registry: Watched
) -> None:
    release = registry.release("posts")
    assert release is not None
    own.note("posts", Release("v99", revision=release.revision + 1))
    refresh(own)
    assert roles(own) == {"stable": V1}
    registry.promote("posts", V2)
    refresh(own)
    assert roles(own) == {"stable": V2}


def test_a_pushed_version_that_is_nowhere_keeps_no_worker_from_starting(
    registry: Watched,
) -> None:
    release = registry.release("posts")
    assert release is not None
    fresh = models(registry)
    fresh.note("posts", Release("v99", revision=release.revision + 1))
    fresh.load_all()
    assert roles(fresh) == {"stable": V1}


def test_a_push_from_the_far_future_does_not_outdo_what_people_do_from_then_on(
    own: Models, registry: Watched
) -> None:
    far = int((time.time() + 2 * MAX_AHEAD_S) * 1000)
    own.note("posts", Release(STRANGE, revision=far))
    refresh(own)
    assert roles(own) == {"stable": V1}
    # Clocks differ a little.
    near = int((time.time() + MAX_AHEAD_S / 2) * 1000)
    own.note("posts", Release(V2, revision=near))
    refresh(own)
    assert roles(own) == {"stable": V2}


@pytest.mark.parametrize("field", ["revision", "period"])
@pytest.mark.parametrize("number", [-1, 2**53 + 1, 2**63, 2**64, 2**80])
def test_a_release_with_numbers_that_no_tally_could_hold_is_damaged(
    field: str, number: int
) -> None:
    with pytest.raises(BundleError, match="damaged"):
        decode_release(b'{"stable": "v1", "%s": %d}' % (field.encode(), number), "it")


# -- refusals


def test_a_stable_version_that_is_refused_keeps_the_incumbent(
    own: Models, registry: Watched, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    registry.promote("posts", BROKEN)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            refresh(own)
    assert roles(own) == {"stable": V1}
    # Tried once, counted once, complained about once.
    assert registry.opened.count(BROKEN) == 1
    assert total(metrics, "streamrec_refused_bundles_total") == 1
    messages = [record.message for record in caplog.records]
    assert sum(message.startswith("release_not_followed") for message in messages) == 1
    assert "model.onnx" in (own.refusal(POSTS, BROKEN) or "")
    registry.promote("posts", V2)
    refresh(own)
    assert roles(own) == {"stable": V2}


def test_a_worker_does_not_start_without_its_stable_version(registry: Watched) -> None:
    registry.promote("posts", BROKEN)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        models(registry).load_all()


@pytest.mark.parametrize("role", ["canary", "shadow"])
def test_a_trial_of_a_version_that_is_refused_leaves_the_stable_one(
    own: Models, registry: Watched, role: str
) -> None:
    if role == "canary":
        canary(registry, BROKEN)
    else:
        registry.change("posts", lambda old: with_shadow(old, BROKEN, at=AT))
    refresh(own)
    assert roles(own) == {"stable": V1}
    described: Any = own.describe()["posts"]
    assert "model.onnx" in described["refused"][BROKEN]
    assert own.refusal(POSTS, BROKEN) and not own.refusal(POSTS, V1)


@pytest.mark.parametrize("role", ["canary", "shadow"])
def test_no_version_that_serves_or_is_quarantined_is_on_trial_whoever_says_so(
    own: Models, registry: Watched, role: str
) -> None:
    release = registry.release("posts")
    assert release is not None
    for version in (V1, V2):
        release = replace(
            release,
            revision=release.revision + 1,
            period=release.revision + 1,
            quarantined={V2: "it is bad"},
            canary=Canary(version, 0.5, AT) if role == "canary" else None,
            shadow=version if role == "shadow" else None,
        )
        own.note("posts", release)
        refresh(own)
        assert roles(own) == {"stable": V1}
    assert V2 not in registry.opened


def test_a_mended_canary_is_tried_again_and_is_then_not_refused(
    own: Models, registry: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary(registry, BROKEN)
    refresh(own)
    directory = registry.root / "posts" / BROKEN
    shutil.rmtree(directory)
    tiny_bundle(directory, seed=3)
    refresh(own)
    assert roles(own) == {"stable": V1}
    monkeypatch.setattr(models_module, "REFUSED_AGAIN_S", 0.0)
    refresh(own)
    assert roles(own) == {"stable": V1, "canary": BROKEN}
    assert own.refusal(POSTS, BROKEN) is None


def test_a_bundle_of_another_version_copied_by_hand_is_refused(
    own: Models, registry: Watched
) -> None:
    shutil.copytree(registry.root / "posts" / V2, registry.root / "posts" / "v9")
    canary(registry, "v9")
    refresh(own)
    assert roles(own) == {"stable": V1}
    assert "copied by hand" in (own.refusal(POSTS, "v9") or "")


def test_a_canary_that_is_not_in_the_registry_is_said_once(
    own: Models, registry: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    own.note("posts", with_canary(registry.release("posts"), "v99", 0.5, at=AT))
    with caplog.at_level(logging.ERROR):
        refresh(own)
        refresh(own)
    assert roles(own) == {"stable": V1}
    assert [record.message.split()[0] for record in caplog.records] == ["trial_not_loaded"]


def test_while_the_registry_is_away_all_goes_on_and_a_push_is_followed_later(
    own: Models, registry: Watched
) -> None:
    release = canary(registry)
    registry.away = True
    own.note("posts", release)
    refresh(own)
    assert roles(own) == {"stable": V1}
    registry.away = False
    refresh(own)
    assert roles(own) == {"stable": V1, "canary": V2}


def test_a_pushed_rollback_is_followed_while_the_registry_is_away(
    own: Models, registry: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    release = canary(registry)
    refresh(own)
    assert roles(own) == {"stable": V1, "canary": V2}
    registry.away = True
    own.note("posts", canary_ended(release, quarantine="bad", at=AT))
    with caplog.at_level(logging.ERROR):
        refresh(own)
        refresh(own)
    assert roles(own) == {"stable": V1}
    errors = [one.message.split()[0] for one in caplog.records if one.levelno >= logging.ERROR]
    assert errors == ["registry_unread"]


# -- pins


def test_a_pinned_version_serves_whatever_is_released(registry: Watched) -> None:
    pinned = models(registry, pinned=V2)
    pinned.load_all()
    canary(registry, STRANGE)
    pinned.note("posts", with_canary(registry.release("posts"), STRANGE, 0.2, at=AT))
    refresh(pinned)
    assert roles(pinned) == {"stable": V2}
    serving = pinned.serving(POSTS)
    assert serving is not None and serving.revision == 0
    (registry.root / "posts" / "release.json").write_bytes(b"damaged")
    refresh(pinned)
    assert roles(pinned) == {"stable": V2}


# -- swaps


def test_a_promoted_canary_serves_from_the_session_that_is_there(
    own: Models, registry: Watched
) -> None:
    canary(registry)
    refresh(own)
    before = own.serving(POSTS)
    registry.change("posts", lambda old: canary_promoted(old, at=AT))
    refresh(own)
    after = own.serving(POSTS)
    assert before is not None and after is not None and before.rival is not None
    assert after.stable is before.rival
    assert registry.opened == [V1, V2]
    assert registry.kept[-1] == [V2]


def test_a_version_that_serves_no_more_is_let_go(own: Models, registry: Watched) -> None:
    serving = own.serving(POSTS)
    assert serving is not None
    session = weakref.ref(serving.stable.session)
    del serving
    registry.promote("posts", V2)
    refresh(own)
    gc.collect()
    assert session() is None


def test_a_change_that_loads_nothing_else_is_no_swap(
    own: Models, registry: Watched, metrics: Metrics
) -> None:
    registry.change("posts", lambda old: with_quarantined(old, STRANGE, "strange", at=AT))
    refresh(own)
    refresh(own)
    serving, release = own.serving(POSTS), registry.release("posts")
    assert serving is not None and release is not None
    assert serving.revision == release.revision
    assert total(metrics, "streamrec_model_swaps_total") == 0
    assert total(metrics, "streamrec_model_swap_seconds_count", phase="load") == 1
    canary(registry)
    refresh(own)
    assert total(metrics, "streamrec_model_swaps_total") == 1


def test_metrics_name_what_serves_and_nothing_else(
    own: Models, registry: Watched, metrics: Metrics
) -> None:
    def versions(name: str) -> set[str]:
        return {labels[1] for labels in samples(metrics, name)}

    def info() -> set[tuple[str, str]]:
        return {(labels[2], labels[4]) for labels in samples(metrics, "streamrec_model_info")}

    canary(registry)
    refresh(own)
    assert info() == {(V1, "stable"), (V2, "canary")}
    assert versions("streamrec_model_memory_bytes") == {V1, V2}
    assert total(metrics, "streamrec_canary_share") == 0.5
    release = registry.change("posts", lambda old: canary_promoted(old, at=AT))
    refresh(own)
    assert info() == {(V2, "stable")}
    assert versions("streamrec_model_memory_bytes") == {V2}
    assert versions("streamrec_model_file_bytes") == {V2}
    assert total(metrics, "streamrec_canary_share") == 0.0
    assert total(metrics, "streamrec_release_revision") == release.revision


def test_periods_outside_trials_tell_versions_apart_alike_in_all_workers(
    own: Models, registry: Watched
) -> None:
    def period(models: Models) -> int:
        serving = models.serving(POSTS)
        assert serving is not None
        return serving.period

    first = period(own)
    again = models(registry)
    again.load_all()
    assert period(again) == first < 0
    registry.promote("posts", V2)
    refresh(own)
    assert first != period(own) < 0


def test_model_page_can_be_read_while_bundles_are_refused(own: Models) -> None:
    """The HTTP thread reads what a loading thread adds to."""
    refused: Any = own._refused
    stop = threading.Event()

    def add() -> Iterator[None]:
        number = 0
        while not stop.is_set():
            refused["posts", f"v{number % 500}", number % 2] = ("broken", 0.0)
            refused.pop(("posts", f"v{(number + 250) % 500}", number % 2), None)
            number += 1
            yield

    thread = threading.Thread(target=lambda: [None for _ in add()])
    thread.start()
    try:
        ends = time.monotonic() + 0.3
        while time.monotonic() < ends:
            own.describe()
    finally:
        stop.set()
        thread.join()


def test_releases_of_old_say_no_revision_and_are_followed(registry: Watched) -> None:
    (registry.root / "posts" / "release.json").write_bytes(b'{"stable": "v2"}')
    own = models(registry)
    own.load_all()
    assert roles(own) == {"stable": V2}
    registry.promote("posts", V1)
    refresh(own)
    assert roles(own) == {"stable": V1}


def test_where_the_registry_is_away_at_start_the_model_comes_when_it_is_back(
    registry: Watched, metrics: Metrics
) -> None:
    registry.away = True
    own = models(registry, metrics)
    own.load_all()
    assert not own.ready
    assert own.serving(POSTS) is None
    refresh(own)
    assert not own.ready
    registry.away = False
    refresh(own)
    assert own.ready
