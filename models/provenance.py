"""Where a bundle comes from: the `provenance` field of its manifest."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import onnxruntime

from worker import __version__
from worker.manifest import Manifest

#: What a published manifest should have; docs/publish.md explains each.
REQUIRED = ("data", "data_sha256", "commit", "streamrec", "onnxruntime")


def provenance(data_name: str, data_sha256: str, **more: str) -> dict[str, str]:
    """The provenance of a bundle made here and now; recipe and parents have their own fields.

    Args:
        data_name: for people, such as `MovieLens 100K`.
        data_sha256: of the events that the model was trained on.
        more: whatever else says how it was made, such as `seed` or `split`.
    """
    return {
        "data": data_name,
        "data_sha256": data_sha256,
        "commit": commit(Path(__file__).parents[1]),
        "streamrec": __version__,
        "onnxruntime": onnxruntime.__version__,
        **more,
    }


def missing_provenance(manifest: Manifest) -> list[str]:
    """What `manifest` does not say about its origin; empty where it says all."""
    missing = [key for key in REQUIRED if not manifest.provenance.get(key)]
    if not manifest.recipe:
        missing.append("recipe")
    if manifest.precision != "fp32" and not manifest.parents:
        missing.append("parents")
    return missing


def commit(root: Path) -> str:
    """Git commit of the package in `root`, with `+dirty` where its code differs from that.

    `unknown` outside git; also where the package lies inside another project's checkout, whose
    commit says nothing about it.
    """
    head = _git(root, "rev-parse", "HEAD")
    if head is None or not _git(root, "ls-files", "models/__init__.py"):
        return "unknown"
    # Bundles are written into the checkout too; only code counts.
    changed = _git(root, "status", "--porcelain", "--", "models/*.py", "worker/*.py")
    return f"{head}+dirty" if changed else head


def _git(root: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(
            [git, "-C", str(root), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
