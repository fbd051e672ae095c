"""Find bundles: `<registry>/<model name>/<version>/`, and which version should serve.

A version is a directory with a manifest; since bundles appear by one rename, it is whole. Versions
sort by name, so names begin with the time (`20261124T1030Z-int8`). `release.json` beside them names
the promoted version; without it the newest serves.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from worker.bundle import MANIFEST_FILE
from worker.errors import BundleError

RELEASE_FILE = "release.json"


class Release(msgspec.Struct, frozen=True):
    """Which version should serve."""

    stable: str


def names(registry: Path) -> list[str]:
    """Model names in the registry, sorted."""
    if not registry.is_dir():
        raise BundleError(
            f"the registry {registry} is not a directory; set STREAMREC_REGISTRY to the one that"
            " holds <model name>/<version>/"
        )
    return sorted(entry.name for entry in registry.iterdir() if versions(registry, entry.name))


def versions(registry: Path, name: str) -> list[str]:
    """Versions of a model, oldest first; empty where there is none."""
    _check_part(name, "model name")
    try:
        entries = list((registry / name).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"{registry / name} cannot be read: {error.strerror}") from None
    return sorted(
        entry.name
        for entry in entries
        if not entry.name.startswith(".") and (entry / MANIFEST_FILE).is_file()
    )


def find(registry: Path, name: str, version: str) -> Path:
    """Directory of one version.

    Raises:
        BundleError: there is no such version; the message lists those that exist.
    """
    _check_part(version, "version")
    known = versions(registry, name)
    if version not in known:
        listing = ", ".join(known) if known else "no version at all"
        raise BundleError(
            f"{registry} has no version {version!r} of model {name!r}; it has {listing}"
        )
    return registry / name / version


def serving_version(registry: Path, name: str, pinned: str | None = None) -> str:
    """The version that should serve: the pinned one, else the promoted, else the newest.

    Raises:
        BundleError: there is none, or the release file is damaged.
    """
    if pinned is not None:
        return find(registry, name, pinned).name
    file = registry / name / RELEASE_FILE
    try:
        release = msgspec.json.decode(file.read_bytes(), type=Release)
    except FileNotFoundError:
        known = versions(registry, name)
        if not known:
            raise BundleError(
                f"no bundle {registry / name / '<version>'}: set STREAMREC_REGISTRY and"
                " STREAMREC_MODELS, or publish one"
            ) from None
        return known[-1]
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise BundleError(f"{file} is damaged: {error}; promote a version again") from None
    return find(registry, name, release.stable).name


def promote(registry: Path, name: str, version: str) -> None:
    """Make `version` the one that serves; running workers swap to it at their next look."""
    directory = find(registry, name, version).parent
    building = directory / f".{RELEASE_FILE}.{os.getpid()}"
    building.write_bytes(msgspec.json.encode(Release(version)))
    building.replace(directory / RELEASE_FILE)


def _check_part(part: str, what: str) -> None:
    if not part or part.startswith(".") or "/" in part or "\0" in part:
        raise BundleError(f"{part!r} is not a {what}: it must be a plain directory name")
