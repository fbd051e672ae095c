"""How much memory there is, and how much a bundle is expected to take."""

import gc
import weakref
from pathlib import Path

import msgspec
import pytest

from tests.conftest import tiny_bundle
from worker.bundle import open_bundle
from worker.bundle_files import read_manifest
from worker.errors import BundleError, Refusal
from worker.manifest import FileSpec, Manifest
from worker.memory import (
    Room,
    available_bytes,
    check_budget,
    expected_bytes,
    release_memory,
    room,
)
from worker.metrics import resident_bytes

MIB = 1 << 20


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8192 kB\n"}


def test_without_control_groups_what_the_machine_has_is_available(tmp_path: Path) -> None:
    assert available_bytes(put(tmp_path, MEMINFO)) == 8 * MIB
    assert room(tmp_path) == Room(8 * MIB, 9000 * 1024)


def test_where_the_system_says_nothing_nothing_is_known(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def group(directory: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    """A control group, version 2."""
    return {
        f"{directory}/memory.max": limit,
        f"{directory}/memory.current": f"{used}\n",
        f"{directory}/memory.stat": f"anon 5\ninactive_file {cached}\n",
    }


def test_the_tightest_of_nested_groups_counts_and_cached_files_are_free(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/pod/box\n", **MEMINFO}
    files |= group("sys/fs/cgroup/pod/box", "max\n", 3 * MIB)
    files |= group("sys/fs/cgroup/pod", f"{6 * MIB}\n", 4 * MIB, cached=MIB)
    assert available_bytes(put(tmp_path, files)) == 3 * MIB
    assert room(tmp_path) == Room(3 * MIB, 6 * MIB)


def test_in_a_container_the_group_at_the_top_is_its_own(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/of/the/host\n", **MEMINFO}
    files |= group("sys/fs/cgroup", f"{5 * MIB}\n", 4 * MIB)
    assert available_bytes(put(tmp_path, files)) == MIB


def test_groups_of_version_1_are_read_too(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/box"
    files = {
        "proc/self/cgroup": "12:cpu:/box\n4:memory:/box\n",
        f"{top}/memory.limit_in_bytes": f"{7 * MIB}",
        f"{top}/memory.usage_in_bytes": f"{3 * MIB}",
        f"{top}/memory.stat": f"total_inactive_file {2 * MIB}\n",
        **MEMINFO,
    }
    assert available_bytes(put(tmp_path, files)) == 6 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", "100\n", 200)}
    assert available_bytes(put(tmp_path, files)) == 0


def sized(manifest: Manifest, items: int, model_bytes: int, **changes: object) -> Manifest:
    files = {**manifest.files, "model.onnx": FileSpec("", model_bytes)}
    return msgspec.structs.replace(manifest, item_count=items, files=files, **changes)  # type: ignore[arg-type]


#: Resident MiB of a bundle once open, measured: synthetic catalogues (docs/bundle.md).
@pytest.mark.parametrize(
    ("items", "model_bytes", "measured"),
    [(1_000_000, 256_422_205, 1243), (1_000_000, 66_126_616, 888)],
)
def test_the_estimate_lies_above_what_was_measured_and_near_it(
    tmp_path: Path, items: int, model_bytes: int, measured: int
) -> None:
    manifest = sized(read_manifest(tiny_bundle(tmp_path / "v1")), items, model_bytes)
    assert measured <= expected_bytes(manifest, rows=64) / MIB <= 1.1 * measured


def test_approximate_retrieval_is_expected_to_score_candidates_only(tmp_path: Path) -> None:
    manifest = read_manifest(tiny_bundle(tmp_path / "v1"))
    exact = sized(manifest, 1_000_000, MIB)
    approximate = sized(manifest, 1_000_000, MIB, max_k=1000)
    assert expected_bytes(exact, rows=64) - expected_bytes(approximate, rows=64) > 450 * MIB


def test_a_budget_that_is_too_small_is_answered_with_both_figures(tmp_path: Path) -> None:
    manifest = sized(read_manifest(tiny_bundle(tmp_path / "v1")), 40, 100_000_000)
    with pytest.raises(BundleError, match="about 327 MB and 200 MB are free") as refused:
        check_budget(manifest, 200_000_000, rows=64)
    assert refused.value.reason is Refusal.MEMORY
    check_budget(manifest, 400_000_000, rows=64)


def test_a_tiny_bundle_takes_no_more_than_expected(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "v1")
    before = resident_bytes()
    bundle = open_bundle(path, warmup_batches=(1, 64))
    assert resident_bytes() - before <= expected_bytes(bundle.manifest, rows=64)


def test_a_bundle_is_gone_with_its_last_reference_without_a_collection(tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle(tmp_path / "v1"))
    session = weakref.ref(bundle.session)
    gc.disable()
    try:
        del bundle
        assert session() is None
    finally:
        gc.enable()


def test_many_swaps_of_bundles_leave_memory_where_it_was(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "v1")

    def swap(times: int) -> int:
        bundle = open_bundle(path)
        for _ in range(times):
            bundle = open_bundle(path)
        del bundle
        release_memory()
        return resident_bytes()

    settled = swap(5)
    assert swap(30) - settled < 4 * MIB
